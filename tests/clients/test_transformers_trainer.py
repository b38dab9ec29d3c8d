# SPDX-License-Identifier: Apache-2.0
"""transformers' `Trainer` and `Seq2SeqTrainer` with every method: what a user of them does, on tiny
random models.
"""

import copy
import inspect
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import llama, t5
from safetensors.torch import load_file
from torch.nn import functional as F

import peft
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PolyConfig,
    VBLoRAConfig,
    get_peft_model,
)
from peft.tuners.poly import TaskCollator

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import (  # noqa: E402
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore:.*will be removed in v6")]
LLAMA = ["q_proj", "v_proj", "down_proj"]
T5 = ["q", "v", "wo"]


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param]


def samples(method=None, number=8, tokens=6, **more):
    """A data set as a list; a Poly one has its tasks in a column."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(number):
        ids = torch.randint(3, 48, (tokens,), generator=generator).tolist()
        tasks = {"task_ids": i % 3} if method is not None and "task_ids" in method.call else {}
        rows.append(
            {"input_ids": ids, "attention_mask": [1] * tokens, "labels": ids, **tasks, **more}
        )
    return rows


def arguments(folder, kind=TrainingArguments, **more):
    usual = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_steps": 6,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return kind(output_dir=str(folder), **{**usual, **more})


def noisy_llama():
    """A base whose forward draws random numbers, so that their state matters."""
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    return model


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def without_noise(model):
    """Have `train` change nothing: what a Poly router draws in training is another for other
    batches.
    """
    model.eval().train = lambda mode=True: model


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert first
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0)


def tokenizer(side="right"):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *[f"w{i}" for i in range(45)]]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side=side,
    )


# Training


def test_training_is_the_textbook_loop(method, tmp_path):
    """AdamW, a linear schedule and clipped gradients, written out; a Poly router keeps to its means
    here.
    """
    model = get_peft_model(llama(), method.config(target_modules=LLAMA, task_type="CAUSAL_LM"))
    by_hand = copy.deepcopy(model).eval()
    data = samples(method, number=4)

    without_noise(model)
    trainer = Trainer(model, arguments(tmp_path, max_steps=5), train_dataset=data)
    trainer.train()
    batch = {name: torch.tensor([row[name] for row in data]) for name in data[0]}
    weights = [p for p in by_hand.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    expected = []
    for step in range(5):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * (1 - step / 5)
        logits = by_hand(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        expected.append(loss.item())
    assert losses(trainer) == pytest.approx(expected, abs=2e-4)
    for (name, parameter), other in zip(
        model.named_parameters(), by_hand.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, other, atol=2e-4, rtol=1e-3, msg=name)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("name", ["default", "other"])
def test_a_resumed_run_goes_on_as_if_never_stopped(method, name, tmp_path):
    base = noisy_llama()

    def trainer(folder, seed, **more):
        torch.manual_seed(seed)
        config = method.config(target_modules=LLAMA, task_type="CAUSAL_LM")
        model = get_peft_model(copy.deepcopy(base), config, adapter_name=name)
        return Trainer(
            model,
            arguments(
                tmp_path / folder,
                save_strategy="steps",
                save_steps=3,
                eval_strategy="steps",
                eval_steps=2,
                **more,
            ),
            train_dataset=samples(method, number=12),
            eval_dataset=samples(method, number=4),
        )

    whole = trainer("whole", seed=3)
    whole.train()
    again = trainer("again", seed=4)
    assert not torch.equal(
        next(iter(trained(whole.model).values())), next(iter(trained(again.model).values()))
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_equal(trained(whole.model), trained(again.model))
    assert losses(whole) == losses(again)
    for file in ("optimizer.pt", "scheduler.pt"):
        first, second = (
            torch.load(tmp_path / run / "checkpoint-6" / file) for run in ("whole", "again")
        )
        assert str(first) == str(second)
    assert again.model.active_adapters == [name]


def test_a_checkpoint_holds_the_adapter_alone(method, tmp_path):
    model = get_peft_model(llama(), method.config(target_modules=LLAMA, task_type="CAUSAL_LM"))
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1),
        train_dataset=samples(method),
    )
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "trainer_state.json",
    } <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("model*.safetensors"))
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == peft.get_peft_model_state_dict(model).keys()
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(llama(), folder)
    batch = {
        name: torch.tensor([row[name] for row in samples(method)]) for name in samples(method)[0]
    }
    torch.testing.assert_close(loaded(**batch).loss, model.eval()(**batch).loss)


def test_the_best_of_several_checkpoints_is_loaded(method, tmp_path):
    scores = iter([1.0, 3.0, 2.0])
    model = get_peft_model(llama(), method.config(target_modules=LLAMA, task_type="CAUSAL_LM"))
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            max_steps=3,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
        ),
        train_dataset=samples(method),
        eval_dataset=samples(method, number=4),
        compute_metrics=lambda prediction: {"score": next(scores)},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    last = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert_equal(best, peft.get_peft_model_state_dict(model))
    assert any(not torch.equal(best[key], last[key]) for key in best)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".default" in n)


def test_the_best_of_several_adapters_is_the_active_ones_own(method, tmp_path):
    """`Trainer` names the checkpoint's folder for whatever adapter is active; the values of this
    one are in a sub-folder.
    """
    scores = iter([3.0, 1.0])
    model = two_adapters(method)
    options = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 2,
    }
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "greater_is_better": True,
    }
    trainer = Trainer(
        model,
        arguments(tmp_path, **options, **best),
        train_dataset=samples(method),
        eval_dataset=samples(method, number=4),
        compute_metrics=lambda prediction: {"score": next(scores)},
    )
    waiting = peft.get_peft_model_state_dict(model)
    waiting = {name: tensor.clone() for name, tensor in waiting.items()}
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-1" / "other" / "adapter_model.safetensors")
    assert_equal(saved, peft.get_peft_model_state_dict(model, adapter_name="other"))
    assert_equal(waiting, peft.get_peft_model_state_dict(model))
    assert any(not torch.equal(saved[key], waiting[key]) for key in saved)


def two_adapters(method):
    torch.manual_seed(0)
    model = get_peft_model(
        noisy_llama(), method.config(target_modules=LLAMA, task_type="CAUSAL_LM")
    )
    model.add_adapter("other", method.config(target_modules=LLAMA, task_type="CAUSAL_LM"))
    model.set_adapter("other")
    return model


def test_several_adapters_are_resumed_each_into_its_own(method, tmp_path):
    def trainer(folder, model):
        options = arguments(tmp_path / folder, save_strategy="steps", save_steps=2, max_steps=4)
        return Trainer(model, options, train_dataset=samples(method))

    whole = trainer("whole", two_adapters(method))
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-2" / "other" / "adapter_model.safetensors").exists()
    model = two_adapters(method)
    with torch.no_grad():
        [p.normal_() for n, p in model.named_parameters() if ".default" in n or ".other" in n]
    again = trainer("again", model)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.model.active_adapters == ["other"]
    for name in ("default", "other"):
        states = [
            peft.get_peft_model_state_dict(run.model, adapter_name=name) for run in (whole, again)
        ]
        assert_equal(*states)
    assert_equal(trained(whole.model), trained(again.model))


# Options of training


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(method, reentrant, tmp_path):
    curves = []
    for on in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(
            noisy_llama(), method.config(target_modules=LLAMA, task_type="CAUSAL_LM")
        )
        options = arguments(
            tmp_path / str(on),
            max_steps=4,
            gradient_checkpointing=on,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        trainer = Trainer(model, options, train_dataset=samples(method))
        trainer.train()
        curves.append(losses(trainer))
        assert model.get_base_model().is_gradient_checkpointing == on
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_accumulated_gradients_are_those_of_the_whole_batch(method, tmp_path):
    results = []
    for size in (4, 1):
        torch.manual_seed(0)
        model = get_peft_model(llama(), method.config(target_modules=LLAMA, task_type="CAUSAL_LM"))
        without_noise(model)
        options = arguments(
            tmp_path / str(size),
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
        )
        trainer = Trainer(model, options, train_dataset=samples(method))
        trainer.train()
        results.append((losses(trainer), trained(model)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-3)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], tensor, atol=1e-3, rtol=1e-2)


def test_bfloat16_autocast_keeps_adapters_in_float32(method, tmp_path):
    curves = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(llama(), method.config(target_modules=LLAMA, task_type="CAUSAL_LM"))
        trainer = Trainer(
            model, arguments(tmp_path / str(bf16), bf16=bf16), train_dataset=samples(method)
        )
        before = trained(model)
        trainer.train()
        after = trained(model)
        assert {tensor.dtype for tensor in after.values()} == {torch.float32}
        assert all(not torch.equal(before[name], after[name]) for name in before)
        curves.append(losses(trainer))
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], rel=0.02)


def test_label_smoothing_and_neftune(method, tmp_path):
    model = get_peft_model(llama(), method.config(target_modules=LLAMA, task_type="CAUSAL_LM"))
    data = samples(method, number=4)
    options = arguments(tmp_path, max_steps=1, label_smoothing_factor=0.1, neftune_noise_alpha=5.0)
    trainer = Trainer(model, options, train_dataset=data)
    batch = {name: torch.tensor([row[name] for row in data]) for name in data[0]}
    model.eval()
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    scores = -logits.log_softmax(-1)
    truth = scores.gather(-1, batch["labels"][:, 1:, None])
    expected = 0.9 * truth.mean() + 0.1 * scores.mean()
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)
    seen = []
    embedding = model.get_base_model().get_input_embeddings()
    handle = embedding.register_forward_hook(
        lambda module, args, output: seen.append(output.detach().clone())
    )
    trainer.train()
    handle.remove()
    assert all(
        not torch.equal(output, embedding(batch["input_ids"])) for output in seen
    )  # the noise came before this hook
    assert not embedding._forward_hooks
    assert not hasattr(embedding, "neftune_noise_alpha")


class Counting(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.counted = model.get_nb_trainable_parameters()
        self.configs = json.loads(
            json.dumps({k: v.to_dict() for k, v in model.peft_config.items()}, default=str)
        )


def test_callbacks_count_parameters_and_read_configs(method, tmp_path):
    model = get_peft_model(llama(), method.config(target_modules=LLAMA, task_type="CAUSAL_LM"))
    counting = Counting()
    Trainer(
        model, arguments(tmp_path, max_steps=1), train_dataset=samples(method), callbacks=[counting]
    ).train()
    own = sum(p.numel() for n, p in model.named_parameters() if model.prefix in n)
    base = sum(p.numel() for p in llama().parameters())
    assert counting.counted == (own, own + base)
    assert counting.configs["default"]["peft_type"] == model.peft_type.value


def test_the_model_card_and_what_is_pushed(method, tmp_path, monkeypatch):
    class Hub:
        uploads = []

        def create_repo(self, repo_id, **options):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path, **options):
            self.uploads.append({path.name for path in Path(folder_path).iterdir()})

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    base = llama()
    base.config._name_or_path = base.name_or_path = "someone/base"
    base.add_model_tags(["of-the-base"])
    model = get_peft_model(base, method.config(target_modules=LLAMA, task_type="CAUSAL_LM"))
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=1, hub_model_id="someone/something"),
        train_dataset=samples(method),
    )
    trainer.train()
    trainer.push_to_hub()
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= Hub.uploads[0]
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card
    assert "base_model: someone/base" in card
    assert "pipeline_tag: text-generation" in card
    for tag in (
        "of-the-base",
        "base_model:adapter:someone/base",
        "transformers",
        model.peft_type.value.lower(),
    ):
        assert f"- {tag}\n" in card


# Generation during evaluation


def translation(method, number=4):
    generator = torch.Generator().manual_seed(2)
    rows = []
    for i in range(number):
        length = 3 + i % 3
        ids = torch.randint(3, 48, (length,), generator=generator).tolist()
        tasks = {"task_ids": i % 3} if "task_ids" in method.call else {}
        rows.append(
            {"input_ids": ids, "attention_mask": [1] * length, "labels": ids[::-1], **tasks}
        )
    return rows


@pytest.mark.parametrize("beams", [1, 3])
def test_predictions_are_generated(method, beams, tmp_path):
    model = get_peft_model(t5(), method.config(target_modules=T5, task_type="SEQ_2_SEQ_LM"))
    data = translation(method)
    trainer = Seq2SeqTrainer(
        model,
        arguments(
            tmp_path,
            Seq2SeqTrainingArguments,
            max_steps=2,
            predict_with_generate=True,
            generation_max_length=6,
            generation_num_beams=beams,
            eval_strategy="steps",
            eval_steps=1,
        ),
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer(), model=model),
        processing_class=tokenizer(),
        compute_metrics=lambda prediction: {"rows": float(len(prediction.predictions))},
    )
    trainer.train()
    assert [entry["eval_rows"] for entry in trainer.state.log_history if "eval_rows" in entry] == [
        4.0,
        4.0,
    ]
    predictions = trainer.predict(data).predictions
    model.eval()
    for row, predicted in zip(data, predictions, strict=True):
        own = {name: torch.tensor([row[name]]) for name in row if name != "labels"}
        expected = model.generate(**own, max_length=6, num_beams=beams)
        assert torch.tensor(predicted)[: expected.shape[1]].tolist() == expected[0].tolist()


# Poly: tasks as a column of the data set

NAMES = ["copy", "reverse", "sort"]


def poly(base, task_type="CAUSAL_LM", targets=LLAMA, **more):
    fields = {
        "r": 2,
        "n_tasks": 3,
        "n_skills": 2,
        "init_weights": False,
        "task_names": NAMES,
        **more,
    }
    return get_peft_model(base, PolyConfig(target_modules=targets, task_type=task_type, **fields))


def apart(model):
    """Have every task mix skills in its own way, and skills matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "poly_" in name:
                parameter.normal_()
    return model


