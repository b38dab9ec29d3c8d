# SPDX-License-Identifier: Apache-2.0
"""transformers' pipelines over a `PeftModel`, over an adapter's folder, and over a model of its own
class with an adapter.
"""

import copy

import pytest
import torch
from helpers.methods import METHODS

from peft import PolyConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

pytestmark = pytest.mark.clients
TEXTS = ["w1 w2 w3", "w7 w30 w2 w9 w11"]


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param]


def tokenizer(task="text-generation"):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *[f"w{i}" for i in range(45)]]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left" if task == "text-generation" else "right",
        model_input_names=["input_ids", "attention_mask"],
    )


def bert_config(**more):
    return BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=48,
        pad_token_id=0,
        **more,
    )


def llama():
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 48,
    }
    return LlamaForCausalLM(LlamaConfig(bos_token_id=1, eos_token_id=None, pad_token_id=0, **sizes))


KINDS = {
    "text-generation": (llama, "CAUSAL_LM", ["q_proj", "v_proj"]),
    "text-classification": (
        lambda: BertForSequenceClassification(bert_config(num_labels=4)),
        "SEQ_CLS",
        ["query", "value"],
    ),
    "feature-extraction": (
        lambda: BertModel(bert_config()),
        "FEATURE_EXTRACTION",
        ["query", "value"],
    ),
}


@pytest.fixture(params=KINDS)
def task(request):
    return request.param


@pytest.fixture
def prepared(task, method, tmp_path):
    """A `PeftModel` whose adapter matters, and the folder it is saved to."""
    make, task_type, targets = KINDS[task]
    base = make().eval()
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, method.config(target_modules=targets, task_type=task_type)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    return model, str(tmp_path / "adapter")


def by_hand(task, model, text, call):
    """What a pipeline for the task says of a text."""
    tokens = tokenizer()(text, return_tensors="pt")
    with torch.no_grad():
        if task == "text-generation":
            written = model.generate(**tokens, max_new_tokens=4, do_sample=False, **call)
            return tokenizer().decode(written[0], skip_special_tokens=True)
        output = model(**tokens, **call)
        return (
            output.logits.softmax(-1)[0]
            if task == "text-classification"
            else output.last_hidden_state[0]
        )


def options(task, call):
    return {
        "text-generation": {"max_new_tokens": 4, "do_sample": False, **call},
        "text-classification": {"top_k": None, **call},
        "feature-extraction": {},
    }[task]


def assert_same(task, answer, expected):
    if task == "text-generation":
        assert answer[0]["generated_text"].replace(" ", "") == expected.replace(" ", "")
    elif task == "text-classification":
        scores = {entry["label"]: entry["score"] for entry in answer}
        torch.testing.assert_close(torch.tensor([scores[f"LABEL_{i}"] for i in range(4)]), expected)
    else:
        torch.testing.assert_close(
            torch.tensor(answer[0])[: len(expected)], expected
        )  # without padding


@pytest.mark.parametrize("source", ["PeftModel", "folder", "own class"])
def test_a_pipeline(task, method, prepared, source):
    model, folder = prepared
    call = (
        method.call if task == "text-generation" else {}
    )  # the other pipelines hand nothing on to the model
    expected = [by_hand(task, model, text, method.call) for text in TEXTS]
    if source == "own class":
        given = KINDS[task][0]().eval()
        given.load_state_dict(copy.deepcopy(model).unload().state_dict())
        given.load_adapter(folder)
    else:
        given = model if source == "PeftModel" else folder
    pipe = pipeline(task, model=given, tokenizer=tokenizer(task), device="cpu")
    if call != method.call:
        with pytest.raises(ValueError, match="task_ids should not be None"):
            pipe(TEXTS, **options(task, call))
        for module in pipe.model.modules():  # one task for all calls is one that is merged
            if isinstance(module, BaseTunerLayer):
                module.merge(**method.merge)
    for batch_size in (1, 2):
        for answer, own in zip(
            pipe(TEXTS, batch_size=batch_size, **options(task, call)), expected, strict=True
        ):
            assert_same(task, answer, own)


def test_a_pipeline_with_tasks_by_name():
    """Ids of one call are for one text each; a name is for all."""
    base = llama().eval()
    names = ["a", "b", "c"]
    config = PolyConfig(
        r=2,
        n_tasks=3,
        task_names=names,
        init_weights=False,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        [parameter.normal_() for name, parameter in model.named_parameters() if ".default" in name]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    for name in names:
        for answer, text in zip(
            pipe(TEXTS, batch_size=2, task_ids=name, max_new_tokens=4, do_sample=False),
            TEXTS,
            strict=True,
        ):
            assert_same(
                "text-generation",
                answer,
                by_hand("text-generation", model, text, {"task_ids": name}),
            )
