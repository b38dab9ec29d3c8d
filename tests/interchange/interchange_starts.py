# SPDX-License-Identifier: Apache-2.0
"""Starts of LoRA from data, made with whichever `peft` the process finds: the first factors, a file
of the adapter after some training, and what the adapter does. Nothing is drawn in between.
"""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from interchange_bases import BATCH, make_base, make_inputs

import peft
from peft.tuners.lora.config import CordaConfig

# The peer takes a decorator of its own class from a library that it does not require.
sys.modules.setdefault("attr", SimpleNamespace(dataclass=dataclasses.dataclass))
from peft.tuners.lora.corda import preprocess_corda  # noqa: E402

BASES = {
    "corda ipm": ["mlp", 12, 20],
    "corda kpm": ["gpt2", "LMHeadModel"],
    "lora_ga": ["mlp", 12, 20],
    "eva": ["llama", "ForCausalLM"],
    "eva without spreading": ["llama", "ForCausalLM"],
}
# Options for layers that share weights.
SHARED = {
    "tied adapter": {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
    "tied copy": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "replicated": {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 3]]},
}
TARGETS = {
    "mlp": ["first", "second"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "down_proj"],
}


def batches(spec, count=6):
    """Batches of data, as arguments of the model."""
    result = []
    for seed in range(count):
        args, kwargs = make_inputs(spec, 10 + seed)
        if kwargs:
            kwargs["labels"] = kwargs["input_ids"].clone()
            kwargs["labels"][:, :1] = -100
            kwargs["attention_mask"][0, 3:] = 0
        result.append((args, kwargs))
    return result


def config_of(name):
    """The config of a case."""
    how = name.split()[0]
    own = {
        "corda": lambda: {"corda_config": CordaConfig(corda_method=name.split()[-1])},
        "lora_ga": lambda: {"lora_ga_config": peft.LoraGAConfig(direction="A2rBr")},
        "eva": lambda: {"eva_config": peft.EvaConfig(rho=1.0 if "without" in name else 2.0)},
    }[how]()
    kind = BASES[name][0]
    return peft.LoraConfig(
        r=3,
        lora_alpha=5,
        rank_pattern={"first": 2} if kind == "mlp" else {},
        target_modules=TARGETS[kind],
        fan_in_fan_out=kind == "gpt2",
        init_lora_weights=how,
        **own,
    )


def base_of(name):
    """The base model, whose layers see much more of some directions than of others."""
    base = make_base(BASES[name], 3)
    with torch.no_grad():
        for module in base.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.mul_(1.5 ** torch.arange(module.weight.shape[1]))
    return base


def started(name, cache=None):
    """A model whose adapter has just started."""
    config, base, data = config_of(name), base_of(name), batches(BASES[name])

    def run():
        for args, kwargs in data:
            for i in range(BATCH):  # the peer's CorDA takes one sample at a time
                one = {name: value[i : i + 1] for name, value in kwargs.items()}
                base(*(arg[i : i + 1] for arg in args), **one)

    def step():
        for args, kwargs in data:
            (base(*args, **kwargs) ** 2).sum().backward()

    if name.startswith("corda"):
        if cache is not None:
            config.corda_config.covariance_file = str(cache)
        preprocess_corda(base, config, run_model=run)
    if name == "lora_ga":
        peft.preprocess_loraga(base, config, step)
    model = peft.get_peft_model(base, config).eval()
    if name.startswith("eva"):
        peft.initialize_lora_eva_weights(
            model, [kwargs for _, kwargs in data], show_progress_bar=False
        )
    return model


def factors(model):
    """Each layer's `A` and `s·B`, with the signs of their directions made the same."""
    result = {}
    for path, layer in model.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            A = layer.lora_A["default"].weight.detach().double()
            B = layer.lora_B["default"].weight.detach().double() * layer.scaling["default"]
            result[path] = {"A": A.abs(), "B": B.abs(), "rank": torch.tensor(len(A))}
    return result


def output(model, name):
    """The model's output on its first batch."""
    args, kwargs = make_inputs(BASES[name], 10)
    with torch.no_grad():
        result = model(*args, **kwargs)
    return result if isinstance(result, torch.Tensor) else result.logits


def start(folder, result):
    """Start, train a little and save an adapter of each case."""
    found = {}
    for name in BASES:
        place = Path(folder) / name
        place.mkdir(parents=True)
        model = started(name, place / "covariance.pt" if name == "corda ipm" else None)
        found[name] = {"factors": factors(model), "first": output(model, name)}
        config = model.peft_config["default"]
        config.init_lora_weights, how = True, config.init_lora_weights
        model.save_pretrained(place / "first")
        config.init_lora_weights = how
        with torch.no_grad():
            for path, layer in model.named_modules():
                if hasattr(layer, "lora_A") and "default" in layer.lora_A:
                    B = layer.lora_B["default"].weight
                    B += torch.linspace(-1, 1, B.numel()).view(B.shape) * (0.1 + len(path) / 100)
        found[name]["trained"] = output(model, name)
        model.save_pretrained(place / "plain")
        if how != "eva":
            options = {"path_initial_model_for_weight_conversion": str(place / "first")}
            model.save_pretrained(place / "converted", **options)
    for name, options in SHARED.items():
        model = peft.get_peft_model(shared_base(), peft.LoraConfig(r=3, **options)).eval()
        with torch.no_grad():  # a tied head has the embedding's parameters
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and "lm_head" not in key:
                    numbers = torch.linspace(-0.5, 0.6, parameter.numel()) * (1 + len(key) % 7)
                    parameter.copy_(numbers.sin().view(parameter.shape))
        found[name] = output(model, "eva")
        model.save_pretrained(Path(folder) / name)
    torch.save(found, result)


def shared_base():
    """A model whose output head has the weight of its embedding."""
    base = make_base(BASES["eva"], 3)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    return base


def read_starts(folder, kind, result):
    """Load the adapters that the other package saved; covariances too."""
    found = {}
    for name in BASES:
        place = Path(folder) / name / ("plain" if name.startswith("eva") else kind)
        model = peft.PeftModel.from_pretrained(base_of(name), place)
        found[name] = output(model.eval(), name)
    for name in SHARED:
        model = peft.PeftModel.from_pretrained(shared_base(), Path(folder) / name)
        found[name] = output(model.eval(), "eva")
    again = started("corda ipm", Path(folder) / "corda ipm" / "covariance.pt")
    found["from covariance"] = factors(again)
    torch.save(found, result)
