# SPDX-License-Identifier: Apache-2.0
"""The README.md beside an adapter, read by huggingface_hub."""

import pytest
import yaml
from helpers.methods import METHODS
from helpers.models import TARGETS, mlp
from huggingface_hub import ModelCard

from peft import PeftModel, get_peft_model

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
