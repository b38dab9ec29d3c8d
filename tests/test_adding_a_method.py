# SPDX-License-Identifier: Apache-2.0
"""The page on adding a method, run as it stands there."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import peft
from peft.base import registry
from peft.config import TargetedConfig
from peft.core.base_layer import is_linear
from peft.tuners.tuners_utils import AdapterParameterDict, BaseTuner, BaseTunerLayer

DOCS = Path(__file__).parents[1] / "docs"


def test_a_method_is_a_config_a_layer_a_tuner_and_a_registration(tmp_path, monkeypatch):
    """The example of docs/adding-a-tuner.md, run as it stands there."""
    for mapping in ("CONFIG", "TUNER", "PREFIX"):
        mappings = getattr(registry, f"PEFT_TYPE_TO_{mapping}_MAPPING")
        for key in list(mappings):
            monkeypatch.setitem(mappings, key, mappings[key])
    blocks = (DOCS / "adding-a-tuner.md").read_text().split("```python\n")[1:]
    code = "\n".join(block.split("```")[0] for block in blocks[:4])
    for relative, absolute in [
        ("from ...", "from peft."),
        ("from .", "# from ."),
    ]:
        code = code.replace(relative, absolute)
    namespace = {"__name__": "rankone"}
    sys.modules["rankone"] = type(sys)("rankone")
    try:
        exec(compile(code, "adding-a-tuner.md", "exec"), namespace)
        config_cls = namespace["RankOneConfig"]
        assert issubclass(config_cls, TargetedConfig)
        assert issubclass(namespace["RankOneModel"], BaseTuner)
        assert issubclass(namespace["Linear"], BaseTunerLayer)
        model = peft.get_peft_model(
            nn.Sequential(nn.Linear(4, 6)), config_cls(target_modules=["0"])
        )
        layer = model.base_model.model[0]
        assert isinstance(layer.rankone_a, AdapterParameterDict)
        assert is_linear(layer)
        with torch.no_grad():
            layer.rankone_b["default"].normal_()
        x = torch.randn(5, 4)
        a, b = layer.rankone_a["default"], layer.rankone_b["default"]
        expected = layer.base_layer(x) + torch.outer(x @ a, b)
        torch.testing.assert_close(model(x), expected)
        model.save_pretrained(tmp_path)
        base = model.merge_and_unload()
        torch.testing.assert_close(base(x), expected)
        again = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 6)), tmp_path)
        assert torch.equal(again.base_model.model[0].rankone_b["default"], b)
    finally:
        del sys.modules["rankone"]
        for mapping in ("CONFIG", "TUNER", "PREFIX"):
            mappings = getattr(registry, f"PEFT_TYPE_TO_{mapping}_MAPPING")
            for key in [key for key in mappings if key == "RANKONE"]:
                del mappings[key]
        forget_type("RANKONE")


def forget_type(name):
    """Take a member that a registration added off `PeftType`, for the tests that come after."""
    kinds = peft.PeftType
    kinds._member_names_.remove(name)
    del kinds._member_map_[name], kinds._value2member_map_[name]
    type.__delattr__(kinds, name)


def test_a_layer_lists_its_containers_and_sets_its_scale(monkeypatch):
    from peft.tuners.lora.layer import Linear

    def make():
        config = peft.LoraConfig(r=2, target_modules=["0"])
        return peft.get_peft_model(nn.Sequential(nn.Linear(4, 6)), config)

    with monkeypatch.context() as patch:
        patch.setattr(Linear, "container_names", Linear.container_names[1:])
        with pytest.raises(ValueError, match="must list the container `lora_A`"):
            make()
    update = Linear.update_layer

    def forgetful(self, *args, **options):
        update(self, *args, **options)
        self.scaling.clear()

    monkeypatch.setattr(Linear, "update_layer", forgetful)
    monkeypatch.setattr(Linear, "set_adapter", lambda self, name: None)
    with pytest.raises(ValueError, match="must set `scaling` of adapter 'default'"):
        make()
