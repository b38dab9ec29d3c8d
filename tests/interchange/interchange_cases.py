# SPDX-License-Identifier: Apache-2.0
"""Random adapters for the interchange tests: what each consists of, as plain data made from a seed.

A case is a base model, one or two configs, and a way to write and to read the files. Only what
Hugging Face PEFT can make is in here; where it can't, a comment says so.
"""

import random

TARGETS = {
    "mlp": [["first"], ["first", "second"], r"(first|block\.second)", "all-linear"],
    "conv": [["conv0"], ["conv0", "conv1"], r"conv\d"],
    "embedder": [["table"], ["table", "lin"]],
    "llama": [["q_proj", "v_proj"], ["down_proj"], r".*\.(k_proj|up_proj)", "all-linear", None],
    "gpt2": [["c_attn"], ["c_attn", "mlp.c_proj"], ["c_fc"], None],
    "bert": [["query", "value"], ["attention.output.dense"], None],
    "t5": [["q", "v"], ["wi", "wo"], r"decoder.*\.[qk]", None],
}
SAVED = {
    "mlp": ["head"],
    "conv": ["head"],
    "embedder": ["head"],
    "llama": ["lm_head"],
    "gpt2": ["wte"],
    "bert": ["LayerNorm"],
    "t5": ["lm_head"],
}
# The lists of layers that `layers_to_transform` counts in.
LAYERS = {"llama": "layers", "gpt2": "h", "bert": "layer"}
# Bases whose embedding can have rows trained.
EMBEDDINGS = ("llama", "gpt2", "bert")
# Modules for rank and alpha patterns. The last of each is how a file has all modules below a path.
NAMED = {
    "mlp": ["first", r".*second", r"^block(\..*)?"],
    "conv": ["conv0", r"conv[1-9]"],
    "embedder": ["table"],
    "llama": ["q_proj", "layers.1.mlp.down_proj", r".*\.1\..*", r"^(model\.)?layers.1(\..*)?"],
    "gpt2": ["c_attn", "h.2.mlp.c_fc", r"^(transformer\.)?h.1(\..*)?"],
    "bert": ["query", "layer.1.attention.self.value", r"^(bert\.)?encoder(\..*)?"],
    "t5": ["q", "block.1.layer.0.SelfAttention.v", r"^decoder(\..*)?"],
}
TRANSFORMERS = {
    "llama": [
        ("ForCausalLM", "CAUSAL_LM"),
        ("ForSequenceClassification", "SEQ_CLS"),
        ("Model", "FEATURE_EXTRACTION"),
        ("ForCausalLM", None),
    ],
    "gpt2": [("LMHeadModel", "CAUSAL_LM"), ("ForTokenClassification", "TOKEN_CLS")],
    "bert": [
        ("ForTokenClassification", "TOKEN_CLS"),
        ("ForSequenceClassification", "SEQ_CLS"),
        ("Model", None),
    ],
    "t5": [("ForConditionalGeneration", "SEQ_2_SEQ_LM")],
}


