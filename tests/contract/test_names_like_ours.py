# SPDX-License-Identifier: Apache-2.0
"""A model may have modules that are named like the attributes of our layers and wrappers."""

import copy

import pytest
import torch
from torch import nn

from peft import PeftModel, get_peft_model

NAMES = ["base_layer", "modules_to_save", "original_module"]


class Block(nn.Module):
    """A block with a child of some name."""

    def __init__(self, name):
        super().__init__()
        self.name, self.other = name, nn.Linear(8, 8)
        setattr(self, name, nn.Linear(8, 8))

    def forward(self, x):
        return self.other(getattr(self, self.name)(x).relu())


class Model(nn.Module):
    """A head after a block."""

    def __init__(self, name):
        super().__init__()
        self.block, self.head = Block(name), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.block(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trained", ["adapters", "block", "child"])
def test_it_is_adapted_saved_loaded_merged_and_unloaded(method, name, trained, tmp_path):
    base = Model(name)
    fields = {"adapters": {"target_modules": "all-linear"}}.get(
        trained,
        {"target_modules": ["head"], "modules_to_save": ["block" if trained == "block" else name]},
    )
    model = get_peft_model(copy.deepcopy(base), method.config(**fields)).eval()
    assert len(list(model.base_model.tuner_layers())) == (3 if trained == "adapters" else 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    x = torch.randn(3, 8)
    expected = model(x, **method.call)
    assert not torch.allclose(expected, base(x), atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(loaded(x, **method.call), expected)
    merged = loaded.merge_and_unload(**method.merge)
    torch.testing.assert_close(merged(x), expected, atol=1e-5, rtol=1e-4)
    assert merged.state_dict().keys() == base.state_dict().keys()
