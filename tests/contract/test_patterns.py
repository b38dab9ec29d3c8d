# SPDX-License-Identifier: Apache-2.0
"""Keys that begin with `^` mean the modules below a path, in a new config and, to every reader, in
its file; those of other writers mean what they mean there.
"""

import copy
import json
import pickle
import re
from dataclasses import replace

import pytest
from torch import nn

from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PolyConfig,
    get_peft_model,
)

PATHS = ["layers.0.a", "layers.0.b.c", "layers.1.a", "layers.1.b.c", "layers.10.a", "head.a"]
KEYS = {"^layers.0": 2, r"^layers\.1\.b|head": 3, "^layers.10$": 4, "^layers.10.a": 5, "a": 6}
# By the words of the documentation: a whole path or the end of one; below the path too, where the
# key begins with `^`.
NEW = {
    "layers.0.a": 2,
    "layers.0.b.c": 2,
    "layers.1.a": 6,
    "layers.1.b.c": 3,
    "layers.10.a": 5,
    "head.a": 3,
}
# The same without what is below.
OF_OTHERS = {**NEW, "layers.0.a": 6, "layers.0.b.c": 1, "layers.1.b.c": 1, "head.a": 6}
FIELDS = [
    (LoraConfig, "rank_pattern", "r"),
    (LoraConfig, "alpha_pattern", "lora_alpha"),
    (LoHaConfig, "rank_pattern", "r"),
    (LoHaConfig, "alpha_pattern", "alpha"),
    (LoKrConfig, "rank_pattern", "r"),
    (LoKrConfig, "alpha_pattern", "alpha"),
    (PolyConfig, "rank_pattern", "r"),
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.ModuleDict({"c": nn.Linear(8, 8)})


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = (
            nn.ModuleList([Block() for _ in range(11)]),
            nn.ModuleDict({"a": nn.Linear(8, 8)}),
        )

    def forward(self, x):
        return x


def named(keys, path):
    """The value that Hugging Face PEFT finds for a module."""
    return next((value for key, value in keys.items() if re.match(rf"(.*\.)?({key})$", path)), 1)


def make(config_cls, field, attribute, keys, **fields):
    return config_cls(target_modules=PATHS, **{attribute: 1, field: dict(keys)}, **fields)


def values(model, attribute):
    return {
        path: getattr(layer, attribute)["default"]
        for path, layer in model.base_model.named_tuner_layers()
    }


@pytest.mark.parametrize(("config_cls", "field", "attribute"), FIELDS)
def test_a_key_means_the_same_in_its_file(config_cls, field, attribute, tmp_path):
    model = get_peft_model(Base(), make(config_cls, field, attribute, KEYS))
    assert values(model, attribute) == NEW
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {path: named(content[field], path) for path in PATHS} == NEW
    assert values(PeftModel.from_pretrained(Base(), tmp_path), attribute) == NEW
    assert getattr(PeftConfig.from_pretrained(tmp_path), field) == KEYS  # as they were given


@pytest.mark.parametrize(("config_cls", "field", "attribute"), FIELDS)
def test_a_key_of_another_writer_means_what_it_does_there(config_cls, field, attribute, tmp_path):
    assert {path: named(KEYS, path) for path in PATHS} == OF_OTHERS
    make(config_cls, field, attribute, KEYS).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    for version in ({"peft_version": "0.21.2"}, {"peft_version": None}, {}):
        content.pop("peft_version", None)
        file.write_text(json.dumps({**content, field: KEYS, **version}))
        config = PeftConfig.from_pretrained(tmp_path)
        assert values(get_peft_model(Base(), config), attribute) == OF_OTHERS
        config.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())[field] == KEYS
        over = PeftConfig.from_pretrained(
            tmp_path, **{field: KEYS}
        )  # a value of the caller's is a new one
        assert values(get_peft_model(Base(), over), attribute) == NEW


def test_copies_of_a_config_mean_the_same():
    config = make(LoraConfig, "rank_pattern", "r", KEYS)
    copies = [
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        replace(config, lora_alpha=3),
        LoraConfig(**config.to_dict()),
        LoraConfig.from_peft_type(**json.loads(config.to_json())),
    ]
    for other in copies:
        assert values(get_peft_model(Base(), other), "r") == NEW
        assert other.rank_pattern == KEYS
    later = LoraConfig(target_modules=PATHS, r=1)
    later.rank_pattern = dict(KEYS)
    assert values(get_peft_model(Base(), later), "r") == NEW


def test_our_own_dictionaries_follow():
    lokr = LoKrConfig(r=8, target_modules=PATHS, factor_pattern={"^layers.0": 2, "^layers.1": 1})
    layers = dict(get_peft_model(Base(), lokr).base_model.named_tuner_layers())
    sizes = {path: layer.lokr_w1["default"].shape[0] for path, layer in layers.items()}
    assert sizes == {
        "layers.0.a": 2,
        "layers.0.b.c": 2,
        "layers.1.a": 1,
        "layers.1.b.c": 1,
        "layers.10.a": 2,
        "head.a": 2,
    }
    read = LoKrConfig.from_peft_type(**json.loads(lokr.to_json()))
    assert (
        dict(get_peft_model(Base(), read).base_model.named_tuner_layers()).keys() == layers.keys()
    )
    assert read.to_dict() == lokr.to_dict()
    poly = PolyConfig(
        n_skills=2,
        target_modules=PATHS,
        n_skills_pattern={"^layers.0": 3},
        routing_pattern={"^layers.1": "fixed"},
    )
    poly = PolyConfig.from_peft_type(**json.loads(poly.to_json()))
    layers = dict(get_peft_model(Base(), poly).base_model.named_tuner_layers())
    skills = {path: layer.poly_lora_A["default"].shape[1] for path, layer in layers.items()}
    assert skills == {path: 3 if path.startswith("layers.0.") else 2 for path in PATHS}
    fixed = {path: layer.poly_router["default"].fixed for path, layer in layers.items()}
    assert fixed == {path: path.startswith("layers.1.") for path in PATHS}
