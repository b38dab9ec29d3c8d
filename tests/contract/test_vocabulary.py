# SPDX-License-Identifier: Apache-2.0
"""The size of a vocabulary: when it counts as changed, and how many tokens a file's tensors have."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from helpers.experts import mixture
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from peft import LoraConfig
from peft.checkpoint.vocabulary import fit_vocabulary, was_resized


def model_of(content):
    model = nn.Linear(2, 2)
    if content is not None:
        model.config = SimpleNamespace(to_dict=lambda: content)
    return model


WORDS, MORE = {"vocab_size": 48}, {"vocab_size": 50}
# The model's config now, that in the folder of its base model, and what follows.
CONFIGS = {
    "more": (MORE, WORDS, True),
    "fewer": (WORDS, MORE, True),
    "the same": (WORDS, dict(WORDS), False),
    "multimodal": ({"text_config": MORE}, {"text_config": WORDS}, True),
    "outermost": (WORDS | {"text_config": MORE}, WORDS, False),
    "without text": ({"text_config": None}, WORDS, False),
    "unknown before": (WORDS, {}, False),
    "unknown now": ({}, WORDS, False),
    "no config": (None, WORDS, False),
    "no file": (WORDS, None, False),
    "no JSON": (WORDS, "{", False),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_vocabulary_was_resized(case, tmp_path):
    now, before, expected = CONFIGS[case]
    if before is not None:
        text = before if isinstance(before, str) else json.dumps(before)
        (tmp_path / "config.json").write_text(text)
    config = LoraConfig(base_model_name_or_path=str(tmp_path))
    assert was_resized(model_of(now), config) is expected
    assert was_resized(model_of(now), LoraConfig()) is False


def test_the_hub_is_not_asked_for_a_config(monkeypatch):
    asked = []

    def download(repo, name, local_files_only=False):
        asked.append((repo, name, local_files_only))
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert was_resized(model_of(WORDS), LoraConfig(base_model_name_or_path="me/base")) is False
    assert asked == [("me/base", "config.json", True)]


class Words(nn.Module):
    """A model of ten words; `encoder.embed_tokens` is the table too."""

    def __init__(self):
        super().__init__()
        self.shared, self.norm = nn.Embedding(10, 4), nn.Linear(4, 12)
        self.encoder = nn.ModuleDict({"embed_tokens": self.shared})
        self.lm_head, self.asked = nn.Linear(4, 10), []

    def get_input_embeddings(self):
        return self.shared

    def get_output_embeddings(self):
        return self.lm_head

    def resize_token_embeddings(self, tokens, mean_resizing=True):
        self.asked.append((tokens, mean_resizing))


ROOT = "base_model.model."
SHAPES = {
    "table": ({f"{ROOT}shared.weight": (12, 4)}, 12),
    "without a prefix": ({"shared.weight": (12, 4)}, 12),
    "another name": ({f"{ROOT}encoder.embed_tokens.weight": (12, 4)}, 12),
    "head": ({f"{ROOT}lm_head.weight": (8, 4)}, 8),
    "both": ({f"{ROOT}shared.weight": (12, 4), f"{ROOT}lm_head.weight": (12, 4)}, 12),
    "two numbers": ({f"{ROOT}shared.weight": (12, 4), f"{ROOT}lm_head.weight": (8, 4)}, None),
    "as it is": ({f"{ROOT}shared.weight": (10, 4)}, None),
    "adapted": ({f"{ROOT}shared.base_layer.weight": (12, 4)}, 12),
    "rows": ({f"{ROOT}shared.token_adapter.base_layer.weight": (12, 4)}, 12),
    "factor": ({f"{ROOT}shared.lora_embedding_A": (2, 12)}, 12),
    "another factor": ({f"{ROOT}shared.lora_embedding_B": (12, 2)}, None),
    "another module": ({f"{ROOT}norm.weight": (12, 4)}, None),
    "a bias": ({f"{ROOT}lm_head.weight": (12,)}, None),
    "no tensors": ({}, None),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_vocabulary_is_fitted_to_a_file(case):
    shapes, tokens = SHAPES[case]
    model = Words()
    fit_vocabulary(model, shapes, {"lora_embedding_A": 1})
    assert model.asked == ([] if tokens is None else [(tokens, False)])


def test_a_model_without_a_head_has_a_table():
    model, shapes = Words(), {"shared.weight": (12, 4)}
    model.get_output_embeddings = lambda: None
    fit_vocabulary(model, shapes | {"norm.weight": (8, 4)}, {})
    assert model.asked == [(12, False)]


def test_former_modules_of_the_model_do_not_matter():
    model, root = mixture("mixtral"), f"{ROOT}model."
    expert = f"{root}layers.0.block_sparse_moe.experts.0.w1.weight"
    fit_vocabulary(model, {expert: (24, 16), f"{root}embed_tokens.weight": (70, 16)}, {})
    assert model.get_input_embeddings().weight.shape == (70, 16)


@pytest.mark.parametrize("error", [NotImplementedError, AttributeError])
def test_a_model_that_has_no_table_is_left_alone(error):
    def fail():
        raise error

    shapes = {"shared.weight": (12, 4), "lm_head.weight": (12, 4)}
    for name, value in (
        ("get_input_embeddings", fail),
        ("get_output_embeddings", fail),
        ("get_input_embeddings", lambda: None),
        ("get_input_embeddings", nn.ReLU),
    ):
        model = Words()
        setattr(model, name, value)
        fit_vocabulary(model, shapes, {})
        assert model.asked == []
    fit_vocabulary(nn.Linear(2, 2), shapes, {})
