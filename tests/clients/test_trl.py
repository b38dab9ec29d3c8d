# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers with every method: what a user of them does, on tiny random models and a tokenizer
made on the spot.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from helpers.methods import METHODS
from torch.nn import functional as F

import peft
from peft import PeftModel, get_peft_model
from peft.tuners.poly import TaskCollator

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore:.*will be removed in v6")]
TARGETS = ["q_proj", "v_proj", "down_proj"]
WORDS = [
    *"abdefghijk",
    "what",
    "is",
    "the",
    "colour",
    "cat",
    "red",
    "blue",
    "big",
    "small",
    "good",
    "bad",
    "fine",
    "this",
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return request.param


def config_of(method, task_type="CAUSAL_LM", **more):
    """A method's config for clients that know nothing of tasks."""
    one_task = {"n_tasks": 1} if method == "POLY" else {}
    return METHODS[method].config(
        target_modules=TARGETS, task_type=task_type, **{**one_task, **more}
    )


def tokenizer(*more):
    names = ["<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>", *WORDS, *more]
    words = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
    }
    result = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    result.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", *more]})
    result.chat_template = TEMPLATE
    return result


def llama(kind=LlamaForCausalLM, **more):
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    torch.manual_seed(1)
    return kind(
        LlamaConfig(**sizes, **special, num_key_value_heads=2, max_position_embeddings=64, **more)
    )


def turn(role, content):
    return {"role": role, "content": content}


def chats(number=8, **columns):
    answers = ["red", "blue", "big", "small", "fine", "good", "bad", "this"]
    rows = [
        {
            "messages": [
                turn("user", "what is the colour"),
                turn("assistant", f"{answers[i % 8]} cat"),
            ]
        }
        for i in range(number)
    ]
    return datasets.Dataset.from_list(
        [{**row, **{k: v[i] for k, v in columns.items()}} for i, row in enumerate(rows)]
    )


def pairs(number=4, **columns):
    row = {
        "prompt": [turn("user", "what is the colour")],
        "chosen": [turn("assistant", "good red")],
        "rejected": [turn("assistant", "bad blue cat")],
    }
    return datasets.Dataset.from_list(
        [{**row, **{k: v[i] for k, v in columns.items()}} for i in range(number)]
    )


