# SPDX-License-Identifier: Apache-2.0
"""Merges that wait while adapters are disabled: they come back once, as they were, and each layer
forgets its own alone.
"""

import pytest
import torch
from helpers.methods import METHODS
from torch import nn

from peft import get_peft_model

pytestmark = pytest.mark.quick


def adapted(*methods, **options):
    """A linear layer with an adapter of each method, called "a", "b", …; the last one is active."""
    base = nn.Sequential(nn.Linear(8, 8)).double()
    weight, bias = base[0].weight.detach().clone(), base[0].bias.detach().clone()
    first, *others = (method.config(target_modules=["0"]) for method in methods)
    model = get_peft_model(base, first, "a", **options).eval()
    for name, config in zip("bcd", others, strict=False):
        model.add_adapter(name, config)
    model.set_adapter("abcd"[len(others)])
    return model, weight, bias


def layer_of(model, name):
    """The layer that has an adapter, of several around one base layer."""
    layer = model.base_model.model[0]
    return layer if name in layer.scaling else layer.base_layer


def expected(model, weight, bias, x, **deltas):
    """`x (W + Σ Δ)ᵀ + b`, given for each adapter the options of its delta."""
    for name, options in deltas.items():
        weight = weight + layer_of(model, name).get_delta_weight(name, **options)
    return x @ weight.T + bias


def test_an_adapter_merged_again_comes_back_once(method):
    """Also after a call, which takes off what was merged since the adapters were disabled."""
    model, weight, bias = adapted(method, method)
    x = torch.randn(3, 8, dtype=torch.float64)
    model.merge_adapter(["a"], **method.merge)
    with model.disable_adapter():
        for _ in range(2):
            model.merge_adapter(["a"], **method.merge)
            assert torch.equal(model(x), x @ weight.T + bias)
    wanted = expected(model, weight, bias, x, a=method.merge, b=method.merge)
    torch.testing.assert_close(model(x, **method.call), wanted)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model[0].base_layer.weight, weight)


def test_the_second_of_two_tasks_comes_back():
    model, weight, bias = adapted(METHODS["POLY"], METHODS["LORA"], mixed=True)
    x = torch.randn(3, 8, dtype=torch.float64)
    model.merge_adapter(["a"], task_id=1)
    with model.disable_adapter():
        model.merge_adapter(["a"], task_id=2)
        model(x)
    torch.testing.assert_close(model(x), expected(model, weight, bias, x, a={"task_id": 2}, b={}))


@pytest.mark.parametrize("gone", ["a", "b"])
def test_one_layer_forgets_its_own_merges_alone(gone):
    """LoRA's layer and LoKr's share a weight."""
    lora, lokr = METHODS["LORA"], METHODS["LOKR"]
    model, weight, bias = adapted(lora, lokr, lora, mixed=True)
    x = torch.randn(3, 8, dtype=torch.float64)
    model.merge_adapter(["a", "b"])
    with model.disable_adapter():
        layer_of(model, gone).unmerge([gone])
    (left,) = {"a", "b"} - {gone}
    assert model.base_model.merged_adapters == [left]
    wanted = expected(model, weight, bias, x, **{left: {}, "c": {}})
    torch.testing.assert_close(model(x), wanted)


def test_what_was_merged_unchecked_comes_back_unchecked():
    """Also where another adapter, which came first, is unmerged."""
    model, weight, _ = adapted(METHODS["LORA"], METHODS["LORA"], METHODS["LORA"])
    layer = model.base_model.model[0]
    layer.lora_B["b"].weight.data[0] = torch.inf
    model.merge_adapter(["a"])
    model.merge_adapter(["b"])
    merged = layer.base_layer.weight.clone()
    with model.disable_adapter():
        pass
    found = layer.base_layer.weight
    torch.testing.assert_close(found, merged, rtol=0, atol=0, equal_nan=True)
    layer.unmerge(["a"])
    assert layer.merged_adapters == ["b"]
    layer.unmerge(["b"])
    assert torch.equal(layer.base_layer.weight, weight)


def test_what_is_computed_again_does_not_come_back_later():
    """An active adapter is unmerged for good; when it is inactive it has no part in the output."""
    model, weight, bias = adapted(METHODS["LORA"], METHODS["LORA"])
    x = torch.randn(3, 8, dtype=torch.float64)
    for name in ("a", "b"):
        model.set_adapter(name)
        if name == "a":
            model.merge_adapter(["a"])
        with model.disable_adapter():
            pass
        assert model.base_model.merged_adapters == []
        torch.testing.assert_close(model(x), expected(model, weight, bias, x, **{name: {}}))
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.unmerge_adapter()


def test_every_layer_gets_back_what_it_had():
    """Only one of two layers has an adapter that its forward would not compute."""
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = METHODS["LORA"].config
    model = get_peft_model(base, config(target_modules=["0", "1"]), "a").eval()
    model.add_adapter("b", config(target_modules=["1"]))
    model.merge_adapter(["a", "b"])
    with model.disable_adapter():
        pass
    merged = [layer.merged_adapters for layer in model.base_model.tuner_layers()]
    assert merged == [["a"], ["a", "b"]]
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter(["b"])