def loss_by_hand(model, rows):
    """The mean of each sample's loss, run by itself with its task."""
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            logits = model(input_ids=ids, task_ids=row["task_ids"]).logits
            total += F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
            tokens += ids.shape[1] - 1
    return total / tokens


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("native", [False, True])
def test_a_data_set_with_a_column_of_tasks_is_all_it_takes(named, native, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = samples(METHODS["POLY"], number=9)
    for row in rows:
        row["comment"] = "not for the model"
        row["task_ids"] = NAMES[row["task_ids"]] if named else row["task_ids"]
    data = datasets.Dataset.from_list(rows)
    if native:
        model = llama()
        model.add_adapter(
            PolyConfig(
                r=2,
                n_tasks=3,
                n_skills=2,
                init_weights=False,
                task_names=NAMES,
                target_modules=LLAMA,
            )
        )
    else:
        model = poly(llama())
    apart(model)
    config = model.peft_config["default"]
    options = arguments(
        tmp_path, per_device_train_batch_size=3, per_device_eval_batch_size=2, max_steps=3
    )
    collator = TaskCollator(transformers.default_data_collator, config) if named else None
    trainer = Trainer(model, options, train_dataset=data, eval_dataset=data, data_collator=collator)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_by_hand(model, rows), abs=1e-4)
    others = [{**row, "task_ids": (i + 1) % 3} for i, row in enumerate(rows)]
    assert loss_by_hand(model, others) != pytest.approx(loss_by_hand(model, rows), abs=1e-3)