def arguments(kind, folder, **more):
    usual = {
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-2,
        "logging_steps": 1,
        "max_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
    }
    return kind(output_dir=str(folder), **{**usual, **more})


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(trainer, falls=True):
    """Train, and see that it is the adapter that was trained; the losses by step."""
    before = snapshot(trainer.model)
    trainable = {
        name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad
    }
    trainer.train()
    changed = {
        name
        for name, parameter in trainer.model.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    assert changed == trainable
    assert all(
        trainer.model.prefix in name or ".modules_to_save.default." in name for name in changed
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == trainer.args.max_steps
    assert not falls or losses[-1] < losses[0]
    return losses


def whole_batch(trainer):
    """All samples of a trainer's data set as one batch."""
    return trainer.data_collator(
        [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    )


@torch.no_grad()
def log_probabilities(model, batch, mask, **call):
    """The slow way: the sum of the log probabilities of each row's masked tokens."""
    logits = model.eval()(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **call
    ).logits.double()
    each = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (each * mask[:, 1:]).sum(-1)


def dpo_loss(policy, reference, batch, beta=0.1, **call):
    scores = log_probabilities(policy, batch, batch["completion_mask"], **call) - reference
    chosen, rejected = scores.chunk(2)
    return float(-F.logsigmoid(beta * (chosen - rejected)).mean())


# --- SFT
# ----------------------------------------------------------------------------------------------------------------
#
#


def test_sft_from_a_folder_to_a_folder(method, tmp_path):
    """A base on disk, trained under checkpointing, saved, and loaded by what was saved alone."""
    llama().save_pretrained(tmp_path / "base")
    runs = {}
    for checkpointing in (True, False):
        options = arguments(
            SFTConfig, tmp_path / "out", gradient_checkpointing=checkpointing, shuffle_dataset=False
        )
        trainer = SFTTrainer(
            str(tmp_path / "base"),
            options,
            train_dataset=chats(),
            processing_class=tokenizer(),
            peft_config=config_of(method),
        )
        batch = whole_batch(trainer)
        expected = (
            -log_probabilities(trainer.model, batch, batch["labels"] != -100).sum()
            / (batch["labels"][:, 1:] != -100).sum()
        )
        assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(
            float(expected), rel=1e-5
        )
        runs[checkpointing] = train(trainer)
        assert (
            any(
                getattr(module, "gradient_checkpointing", False)
                for module in trainer.model.modules()
            )
            is checkpointing
        )
    assert runs[True] == pytest.approx(runs[False], rel=1e-6)
    trainer.save_model(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert type(again).__name__ == "PeftModelForCausalLM"
    ids = torch.randint(4, 24, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(
            again(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits
        )


def test_sft_of_a_peft_model_is_that_of_its_config(method, tmp_path):
    losses = []
    for existing in (False, True):
        model, options = (
            llama(),
            arguments(
                SFTConfig, tmp_path, gradient_checkpointing_kwargs={"use_reentrant": existing}
            ),
        )
        own = {} if existing else {"peft_config": config_of(method)}
        model = get_peft_model(model, config_of(method)) if existing else model
        trainer = SFTTrainer(
            model, options, train_dataset=chats(), processing_class=tokenizer(), **own
        )
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(
                        torch.randn(
                            parameter.shape, generator=torch.Generator().manual_seed(len(name))
                        )
                        / 4
                    )
        losses.append(train(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_sft_refuses_adapters_on_the_head(method, tmp_path):
    config = config_of(method)
    config.target_modules = {"lm_head"}
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        SFTTrainer(
            llama(),
            arguments(SFTConfig, tmp_path),
            train_dataset=chats(),
            processing_class=tokenizer(),
            peft_config=config,
        )


def test_sft_with_tokens_from_another_chat_template(method, tmp_path):
    """TRL sets `trainable_token_indices` and `modules_to_save`: new rows of the embedding are
    trained, old ones are not.
    """
    tokenizer("<think>").save_pretrained(tmp_path / "tokenizer")
    llama().save_pretrained(tmp_path / "base")
    config, plain = config_of(method), tokenizer()
    trainer = SFTTrainer(
        str(tmp_path / "base"),
        arguments(
            SFTConfig,
            tmp_path / "out",
            chat_template_path=str(tmp_path / "tokenizer"),
            optim="adamw_torch",
        ),
        train_dataset=datasets.Dataset.from_list(
            [{"messages": [turn("user", "what"), turn("assistant", "<think> red")]}] * 8
        ),
        processing_class=plain,
        peft_config=config,
    )
    new = plain.convert_tokens_to_ids("<think>")
    assert new in config.trainable_token_indices["embed_tokens"]
    assert config.modules_to_save == ["lm_head"]
    embedding = trainer.model.get_input_embeddings()
    ids = torch.arange(len(plain))
    before = embedding(ids).detach().clone()
    trainer.train()
    moved = (embedding(ids) != before).any(-1).nonzero().flatten().tolist()
    assert new in moved
    assert set(moved) <= set(config.trainable_token_indices["embed_tokens"])
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        trainer.save_model(tmp_path / "adapter")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(len(plain))
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    used = torch.tensor([[4, 6, new, 7]])
    torch.testing.assert_close(
        again(input_ids=used).logits, trainer.model.eval()(input_ids=used).logits
    )


# --- DPO
# ----------------------------------------------------------------------------------------------------------------
#
#


def dpo_trainer(model, folder, **more):
    own = {name: more.pop(name) for name in ("peft_config", "ref_model") if name in more}
    options = arguments(DPOConfig, folder, **more)
    return DPOTrainer(
        model,
        args=options,
        train_dataset=pairs(),
        eval_dataset=pairs(),
        processing_class=tokenizer(),
        **own,
    )


def test_dpo_compares_with_the_base(method, tmp_path):
    """With `peft_config=` the reference is the base model, before training and after."""
    trainer = dpo_trainer(llama(), tmp_path, peft_config=config_of(method))
    assert list(trainer.model.peft_config) == ["default"]
    batch = whole_batch(trainer)
    reference = log_probabilities(llama(), batch, batch["completion_mask"])
    for _ in range(2):
        assert trainer.evaluate()["eval_loss"] == pytest.approx(
            dpo_loss(trainer.model, reference, batch), abs=1e-6
        )
        train(trainer)
    after = trainer.compute_ref_log_probs(trainer.model, batch)
    torch.testing.assert_close(torch.cat(after).double(), reference, rtol=1e-5, atol=1e-5)
    with trainer.model.disable_adapter():
        torch.testing.assert_close(
            trainer.model.eval()(batch["input_ids"]).logits,
            llama().eval()(batch["input_ids"]).logits,
        )


def test_dpo_with_precomputed_references(method, tmp_path):
    trainer = dpo_trainer(
        llama(), tmp_path, peft_config=config_of(method), precompute_ref_log_probs=True
    )
    batch = whole_batch(trainer)
    reference = log_probabilities(llama(), batch, batch["completion_mask"])
    given = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    torch.testing.assert_close(given.double(), reference, rtol=1e-5, atol=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        dpo_loss(trainer.model, reference, batch), abs=1e-6
    )
    train(trainer)


def of_existing(kind, model, folder, **more):
    """A trainer of a model that has an adapter."""
    options = {"gradient_checkpointing": False, **more}
    if kind == "dpo":
        return dpo_trainer(model, folder, **options)
    if kind == "kto":
        arguments_ = arguments(KTOConfig, folder, **options)
        return KTOTrainer(
            model, args=arguments_, train_dataset=answers(), processing_class=tokenizer()
        )
    make, config = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    options |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    prompts = datasets.Dataset.from_list([{"prompt": [turn("user", "what is the colour")]}] * 4)
    return make(
        model,
        reward,
        arguments(config, folder, **options),
        train_dataset=prompts,
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo", "rloo"])
def test_the_reference_of_a_peft_model_is_its_start(method, kind, tmp_path):
    """TRL adds an adapter "ref" for a copy of the trained one; log probabilities by hand in float64
    are those of a model that was loaded apart, before training and after.
    """
    model = get_peft_model(llama(), config_of(method))
    model.save_pretrained(tmp_path / "start")
    trainer = of_existing(kind, model, tmp_path, max_steps=2)
    assert list(model.peft_config) == ["default", "ref"]
    assert model.active_adapter == "default" and all(
        p.requires_grad for n, p in model.named_parameters() if n.endswith(".default")
    )
    start = PeftModel.from_pretrained(llama(), tmp_path / "start")
    ids = torch.randint(4, 24, (3, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = log_probabilities(start, batch, batch["attention_mask"])

    def reference(training):
        model.set_adapter("ref")
        model.eval = model.train if training else type(model).eval.__get__(model)
        result = log_probabilities(model, batch, batch["attention_mask"])
        model.set_adapter("default")
        del model.eval
        return result

    for training in (False, True):
        torch.testing.assert_close(reference(training), expected, rtol=1e-6, atol=1e-6)
    if kind == "dpo":
        assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, whole_batch(trainer))
        by_hand = log_probabilities(
            start, whole_batch(trainer), whole_batch(trainer)["completion_mask"]
        )
        torch.testing.assert_close(
            torch.cat([chosen, rejected]).double(), by_hand, rtol=1e-5, atol=1e-5
        )
    if kind in ("dpo", "kto"):
        train(trainer)
        torch.testing.assert_close(reference(True), expected, rtol=1e-6, atol=1e-6)
        trainer.save_model(tmp_path / "saved")
        saved = PeftModel.from_pretrained(llama(), tmp_path / "saved" / "ref")
        torch.testing.assert_close(
            log_probabilities(saved, batch, batch["attention_mask"]), expected, rtol=1e-6, atol=1e-6
        )


def test_references_of_a_peft_model_that_are_computed_at_once(method, tmp_path):
    model = get_peft_model(llama(), config_of(method))
    model.save_pretrained(tmp_path / "start")
    trainer = of_existing("dpo", model, tmp_path, precompute_ref_log_probs=True)
    batch = whole_batch(trainer)
    start = PeftModel.from_pretrained(llama(), tmp_path / "start")
    given = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]).double()
    torch.testing.assert_close(
        given, log_probabilities(start, batch, batch["completion_mask"]), rtol=1e-5, atol=1e-5
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_dpo_with_a_merged_reference(method, tmp_path):
    """The other documented way: the trained adapter merged, as `ref_model` or as a base for a new
    adapter.
    """
    trained = get_peft_model(llama(), config_of(method))
    trained.save_pretrained(tmp_path / "sft")
    merged = PeftModel.from_pretrained(llama(), tmp_path / "sft").merge_and_unload()
    trainer = dpo_trainer(trained, tmp_path, ref_model=merged, precompute_ref_log_probs=True)
    assert list(trained.peft_config) == ["default"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    train(trainer)
    merged = PeftModel.from_pretrained(llama(), tmp_path / "sft").merge_and_unload()
    trainer = dpo_trainer(copy.deepcopy(merged), tmp_path, peft_config=config_of(method))
    batch = whole_batch(trainer)
    expected = dpo_loss(
        trainer.model, log_probabilities(merged, batch, batch["completion_mask"]), batch
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-6)
    train(trainer)


# --- rewards, KTO, GRPO, RLOO
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [False, True])
def test_a_reward_model(method, existing, tmp_path):
    """The score head is trained beside the adapter, and comes back with it."""
    base, config = llama(LlamaForSequenceClassification, num_labels=1), config_of(method, "SEQ_CLS")
    own = {} if existing else {"peft_config": config}
    model = get_peft_model(copy.deepcopy(base), config) if existing else copy.deepcopy(base)
    trainer = RewardTrainer(
        model,
        args=arguments(RewardConfig, tmp_path),
        train_dataset=pairs(),
        eval_dataset=pairs(),
        processing_class=tokenizer(),
        **own,
    )
    batch = whole_batch(trainer)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        chosen, rejected = trainer.model.eval()(**inputs).logits.double().squeeze(-1).chunk(2)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        float(-F.logsigmoid(chosen - rejected).mean()), abs=1e-6
    )
    train(trainer)
    assert any(
        ".modules_to_save.default." in name
        for name, p in trainer.model.named_parameters()
        if p.requires_grad
    )
    trainer.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, trainer.model.eval()(**inputs).logits)


def answers(number=4, **columns):
    prompt = [turn("user", "what is the colour")]
    rows = [
        {"prompt": prompt, "completion": [turn("assistant", ["good red", "bad blue cat"][i % 2])]}
        for i in range(number)
    ]
    return datasets.Dataset.from_list(
        [
            {**row, "label": i % 2 == 0, **{k: v[i] for k, v in columns.items()}}
            for i, row in enumerate(rows)
        ]
    )


def reward(completions, **columns):
    return [
        float(len(completion[0]["content"].split()) + i % 2)
        for i, completion in enumerate(completions)
    ]


@pytest.mark.parametrize("kind", ["kto", "grpo", "rloo"])
def test_other_trainers(method, kind, tmp_path):
    """The reference is the base model, the adapter is trained, the rest stays as it is."""
    common = {"processing_class": tokenizer(), "peft_config": config_of(method)}
    if kind == "kto":
        trainer = KTOTrainer(
            llama(),
            args=arguments(KTOConfig, tmp_path, max_steps=2),
            train_dataset=answers(),
            **common,
        )
    else:
        make, options = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
        settings = {
            "num_generations": 2,
            "max_completion_length": 4,
            "beta": 0.1,
            "max_steps": 2,
            "learning_rate": 1.0,
        }
        prompts = datasets.Dataset.from_list([{"prompt": [turn("user", "what is the colour")]}] * 4)
        trainer = make(
            llama(),
            reward,
            arguments(options, tmp_path, **settings),
            train_dataset=prompts,
            **common,
        )
    train(trainer, falls=False)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert all(0 < norm < 1e3 for norm in norms)
    ids = torch.randint(4, 24, (2, 6))
    with trainer.model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(
            trainer.model.eval()(input_ids=ids).logits, llama().eval()(input_ids=ids).logits
        )


def test_merged_weights_go_to_a_server(method):
    """TRL's walk over the weights for vLLM: the base's names, merged values, whole modules from the
    adapter; then all is as before.
    """
    generation = pytest.importorskip("trl.generation.vllm_generation").VLLMGeneration
    from contextlib import nullcontext

    model = get_peft_model(llama(), config_of(method, modules_to_save=["lm_head"])).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.weight.add_(1)
    before = snapshot(model)
    sender = SimpleNamespace(
        model=model,
        _dist=SimpleNamespace(gather_params=lambda parameters: nullcontext(), is_fsdp=False),
    )
    sender._fix_param_name_to_vllm = lambda name, extra_prefixes=None: (
        generation._fix_param_name_to_vllm(sender, name, extra_prefixes)
    )
    sent = {name: tensor.clone() for name, tensor in generation._iter_named_params(sender)}
    server = llama()
    assert sent.keys() == dict(server.named_parameters()).keys()
    server.load_state_dict(sent)
    ids = torch.randint(4, 24, (2, 6))
    torch.testing.assert_close(
        server.eval()(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(
        server(input_ids=ids).logits, llama().eval()(input_ids=ids).logits, atol=1e-3
    )
    assert not model.merged_adapters
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


# --- tasks in Poly
# ------------------------------------------------------------------------------------------------------
#
#


NAMES = ["colours", "animals", "sizes"]


def poly_model(base, task_type="CAUSAL_LM"):
    """A base with a Poly adapter whose tasks differ."""
    config = METHODS["POLY"].config(
        target_modules=TARGETS, task_type=task_type, n_tasks=3, task_names=NAMES
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "poly_" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model


def logits_gradients(trainer):
    """Which tasks' rows of the routers were trained."""
    before = {
        n: p.detach().clone() for n, p in trainer.model.named_parameters() if "module_logits" in n
    }
    trainer.train()
    rows = torch.zeros(3, dtype=torch.bool)
    for name, parameter in trainer.model.named_parameters():
        if name in before:
            rows |= (parameter != before[name]).any(-1)
    return rows.tolist()


def test_sft_of_tasks(tmp_path):
    """Names in a column reach the routers; the loss is that of each sample with its own task; other
    tasks stay as they are.
    """
    tasks = ["colours", "sizes"] * 4
    options = arguments(SFTConfig, tmp_path, remove_unused_columns=False, shuffle_dataset=False)
    trainer = SFTTrainer(
        poly_model(llama()),
        options,
        train_dataset=chats(task_ids=tasks),
        processing_class=tokenizer(),
    )
    trainer.data_collator = TaskCollator(
        trainer.data_collator, trainer.model.peft_config["default"]
    )
    batch = whole_batch(trainer)
    assert batch["task_ids"].tolist() == [0, 2] * 4
    expected = [
        -log_probabilities(trainer.model, batch, batch["labels"] != -100, task_ids=ids).sum()
        / (batch["labels"][:, 1:] >= 0).sum()
        for ids in (batch["task_ids"], batch["task_ids"].flip(0))
    ]
    loss = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert loss == pytest.approx(float(expected[0]), rel=1e-5)
    assert loss != pytest.approx(float(expected[1]), rel=1e-5)
    assert logits_gradients(trainer) == [True, False, True]


@pytest.mark.parametrize("kind", ["dpo", "reward", "kto"])
def test_preferences_of_tasks(kind, tmp_path):
    """Chosen and rejected answers of a sample have its task, under checkpointing and for the
    reference too.
    """
    tasks = ["animals", "sizes"] * 2
    task_type = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    base = llama(LlamaForSequenceClassification, num_labels=1) if kind == "reward" else llama()
    model = poly_model(base, task_type)
    make, options = {
        "dpo": (DPOTrainer, DPOConfig),
        "reward": (RewardTrainer, RewardConfig),
        "kto": (KTOTrainer, KTOConfig),
    }[kind]
    data = answers(task_ids=tasks) if kind == "kto" else pairs(task_ids=tasks)
    trainer = make(
        model,
        args=arguments(options, tmp_path, remove_unused_columns=False, max_steps=2),
        train_dataset=data,
        processing_class=tokenizer(),
    )
    copies = 1 if kind == "kto" else 2
    trainer.data_collator = TaskCollator(
        trainer.data_collator, model.peft_config["default"], copies=copies
    )
    batch = whole_batch(trainer)
    assert batch["task_ids"].tolist() == [1, 2] * 2 * copies
    if kind == "dpo":
        assert len(batch["input_ids"]) == 8
        reference = torch.cat(trainer.compute_ref_log_probs(model.eval(), batch)).double()
        expected = log_probabilities(
            model, batch, batch["completion_mask"], task_ids=[1, 2, 1, 2, 1, 2, 1, 2]
        )
        torch.testing.assert_close(reference, expected, rtol=1e-5, atol=1e-5)
    assert logits_gradients(trainer) == [False, True, True]


def test_tasks_that_were_dropped_on_the_way(tmp_path):
    """Without the documented setting TRL drops the column: an error that says what to do, never
    another task.
    """
    for collate, message in (
        (False, "task_ids should not be None"),
        (True, "remove_unused_columns=False"),
    ):
        trainer = SFTTrainer(
            poly_model(llama()),
            arguments(SFTConfig, tmp_path),
            train_dataset=chats(task_ids=["sizes"] * 8),
            processing_class=tokenizer(),
        )
        if collate:
            trainer.data_collator = TaskCollator(
                trainer.data_collator, trainer.model.peft_config["default"]
            )
        with pytest.raises(ValueError, match=message):
            trainer.train()


def test_routing_by_input_needs_no_tasks(tmp_path):
    config = METHODS["POLY"].config(target_modules=TARGETS, task_type="CAUSAL_LM", poly_type="mope")
    trainer = SFTTrainer(
        llama(),
        arguments(SFTConfig, tmp_path),
        train_dataset=chats(),
        processing_class=tokenizer(),
        peft_config=config,
    )
    train(trainer)
    prompts = datasets.Dataset.from_list([{"prompt": [turn("user", "what is the colour")]}] * 4)
    options = arguments(
        GRPOConfig, tmp_path, num_generations=2, max_completion_length=4, max_steps=2
    )
    train(
        GRPOTrainer(
            llama(),
            reward,
            options,
            train_dataset=prompts,
            processing_class=tokenizer(),
            peft_config=config,
        ),
        falls=False,
    )


def test_tasks_with_precomputed_references(tmp_path):
    """TRL runs the reference while the trainer is made; the collator is given to it then."""
    model, tokens = poly_model(llama()), tokenizer()
    config = copy.deepcopy(model.peft_config["default"])
    trainer = DPOTrainer(
        llama(),
        args=arguments(
            DPOConfig, tmp_path, remove_unused_columns=False, precompute_ref_log_probs=True
        ),
        train_dataset=pairs(task_ids=["animals", "sizes"] * 2),
        processing_class=tokens,
        data_collator=TaskCollator(
            DataCollatorForPreference(pad_token_id=tokens.pad_token_id), config, copies=2
        ),
        peft_config=config,
    )
    batch = whole_batch(trainer)
    given = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]).double()
    torch.testing.assert_close(
        given, log_probabilities(llama(), batch, batch["completion_mask"]), rtol=1e-5, atol=1e-5
    )
    assert logits_gradients(trainer) == [False, True, True]
