# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers with every method: embedders and cross-encoders that get, train, save and
load adapters.
"""

import copy

import pytest
import torch
from helpers.methods import METHODS

from peft import PeftModel, PolyConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.poly import TaskCollator

pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
import transformers  # noqa: E402
from sentence_transformers import (  # noqa: E402
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss  # noqa: E402
from sentence_transformers.losses import CosineSimilarityLoss, MultipleNegativesRankingLoss  # noqa: E402

pytestmark = pytest.mark.clients
TEXTS = ["w1 w2 w3", "w7 w30 w2 w9 w11", "w4"]
TARGETS = ["query", "value"]


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *[f"w{i}" for i in range(45)]]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def bert(kind, folder, **more):
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=48,
        pad_token_id=0,
        **more,
    )
    model = kind(config)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


@pytest.fixture
def base(tmp_path):
    bert(transformers.BertModel, tmp_path / "base")
    return str(tmp_path / "base")


def embedder(folder):
    """A mean of token embeddings, as sentence-transformers makes it of a model's folder."""
    return SentenceTransformer(folder, device="cpu")


def one_task(method):
    """These clients pass no tasks by themselves: with one, none are needed."""
    return method.config(
        target_modules=TARGETS, **({"n_tasks": 1} if "task_ids" in method.call else {})
    )


