# SPDX-License-Identifier: Apache-2.0
"""Merging into one weight: what is kept to undo it, which changes by others are noticed, and what
a cast that fails or a state dict leaves.
"""

import copy
import warnings

import pytest
import torch
from helpers.methods import METHODS
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.ops import exact_merge
from peft.ops.exact_merge import Written

pytestmark = pytest.mark.quick


def adapted(dtype=torch.float32):
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    before = copy.deepcopy(base.state_dict())
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    return get_peft_model(base, config).eval(), before


def assert_base(model, before):
    for i, layer in enumerate(model.base_model.tuner_layers()):
        assert torch.equal(layer.base_layer.weight, before[f"{i}.weight"])
        assert torch.equal(layer.base_layer.bias, before[f"{i}.bias"])


@pytest.mark.parametrize("factor", [None, torch.full((3, 3), 2.0)])
@pytest.mark.parametrize("lost", [0, 1, 3, 4, 9])
def test_few_elements_are_kept_by_position_and_many_as_a_whole(lost, factor):
    """A position takes more memory than a value, so up to a third is kept by position."""
    weight, delta = torch.randn(3, 3), torch.zeros(3, 3)
    merged = weight.clone() if factor is None else weight * factor
    merged.view(-1)[:lost] += 1
    kept = exact_merge.correction(weight, merged, delta, factor)
    assert len(kept.values) == (lost if lost < 4 else 3)
    assert kept.positions is None if lost > 3 else kept.positions.tolist() == list(range(lost))
    assert torch.equal(exact_merge.subtract(merged, delta, kept), weight)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64]
)
def test_a_change_of_one_element_is_noticed_in_every_dtype(dtype):
    weight = torch.ones(4, 4, dtype=dtype)
    written = Written(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written.look(weight.clone(), ["a"])
        written.look(weight.to(torch.float32 if dtype != torch.float32 else torch.float64), ["a"])
    assert not written.is_changed
    changed = weight.float()
    changed[1, 2] = 2
    with pytest.warns(UserWarning, match="changed while adapters were merged into it: a, b"):
        written.look(changed.to(dtype), ["a", "b"])
    assert written.is_changed and Written(weight, written).is_changed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written.look(changed.to(dtype), ["a"])  # once is enough
        Written(weight, is_final=False).look(changed.to(dtype), ["a"])


def test_a_weight_that_was_unmerged_may_be_changed():
    model, before = adapted()
    model.merge_adapter()
    model.unmerge_adapter()
    for layer in model.base_model.tuner_layers():
        layer.base_layer.weight.data += 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
        model.unmerge_adapter()
    assert_base(model, {k: v + 1 if "weight" in k else v for k, v in before.items()})


@pytest.mark.parametrize("when", ["first", "after the weight"])
def test_a_cast_that_fails_leaves_the_merged_weight(when):
    model, before = adapted()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.merge_adapter(["default"])
    model.merge_adapter(["b"])
    layer, x = model.base_model.model[0], torch.randn(3, 8)
    merged, output = layer.base_layer.weight.clone(), model(x)

    def failing(tensor):
        if tensor.numel() and (when == "first" or tensor.shape != (8, 8)):
            raise MemoryError
        return tensor.double()

    with pytest.raises(MemoryError):
        layer._apply(failing)
    assert torch.equal(layer.base_layer.weight, merged)
    assert torch.equal(model(x), output)
    model.unmerge_adapter()
    assert_base(model, before)


def test_a_plain_state_of_a_merged_model_has_its_weights():
    """A dictionary has no place for the note of what is merged; torch takes one all the same."""
    model, _ = adapted()
    model.merge_adapter()
    state = model.state_dict(destination={})
    assert torch.equal(
        state["base_model.model.0.base_layer.weight"], model.base_model.model[0].weight
    )


def test_a_state_that_was_merged_with_an_adapter_that_is_missing_here():
    """Its weights are taken, and nothing of the model's own is merged into them."""
    model, _ = adapted()
    other = copy.deepcopy(model)
    other.add_adapter("b", METHODS["LORA"].config(target_modules=["0"]))
    other.merge_adapter(["b"])
    model.load_state_dict(other.state_dict(), strict=False)
    assert model.base_model.merged_adapters == []
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), other(x))
    weight = other.base_model.model[0].base_layer.weight.clone()
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model[0].base_layer.weight, weight)
