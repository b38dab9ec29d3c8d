# SPDX-License-Identifier: Apache-2.0
"""Base layers that compute their weight in each forward: adapters apply as on any layer, and a
merge is refused or made right.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.methods import METHODS
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from peft import get_peft_model


class Doubled(nn.Module):
    """A parametrization with a layer inside, whose name is that of a target."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8, bias=False)

    def forward(self, weight):
        return 2 * self.up(weight)


def of_weight_and_bias(layer):
    parametrizations.weight_norm(layer)
    parametrize.register_parametrization(layer, "bias", nn.Tanh())


KINDS = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm hook": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm hook": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "with the bias": of_weight_and_bias,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")


def base_of(kind):
    base = nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})
    KINDS[kind](base["up"])
    return base.requires_grad_(False).eval()


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    return request.param


def test_merging_is_refused_and_unloading_makes_the_weight_plain(method, kind):
    base, x = base_of(kind), torch.randn(5, 8)
    plain_output, weight = base["up"](x), base["up"].weight.clone()
    original = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, method.config(target_modules=["up"])).eval()
    up = model.base_model.model["up"]
    run = up if not method.call else lambda x: up(x, **method.call)
    expected = F.linear(x, weight + up.get_delta_weight("default", **method.merge), base["up"].bias)
    torch.testing.assert_close(run(x), expected, atol=1e-5, rtol=1e-4)
    for safe in (False, True):
        with pytest.raises(
            NotImplementedError,
            match=r"`up`: .* computes its weight in each forward.*torch.nn.utils",
        ):
            model.merge_adapter(safe_merge=safe, **method.merge)
    with pytest.raises(NotImplementedError, match="computes its weight"):
        up.merge(**method.merge)
    assert not up.merged
    torch.testing.assert_close(run(x), expected, atol=1e-5, rtol=1e-4)
    with pytest.warns(UserWarning, match="plain parameters"):
        merged = model.merge_and_unload(safe_merge=True, **method.merge)
    torch.testing.assert_close(merged["up"](x), expected, atol=1e-5, rtol=1e-4)
    assert isinstance(merged["up"].weight, nn.Parameter)
    fresh = base_of(kind)  # what unloads without merging is as it was
    fresh.load_state_dict(original)
    again = get_peft_model(fresh, method.config(target_modules=["up"])).unload()
    torch.testing.assert_close(again["up"](x), plain_output, rtol=0, atol=0)
    assert again.state_dict().keys() == original.keys()


def test_a_merge_that_fails_leaves_the_weight_computed(kind):
    base, x = base_of(kind), torch.randn(5, 8)
    model = get_peft_model(base, METHODS["LORA"].config(target_modules=["up", "down"]))
    up, down = model.base_model.model["up"], model.base_model.model["down"]
    before, keys = up(x).clone(), list(model.state_dict())
    down.lora_A["default"].weight.data.fill_(torch.nan)
    with (
        pytest.warns(UserWarning, match="plain parameters"),
        pytest.raises(ValueError, match="broken"),
    ):
        model.merge_and_unload(safe_merge=True)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(up(x), before, rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match="computes its weight"):
        model.merge_adapter()


def test_lengths_of_a_computed_weight(kind):
    """DoRA starts as the base layer's output, and merges into its weight."""
    base, x = base_of(kind), torch.randn(5, 8)
    expected, weight, bias = base["up"](x), base["up"].weight.clone(), base["up"].bias.clone()
    model = get_peft_model(
        base, METHODS["LORA"].config(target_modules=["up"], use_dora=True, init_lora_weights=True)
    )
    up = model.base_model.model["up"]
    torch.testing.assert_close(up(x), expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        up.lora_B["default"].weight.normal_()
        up.lora_magnitude_vector["default"].weight.mul_(1.5)
    total = weight + up.get_delta_weight("default")
    total = total * (up.lora_magnitude_vector["default"].weight / total.norm(dim=1)).unsqueeze(1)
    torch.testing.assert_close(up(x), F.linear(x, total, bias), atol=1e-5, rtol=1e-4)


def test_a_trained_copy_of_a_computed_layer(kind):
    base, x = base_of(kind), torch.randn(5, 8)
    expected = base["up"](x)
    model = get_peft_model(
        base, METHODS["LORA"].config(target_modules=["down"], modules_to_save=["up"])
    )
    torch.testing.assert_close(model.base_model.model["up"](x), expected)


def test_what_computes_a_weight_is_no_target():
    """Its modules have names that targets may match."""
    model = get_peft_model(base_of("own"), METHODS["LORA"].config(target_modules=["up"]))
    assert model.base_model.targeted_module_names == ["up"]
    model = get_peft_model(base_of("own"), METHODS["LORA"].config(target_modules="all-linear"))
    assert sorted(model.base_model.targeted_module_names) == ["down", "up"]