def shuffle(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default" in name:
                parameter.normal_()


def encode(model, texts=TEXTS, **more):
    return model.encode(texts, convert_to_tensor=True, **more)


def by_hand(model, texts=TEXTS, **call):
    """The mean of a transformer's last hidden states, text by text."""
    means = []
    with torch.no_grad():
        for text in texts:
            states = model(**tokenizer()(text, return_tensors="pt"), **call).last_hidden_state
            means.append(states[0].mean(0))
    return torch.stack(means)


def test_adding_switching_and_deleting(method, base, tmp_path):
    model = embedder(base)
    without = encode(model)
    model.add_adapter(one_task(method))
    shuffle(model)
    adapted = encode(model)
    assert (adapted - without).abs().max() > 1e-2
    assert model.active_adapters() == ["default"]
    peft_model = get_peft_model(transformers.BertModel.from_pretrained(base), one_task(method))
    peft_state = {
        f"base_model.model.{name}": tensor
        for name, tensor in model.get_adapter_state_dict().items()
    }
    assert not set_peft_model_state_dict(peft_model, peft_state).missing_keys
    torch.testing.assert_close(by_hand(peft_model.eval()), adapted)
    peft_model.save_pretrained(tmp_path / "adapter")
    other = embedder(base)
    other.load_adapter(str(tmp_path / "adapter"), "mine")
    torch.testing.assert_close(encode(other), adapted)
    model.disable_adapters()
    torch.testing.assert_close(encode(model), without)
    model.enable_adapters()
    torch.testing.assert_close(encode(model), adapted)
    model.add_adapter(one_task(method), "b")
    assert model.active_adapters() == ["b"]
    model.set_adapter("default")
    torch.testing.assert_close(encode(model), adapted)
    model.delete_adapter(["default", "b"])
    torch.testing.assert_close(encode(model), without)


def test_an_adapters_folder_is_a_model(method, base, tmp_path):
    peft_model = get_peft_model(
        transformers.BertModel.from_pretrained(base), one_task(method)
    ).eval()
    shuffle(peft_model)
    peft_model.save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(encode(embedder(str(tmp_path / "adapter"))), by_hand(peft_model))


def arguments(kind, folder, **more):
    usual = {
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "learning_rate": 0.05,
        "report_to": [],
        "disable_tqdm": True,
    }
    return kind(
        output_dir=str(folder),
        use_cpu=True,
        logging_steps=1,
        **{**usual, "save_strategy": "no", **more},
    )


PAIRS = {
    "anchor": [f"w{i} w{i + 1}" for i in range(9)],
    "positive": [f"w{20 + i} w{10 + i} w3" for i in range(9)],
}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_training_saving_and_loading(method, base, tmp_path):
    model = embedder(base)
    model.add_adapter(one_task(method))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = SentenceTransformerTrainer(
        model,
        arguments(
            SentenceTransformerTrainingArguments,
            tmp_path / "run",
            save_strategy="steps",
            save_steps=2,
        ),
        train_dataset=datasets.Dataset.from_dict(PAIRS),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) == (".default" not in name), name
    model.save_pretrained(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-4"):
        assert (folder / "adapter_model.safetensors").exists()
        assert not (folder / "model.safetensors").exists()
        torch.testing.assert_close(encode(embedder(str(folder))), encode(model))
    loaded = PeftModel.from_pretrained(
        transformers.BertModel.from_pretrained(base), tmp_path / "saved"
    )
    torch.testing.assert_close(by_hand(loaded), encode(model))


@pytest.mark.parametrize("head", [False, True])
def test_a_cross_encoder(method, head, tmp_path):
    bert(transformers.BertForSequenceClassification, tmp_path / "base", num_labels=1)
    model = CrossEncoder(str(tmp_path / "base"), device="cpu")
    config = one_task(method)
    config.modules_to_save = ["classifier"] if head else None
    model.add_adapter(config)
    pairs = list(zip(PAIRS["anchor"], PAIRS["positive"], strict=True))
    before = model.predict(pairs, convert_to_tensor=True)
    data = datasets.Dataset.from_dict({**PAIRS, "label": [float(i % 2) for i in range(9)]})
    trainer = CrossEncoderTrainer(
        model,
        arguments(CrossEncoderTrainingArguments, tmp_path / "run"),
        train_dataset=data,
        loss=BinaryCrossEntropyLoss(model),
    )
    trainer.train()
    assert all(0 < loss < 5 for loss in losses(trainer))
    after = model.predict(pairs, convert_to_tensor=True)
    assert not torch.allclose(before, after)
    model.save_pretrained(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    loaded = CrossEncoder(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(loaded.predict(pairs, convert_to_tensor=True), after)


# Poly with several tasks


def poly(base):
    model = embedder(base)
    config = PolyConfig(
        r=2, n_tasks=3, task_names=["a", "b", "c"], init_weights=False, target_modules=TARGETS
    )
    model.add_adapter(config)
    shuffle(model)
    model[0].forward_kwargs = {"task_ids"}  # has `encode` hand them on
    return model, config


def test_encoding_by_task(base):
    model, _ = poly(base)
    with pytest.raises(ValueError, match="task_ids should not be None"):
        encode(model)
    own = {task: by_hand(model.transformers_model, task_ids=task) for task in range(3)}
    for task, name in enumerate("abc"):
        torch.testing.assert_close(encode(model, task_ids=task), own[task])
        torch.testing.assert_close(encode(model, task_ids=name), own[task])
    assert (own[0] - own[1]).abs().max() > 1e-2


def test_training_by_task(base, tmp_path):
    """Each pair has its own task; the first loss is that of the pairs run one by one."""
    model, config = poly(base)
    rows = {
        **{name: column[:4] for name, column in PAIRS.items()},
        "label": [0.0, 1.0, 0.5, 1.0],
        "task_ids": ["c", "a", "a", "b"],
    }
    plain = copy.deepcopy(model.transformers_model).eval()
    pairs = zip(rows["anchor"], rows["positive"], rows["task_ids"], rows["label"], strict=True)
    errors = []
    for anchor, positive, task, label in pairs:
        first, second = by_hand(plain, [anchor, positive], task_ids=task)
        errors.append((torch.cosine_similarity(first, second, dim=0) - label) ** 2)
    trainer = SentenceTransformerTrainer(
        model,
        arguments(
            SentenceTransformerTrainingArguments,
            tmp_path,
            per_device_train_batch_size=4,
            max_steps=2,
        ),
        train_dataset=datasets.Dataset.from_dict(rows),
        loss=CosineSimilarityLoss(model),
    )
    trainer.data_collator = TaskCollator(trainer.data_collator, config)
    model.eval().train = lambda mode=True: model  # no noise in the routers
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(torch.stack(errors).mean().item(), abs=1e-4)
