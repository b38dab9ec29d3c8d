# SPDX-License-Identifier: Apache-2.0
"""The README.md beside an adapter, read by huggingface_hub."""

import os
from types import SimpleNamespace

import pytest
import yaml
from helpers.locks import is_locked
from helpers.methods import METHODS
from helpers.models import TARGETS, mlp
from huggingface_hub import ModelCard

from peft import LoraConfig, PeftModel, __version__, get_peft_model
from peft.checkpoint.model_card import update_model_card

OURS = (
    "tags:\n- mine\n- lokr\nlicense: mit\nlanguage: [en, 日本]\nempty: null\nlist: [1, 2.5, yes]\n"
)
RESULTS = """model-index:
- name: one
  results:
  - task: {type: text-generation}
    dataset: {name: some, type: some}
    metrics: [{type: accuracy, value: 0.5}]
"""


@pytest.fixture
def model():
    return get_peft_model(mlp(), METHODS["LOKR"].config(target_modules=TARGETS))


def test_a_new_card_is_one_that_the_hub_reads(model, tmp_path):
    model.get_base_model().model_tags = ["of-the-base"]
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {"library_name": "peft", "tags": ["lokr", "of-the-base"]}
    assert card.text.startswith("\n# LOKR adapter\n")


@pytest.mark.parametrize("metadata", ["\n", OURS, f"library_name: other\n{OURS}{RESULTS}"])
@pytest.mark.parametrize("body", ["", "\n# Title\n\n---\n\nText 日本\n"])
def test_what_a_card_has_is_kept(model, metadata, body, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{metadata}---\n{body}", encoding="utf-8")
    before = ModelCard.load(tmp_path / "README.md")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        after = ModelCard.load(tmp_path / "README.md")
        added = {
            "library_name": "peft",
            "tags": sorted({*before.data.to_dict().get("tags", []), "lokr"}),
        }
        assert after.data.to_dict() == {**before.data.to_dict(), **added}
        assert after.text == before.text
    written = yaml.safe_load((tmp_path / "README.md").read_text(encoding="utf-8").split("---")[1])
    known = [key for key, value in (yaml.safe_load(metadata) or {}).items() if value is not None]
    assert list(written)[: len(known)] == known  # in their order


def test_a_text_without_metadata_gets_some(model, tmp_path):
    (tmp_path / "README.md").write_text("# Title\n")
    model.save_pretrained(tmp_path)
    assert (
        tmp_path / "README.md"
    ).read_text() == "---\nlibrary_name: peft\ntags:\n- lokr\n---\n\n# Title\n"


@pytest.mark.parametrize(
    "text", ["---\n- a list\n---\n", "---\na: [\n---\nText", "---\njust words\n---\n"]
)
def test_metadata_that_cannot_be_read_is_left_alone(model, text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    with pytest.warns(
        UserWarning,
        match=r"The metadata at the top of '.*README.md' is not what a model card has there",
    ):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == text
    assert PeftModel.from_pretrained(mlp(), tmp_path).peft_config["default"].r == 2


def card_of(folder, adapter, **fields):
    update_model_card(folder, adapter, SimpleNamespace(**fields))
    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


def test_a_card_names_the_base_model_and_the_use(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="me/base")
    base = SimpleNamespace(_name_or_path="me/base")
    tags = ["base_model:adapter:me/base", "lora", "mine", "transformers"]
    data = {
        "library_name": "peft",
        "base_model": "me/base",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    text = (
        "\n# LORA adapter\n\nAn adapter for me/base. Load it with "
        "`PeftModel.from_pretrained(base_model, folder)`.\n\n"
        f"### Framework versions\n\n- PEFT {__version__}\n"
    )
    assert card_of(tmp_path, config, config=base, model_tags=["mine"]) == (data, text)
    # What its owner says of the use stays; the base model is that of the adapter.
    (tmp_path / "README.md").write_text(
        "---\npipeline_tag: other\nbase_model: old\ntags: word\n---\nText"
    )
    data |= {"pipeline_tag": "other", "tags": sorted([*tags[:2], "transformers", "word"])}
    assert card_of(tmp_path, config, config=base) == (data, "Text")


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_a_card_does_not_say_what_is_not_known(tmp_path, task_type):
    for fields in ({}, {"config": SimpleNamespace(), "model_tags": None}):
        data, text = card_of(tmp_path, LoraConfig(task_type=task_type), **fields)
        assert data == {"library_name": "peft", "tags": ["lora"]}
        assert "An adapter for its base model. Load it" in text


def test_a_card_is_written_under_the_lock_of_its_folder(model, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    held = []

    def replacing(source, target, replace=os.replace):
        held.append((os.path.basename(target), is_locked(tmp_path)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replacing)
    model.save_pretrained(tmp_path)
    assert ("README.md", True) in held and all(is_held for _, is_held in held)