@pytest.mark.parametrize("kind", ["padding", "seq2seq", "language modelling", "default"])
def test_collators_carry_a_column_of_numbers(kind, tmp_path):
    pad = tokenizer()
    collator = {
        "padding": lambda: DataCollatorWithPadding(pad),
        "seq2seq": lambda: DataCollatorForSeq2Seq(pad),
        "language modelling": lambda: DataCollatorForLanguageModeling(pad, mlm=False),
        "default": lambda: transformers.default_data_collator,
    }[kind]()
    rows = [
        {"input_ids": [5] * 3, "task_ids": 2},
        {"input_ids": [6] * (3 if kind == "default" else 5), "task_ids": 0},
    ]
    if kind == "seq2seq":
        rows = [{**row, "labels": row["input_ids"]} for row in rows]
    batch = collator([dict(row) for row in rows])
    assert batch["task_ids"].tolist() == [2, 0]
    assert batch["task_ids"].dtype == torch.long
    named = [{**row, "task_ids": NAMES[row["task_ids"]]} for row in rows]
    batch = TaskCollator(collator, PolyConfig(n_tasks=3, task_names=NAMES))(
        [dict(row) for row in named]
    )
    assert batch["task_ids"].tolist() == [2, 0]
    assert batch["input_ids"].shape[0] == 2