class Maker:
    """Makes one case; each draw comes from the case's own generator."""

    def __init__(self, method, index, seed):
        self.method, self.index = method, index
        self.random = random.Random(f"{method} {index} {seed}")
        self.tasks = self.random.choice([2, 3, 5])
        self.pick, self.chance = self.random.choice, lambda share: self.random.random() < share

    def case(self):
        """The case as a dictionary of plain data."""
        method, task, self.single = self.method, None, False
        kind = self.pick(KINDS[method])
        if kind in TRANSFORMERS:
            heads = TRANSFORMERS[kind]
            # Poly there takes `task_ids` only in the classes that a task type chooses.
            head, task = self.pick(
                [pair for pair in heads if pair[1]] if method == "Poly" else heads
            )
            base = [kind, head]
        elif kind == "mlp":
            base = [kind, self.pick([8, 12, 16]), self.pick([12, 20, 24])]
        elif kind == "conv":
            dimensions = self.pick(
                [1, 2, 3] if method == "Lora" else [1, 2]
            )  # LoHa and LoKr there have no Conv3d
            # LoRA there does not follow dilation, and can't merge into groups or into a Conv3d with
            # a kernel of one.
            dilation, groups = (
                (1, 1) if method == "Lora" else (self.pick([1, 2]), self.pick([1, 2]))
            )
            base = [
                kind,
                dimensions,
                self.pick([1, 2, 3] if dimensions < 3 else [2, 3]),
                self.pick([1, 2]),
                dilation,
                groups,
            ]
        else:
            base = [kind]
        first = self.config(base, task)
        adapters = {"default": first}
        # Two adapters can't both train biases or, as a rule, the head of a task; nor there can one
        # have rows of an embedding alone.
        if not self.single and task not in ("SEQ_CLS", "TOKEN_CLS") and self.chance(0.35):
            adapters["other"] = self.config(base, task, alone=False)
        # What can be made a LoRA there: linear layers without trained biases, all layers that the
        # config's names fit, one adapter.
        alone = len(adapters) == 1 and not self.single and "exclude_modules" not in first
        convertible = (
            method in ("LoHa", "LoKr", "VBLoRA") and kind in ("mlp", "llama", "bert") and alone
        )
        return {
            "id": f"{method.lower()}-{self.index:02}",
            "config_class": f"{method}Config",
            "seed": self.random.randrange(10**6),
            "base": base,
            "adapters": adapters,
            "file": self.pick(["safetensors", "safetensors", "safetensors", "bin"]),
            "reader": self.pick(["from_pretrained", "from_pretrained", "state_dict"]),
            "lora_rank": self.pick([None, 1, 3, 0.9]) if convertible else None,
            "task_ids": [self.random.randrange(self.tasks) for _ in range(3)]
            if method == "Poly"
            else None,
        }

    def config(self, base, task, alone=True):
        """Arguments of a config."""
        kind = base[0]
        # By default only LoRA there has targets for every type of model. A second adapter may not
        # target what the first trains whole.
        unfit = [] if self.method == "Lora" else [None]
        targets = self.pick(
            [t for t in TARGETS[kind] if t not in [*unfit, *([] if alone else ["all-linear"])]]
        )
        config = {
            "target_modules": targets,
            "task_type": task,
            **getattr(self, self.method.lower())(base, alone),
        }
        if (
            self.chance(0.25)
            and not config.get("trainable_token_indices")
            and not (kind == "bert" and task is None)
            and alone is not False
        ):
            saved = (
                SAVED[kind]
                if "lm_head" not in SAVED[kind] or task not in ("SEQ_CLS", "FEATURE_EXTRACTION")
                else ["embed_tokens"]
            )
            config["modules_to_save"] = list(saved)
        if self.chance(0.2):
            config["exclude_modules"] = self.pick([r".*\.0\..*", ["nothing_of_this_name"]])
        if (
            kind in LAYERS
            and self.method != "Poly"
            and not isinstance(targets, str)
            and self.chance(0.3)
        ):
            config.update(layers_to_transform=self.pick([1, [0, 2]]), layers_pattern=LAYERS[kind])
        return config

    def patterns(self, kind):
        """Ranks and alphas of single modules."""
        # In alphabetical order, for a file written there has them in it, and of those that fit a
        # module the first counts.
        ranks = {name: self.pick([1, 2, 3]) for name in sorted(NAMED[kind]) if self.chance(0.4)}
        alphas = {name: self.pick([1, 5]) for name in sorted(NAMED[kind]) if self.chance(0.4)}
        return {"rank_pattern": ranks, "alpha_pattern": alphas}

    def bias(self, own, alone):
        """What biases are trained."""
        choice = self.pick(["none", "none", "none", "all", own]) if alone else "none"
        self.single = self.single or choice != "none"
        return choice

    def lokr(self, base, alone):
        """LoKr."""
        # The Tucker form of a Conv1d can't be initialised there.
        tucker = base[0] == "conv" and base[1] == 2 and self.chance(0.5)
        return {
            "r": self.pick([1, 2, 3, 6]),
            "alpha": self.pick([1, 4, 8]),
            "decompose_both": self.chance(0.5),
            "decompose_factor": self.pick([-1, -1, 2, 4]),
            "use_effective_conv2d": tucker,
            "rank_dropout": self.pick([0.0, 0.3]),
            "module_dropout": self.pick([0.0, 0.3]),
            "rank_dropout_scale": self.chance(0.3),
            "init_weights": self.pick([True, "lycoris", False]),
            **self.patterns(base[0]),
        }

    def loha(self, base, alone):
        """LoHa."""
        return {
            "r": self.pick([1, 2, 3, 6]),
            "alpha": self.pick([1, 4, 8]),
            "use_effective_conv2d": base[0] == "conv" and self.chance(0.5),
            "rank_dropout": self.pick([0.0, 0.3]),
            "module_dropout": self.pick([0.0, 0.3]),
            "init_weights": self.chance(0.5),
            **self.patterns(base[0]),
        }

    def vblora(self, base, alone):
        """VB-LoRA."""
        vectors = self.pick([6, 16, 300])
        return {
            "r": self.pick([1, 2, 4]),
            "num_vectors": vectors,
            "vector_length": self.pick([2, 4]),
            "topk": self.pick([1, 2, 3]),
            "save_only_topk_weights": self.chance(0.4),
            "fan_in_fan_out": base[0] == "gpt2",
            "vblora_dropout": self.pick([0.0, 0.1]),
            "bias": self.bias("vblora_only", alone),
        }

    def poly(self, base, alone):
        """Poly."""
        return {
            "r": self.pick([1, 2, 4]),
            "n_tasks": self.tasks,
            "n_skills": self.pick([1, 2, 4]),
            "n_splits": self.pick([1, 2, 4]),
            "init_weights": self.chance(0.5),
        }

    def lora(self, base, alone):
        """LoRA."""
        dora = base[0] != "embedder" and self.chance(0.25)
        # A bias of the adapter needs one of the layer to be merged into.
        biased = not dora and base[0] == "bert" and self.chance(0.4)
        rows = [1, 5] if base[0] in EMBEDDINGS and alone and self.chance(0.3) else None
        self.single = self.single or rows is not None
        return {
            "r": self.pick([1, 2, 4]),
            "lora_alpha": self.pick([1, 4, 8]),
            "lora_dropout": self.pick([0.0, 0.1]),
            "use_rslora": self.chance(0.3),
            "use_dora": dora,
            "bias": self.bias("lora_only", alone),
            "fan_in_fan_out": base[0] == "gpt2",
            "init_lora_weights": self.pick([True, False] if biased else [True, False, "gaussian"]),
            "lora_bias": biased,
            "trainable_token_indices": rows,
            **self.patterns(base[0]),
        }