BAD_TASKS = [
    (["copy", "unknown"], ValueError, r"Unknown task names \['unknown'\]"),
    ([0, 3], ValueError, "Only 3 tasks available. Found task id = 3"),
    ([0, None], ValueError, r"Samples \[1\] of a batch have no `task_ids`"),
    ([0, 1.5], TypeError, "must be integers"),
]


@pytest.mark.parametrize(
    ("tasks", "error", "message"), BAD_TASKS, ids=lambda value: str(value)[:20]
)
def test_a_collator_refuses_bad_tasks(tasks, error, message):
    collator = TaskCollator(
        transformers.default_data_collator, PolyConfig(n_tasks=3, task_names=NAMES)
    )
    with pytest.raises(error, match=message):
        collator([{"input_ids": [1], "task_ids": task} for task in tasks])
    with pytest.raises(ValueError, match="have no `task_ids`"):
        collator([{"input_ids": [1]}])


def test_a_data_set_without_tasks_is_an_error_and_with_one_task_is_fine(tmp_path):
    trainer = Trainer(poly(llama()), arguments(tmp_path), train_dataset=samples())
    with pytest.raises(ValueError, match="task_ids should not be None: the adapter has 3 tasks"):
        trainer.train()
    Trainer(
        poly(llama(), n_tasks=1, task_names=None), arguments(tmp_path), train_dataset=samples()
    ).train()


def test_metrics_by_task(tmp_path):
    """`label_names` has evaluation gather the tasks beside the labels."""

    def by_task(prediction):
        labels, tasks = prediction.label_ids
        logits = torch.tensor(prediction.predictions)[:, :-1].transpose(1, 2)
        each = F.cross_entropy(logits, torch.tensor(labels)[:, 1:], reduction="none").mean(1)
        return {
            f"loss_{NAMES[task]}": each[torch.tensor(tasks) == task].mean().item()
            for task in range(3)
        }

    rows = samples(METHODS["POLY"], number=9)
    model = poly(llama())
    options = arguments(tmp_path, label_names=["labels", "task_ids"], per_device_eval_batch_size=2)
    metrics = Trainer(model, options, eval_dataset=rows, compute_metrics=by_task).evaluate()
    for task, name in enumerate(NAMES):
        expected = loss_by_hand(model, [row for row in rows if row["task_ids"] == task])
        assert metrics[f"eval_loss_{name}"] == pytest.approx(expected, abs=1e-4)


def test_signatures_come_and_go_with_the_adapter():
    base = llama()
    plain = inspect.signature(base.forward)
    model = apart(poly(base))
    for copied in (
        base,
        copy.deepcopy(model).get_base_model(),
        pickle.loads(pickle.dumps(model)).get_base_model(),
    ):
        parameters = inspect.signature(copied.forward).parameters
        assert [name for name in parameters if name not in plain.parameters] == [
            "task_ids",
            "routing_mask",
        ]
        ids = torch.randint(3, 48, (2, 4))
        expected = model(input_ids=ids, task_ids=[0, 2]).logits
        assert torch.equal(copied(input_ids=ids, task_ids=[0, 2]).logits, expected)
        assert not torch.equal(copied(input_ids=ids, task_ids=[1, 2]).logits, expected)
    assert model.unload() is base
    assert inspect.signature(base.forward) == plain
    assert "forward" not in vars(base) and "generate" not in vars(base)
    torch.manual_seed(0)
    assert torch.equal(base(input_ids=ids).logits, llama()(input_ids=ids).logits)


def test_a_config_is_made_of_a_command_line():
    """Of Hugging Face PEFT's configs only Poly's makes options too."""
    parser = HfArgumentParser(PolyConfig)
    assert parser.parse_args_into_dataclasses([])[0] == PolyConfig()
    line = (
        "--r 2 --n_tasks 2 --task_names sum max --target_modules .*proj --no_relaxed_bernoulli "
        "--router_granularity block --alpha 3 --trainable_token_indices 5 7 --eval_top_k 1"
    )
    assert parser.parse_args_into_dataclasses(line.split())[0] == PolyConfig(
        r=2,
        n_tasks=2,
        task_names=["sum", "max"],
        target_modules=".*proj",
        relaxed_bernoulli=False,
        router_granularity="block",
        alpha=3.0,
        trainable_token_indices=[5, 7],
        eval_top_k=1,
    )
    fields = {"n_tasks": 2, "trainable_token_indices": {"embed": [3]}, "rank_pattern": {"v": 4}}
    assert parser.parse_dict(fields)[0] == PolyConfig(**fields)
    assert "--routing {learned,fixed}" in parser.format_help()
    chosen = {"r": 2, "layers_to_transform": [0, 1], "trainable_token_indices": [5]}
    line = "--r 2 --layers_to_transform 0 1 --layers_pattern h --trainable_token_indices 5"
    for kind in (LoHaConfig, LoKrConfig, LoraConfig, VBLoRAConfig):
        parser = HfArgumentParser(kind)
        assert parser.parse_args_into_dataclasses([])[0] == kind()
        found = parser.parse_args_into_dataclasses(line.split())[0]
        assert found == kind(layers_pattern="h", **chosen)
        assert "--layers_to_transform" in parser.format_help()
    found = HfArgumentParser(LoKrConfig).parse_args_into_dataclasses(["--init_weights", "lycoris"])
    assert found[0] == LoKrConfig(init_weights="lycoris")
    off = HfArgumentParser(LoKrConfig).parse_args_into_dataclasses(["--init_weights", "False"])
    assert off[0] == LoKrConfig(init_weights=False)