KINDS = {
    "LoHa": ["mlp", "conv", "conv", "llama", "bert", "t5"],
    "LoKr": ["mlp", "conv", "conv", "llama", "bert", "t5"],
    "VBLoRA": ["mlp", "llama", "gpt2", "gpt2", "bert", "t5"],
    "Poly": ["llama", "bert", "t5"],
    "Lora": ["mlp", "conv", "embedder", "llama", "gpt2", "bert", "t5"],
}
COUNTS = {"LoHa": 30, "LoKr": 40, "VBLoRA": 40, "Poly": 40, "Lora": 40}


# The second sample has the invocation twice, the others not at all. Of two active adapters the peer
# looks for one's invocation only, so both have the same.
ACTIVATED = {
    "id": "lora-activated",
    "config_class": "LoraConfig",
    "seed": 7,
    "base": ["llama", "ForCausalLM"],
    "adapters": {
        name: {
            "r": 2,
            "target_modules": ["q_proj", "down_proj"],
            "task_type": "CAUSAL_LM",
            "alora_invocation_tokens": [4],
        }
        for name in ("default", "other")
    },
    "file": "safetensors",
    "reader": "from_pretrained",
    "lora_rank": None,
    "task_ids": None,
}


ATTENTION = {
    **ACTIVATED,
    "id": "lora-attention",
    "base": ["attention"],
    "adapters": {"default": {"r": 2, "target_modules": ["mha", "head"], "bias": "lora_only"}},
}


# What is seen of options with many values wherever they stand, where of others it is seen on each
# kind of base.
NUMBERS = {
    *(
        "r",
        "alpha",
        "lora_alpha",
        "decompose_factor",
        "rank_dropout",
        "module_dropout",
        "rank_dropout_scale",
        "lora_dropout",
    ),
    *(
        "num_vectors",
        "vector_length",
        "topk",
        "vblora_dropout",
        "n_tasks",
        "n_skills",
        "n_splits",
        "bias",
    ),
}
MAPPINGS = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "exclude_modules",
    "layers_to_transform",
)


def shown(case):
    """What a case shows: each option's value, and each on a kind of base, way to write and to read."""
    method, (kind, *sizes) = case["config_class"], case["base"]
    facts = {(method, key, case[key]) for key in ("file", "reader", "lora_rank")}
    facts.add((method, case["reader"], len(case["adapters"])))
    facts |= {(method, kind, place, size) for place, size in enumerate(sizes) if kind != "mlp"} | {
        (method, kind)
    }
    for config in case["adapters"].values():
        for key, value in config.items():
            value = bool(value) if key in MAPPINGS else str(value)
            facts.add((method, key, value) if key in NUMBERS else (method, kind, key, value))
    return facts


def parameter_cases():
    """LoRA on the experts of mixtures, and on matrices. There all adapters of a model have the same
    `target_parameters`.
    """
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    patterns = {"rank_pattern": {"experts.gate_up_proj": 2}, "alpha_pattern": {"down_proj": 5}}
    adapters = {
        "mixtral": [{"r": 3, "lora_alpha": 5, **patterns}, {"r": 2, "use_rslora": True}],
        "qwen2_moe": [{"r": 4, "init_lora_weights": "gaussian"}],
        "gpt_oss": [{"r": 3, "target_modules": ["q_proj"]}],
        "deepseek_v3": [{"r": 2, "target_parameters": ["down_proj", "o_proj.weight"]}],
        "llama4": [{"r": 1}],
    }
    return [
        {
            "id": f"parameters-{kind}",
            "config_class": "LoraConfig",
            "seed": 5,
            "base": ["experts", kind],
            "adapters": {
                name: {"target_parameters": stacks, "target_modules": [], **config}
                for name, config in zip(("default", "other"), configs, strict=False)
            },
            "file": "safetensors",
            "reader": "from_pretrained",
            "lora_rank": None,
            "task_ids": None,
        }
        for kind, configs in adapters.items()
    ]


def make_cases(seed):
    """Of many random cases as few as show all that those do; the methods that can be are also
    written as LoRA adapters.
    """
    drawn = [
        Maker(method, index, seed).case()
        for method, count in COUNTS.items()
        for index in range(count)
    ]
    missing, kept = set().union(*map(shown, drawn)), []
    while missing:
        kept.append(max(drawn, key=lambda case: len(shown(case) & missing)))
        missing -= shown(kept[-1])
    fixed = [ACTIVATED, ATTENTION, *parameter_cases()]
    return sorted([*kept, *fixed], key=lambda case: case["id"])
