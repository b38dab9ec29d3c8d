# SPDX-License-Identifier: Apache-2.0
"""Combinations and conversions of LoRA adapters, against Hugging Face PEFT's results and against
dense sums.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from peft.ops import task_vectors as merge_utils

RECORDED = json.loads((Path(__file__).parent / "combinations.json").read_text())


def recorded_model():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 5)), config("a", target_modules=["0"]), "a")
    model.add_adapter("b", config("b", target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        for name in "ab":
            layer.lora_A[name].weight.copy_(torch.tensor(RECORDED["adapters"][f"A.{name}"]))
            layer.lora_B[name].weight.copy_(torch.tensor(RECORDED["adapters"][f"B.{name}"]))
    return model, layer


def config(name, **fields):
    return LoraConfig(
        **{"r": 2, "lora_alpha": RECORDED["alpha"][name], "init_lora_weights": False, **fields}
    )


def label(case):
    return "-".join(str(value) for key, value in case.items() if key not in ("delta", "r"))


@pytest.mark.parametrize("case", RECORDED["cases"], ids=label)
def test_the_results_of_hugging_face_peft(case):
    model, layer = recorded_model()
    options = {key: value for key, value in case.items() if key not in ("delta", "r")}
    model.add_weighted_adapter(["a", "b"], adapter_name="new", density=0.5, **options)
    assert model.peft_config["new"].r == model.peft_config["new"].lora_alpha == case["r"]
    assert layer.scaling["new"] == 1
    torch.testing.assert_close(
        layer.get_delta_weight("new"), torch.tensor(case["delta"]), rtol=1e-4, atol=1e-4
    )


class Several(nn.Module):
    """A layer of each kind."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.table = nn.Embedding(20, 8)
        self.linear = nn.Linear(8, 12)
        self.stored = Conv1D(6, 8)
        self.image = nn.Conv2d(4, 6, (3, 2))
        self.point = nn.Conv2d(6, 5, 1)


KINDS = ["table", "linear", "stored", "image", "point"]


@pytest.fixture
def several():
    torch.manual_seed(0)
    fields = {"init_lora_weights": False, "fan_in_fan_out": True}
    model = get_peft_model(
        Several(), LoraConfig(r=2, lora_alpha=3, target_modules=KINDS, **fields), "a"
    )
    model.add_adapter(
        "b", LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=KINDS[:-1], **fields)
    )
    return model


def whole(model, path, name):
    """The dense delta as `[out, in · taps]`."""
    layer = model.base_model.model.get_submodule(path)
    delta = (
        layer.get_delta_weight(name).detach().double() if name in layer.scaling else torch.zeros(())
    )
    return layer.geometry.as_stored(delta).flatten(1) if delta.dim() else delta


@pytest.mark.parametrize("weights", [[0.7, 0.4], [0.7, -1.2]])
def test_sums_and_their_best_approximations(several, weights, tmp_path):
    errors = {
        None: several.add_weighted_adapter(["a", "b"], weights, "cat", "cat"),
        **{
            rank: several.add_weighted_adapter(
                ["a", "b"], weights, f"svd{rank}", "svd", svd_rank=rank
            )
            for rank in (1, 3, 20)
        },
    }
    errors[4] = several.add_weighted_adapter(["a", "b"], weights, "svd4", "svd")
    for path in KINDS:
        expected = weights[0] * whole(several, path, "a") + weights[1] * whole(several, path, "b")
        torch.testing.assert_close(whole(several, path, "cat"), expected, rtol=1e-4, atol=1e-4)
        values = torch.linalg.svdvals(expected)
        for rank in (1, 3, 4, 20):
            lost = float((whole(several, path, f"svd{rank}") - expected).norm() / expected.norm())
            best = float(values[rank:].norm() / values.norm())
            assert (
                lost == pytest.approx(best, abs=1e-5) == pytest.approx(errors[rank][path], abs=1e-5)
            )
        assert errors[None][path] == 0
    several.save_pretrained(tmp_path, selected_adapters=["cat"])
    expected = {path: whole(several, path, "cat") for path in KINDS}
    loaded = PeftModel.from_pretrained(several.unload(), tmp_path / "cat")
    assert all(
        torch.equal(whole(loaded, path, "default"), delta) for path, delta in expected.items()
    )


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_random_pruning_draws_for_each_adapter_in_turn(kind):
    """The textbook's steps with the same draws: of `A` and then of `B`, or of the deltas as they
    are stored.
    """
    model, layer = recorded_model()
    torch.manual_seed(11)
    model.add_weighted_adapter(["a", "b"], [0.75, -0.5], "new", kind, density=0.6, svd_rank=4)
    torch.manual_seed(11)
    combine = merge_utils.dare_ties if "ties" in kind else merge_utils.dare_linear
    scales = [RECORDED["alpha"][name] / 2 for name in "ab"]
    factors = [
        [getattr(layer, f"lora_{end}")[name].weight.detach() for name in "ab"] for end in "AB"
    ]
    if kind.endswith("svd"):
        deltas = [B @ A * scale for A, B, scale in zip(*factors, scales, strict=True)]
        expected = combine(deltas, torch.tensor([0.75, -0.5]), 0.6)
    else:
        roots = [math.sqrt(0.75 * scales[0]), math.sqrt(0.5 * scales[1])]
        A = combine(factors[0], torch.tensor([roots[0], -roots[1]]), 0.6)
        expected = combine(factors[1], torch.tensor(roots), 0.6) @ A
    torch.testing.assert_close(layer.get_delta_weight("new"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "ties", "magnitude_prune", "dare_ties"])
def test_elementwise_combinations_need_one_rank(several, kind):
    with pytest.raises(
        ValueError,
        match=rf"must have the same r value when using combination_type {kind}; they have \[2, 4\]",
    ):
        several.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", kind, density=0.5)


@pytest.mark.parametrize("density", [None, 0, -0.5, True])
def test_pruning_needs_a_density(several, density):
    with pytest.raises(ValueError, match="`density`=.* is not allowed for combination_type 'ties'"):
        several.add_weighted_adapter(["a"], [1.0], "new", "ties", density=density)


def test_an_adapter_that_starts_from_the_weight_is_the_sum_it_is():
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(12, 10)),
        LoraConfig(r=2, init_lora_weights="pissa", target_modules=["0"]),
    )
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.mul_(1.5)
    expected = layer.get_delta_weight("default")
    config, state = convert_to_lora(model)
    assert (config.r, config.init_lora_weights) == (4, True)
    A, B = (state[f"base_model.model.0.lora_{end}.weight"] for end in "AB")
    torch.testing.assert_close(B @ A, expected)
    model.add_weighted_adapter(["default"], [1.0], "new", "cat")
    assert model.peft_config["new"].init_lora_weights is True
    torch.testing.assert_close(layer.get_delta_weight("new"), expected)


def dora(base, targets):
    model = get_peft_model(
        base, LoraConfig(r=2, init_lora_weights=False, use_dora=True, target_modules=targets)
    ).eval()
    with torch.no_grad():
        for layer in model.base_model.tuner_layers():
            layer.lora_magnitude_vector["default"].weight.mul_(1.3)
    return model


def test_what_is_more_than_two_factors():
    torch.manual_seed(0)
    model = dora(nn.Sequential(nn.Linear(4, 6)), ["0"])
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    for name in ("default", "b"):
        with pytest.raises(
            ValueError, match=f"`0`: adapter {name} is more than a product of two factors"
        ):
            model.add_weighted_adapter([name], [1.0], "new", "cat")
    assert not model.supports_lora_conversion("b")
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: Linear\."):
        convert_to_lora(model, 2, "b")


@pytest.mark.parametrize("merged", [False, True])
def test_what_dora_does_to_the_weight_is_approximated(merged):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Linear(8, 6))
    before = [base[0].weight.detach().clone(), base[2].weight.detach().clone()]
    model = dora(base, ["0", "2"])
    if merged:
        model.merge_adapter()
    assert model.supports_lora_conversion()
    exact, cut = convert_to_lora(model), convert_to_lora(model, 3)
    plain = model.merge_and_unload()
    for path, weight in zip("02", before, strict=True):
        expected = (plain.get_submodule(path).weight - weight).detach().flatten(1)
        values = torch.linalg.svdvals(expected)
        products = [
            c.state_dict[f"base_model.model.{path}.lora_B.weight"].flatten(1)
            @ c.state_dict[f"base_model.model.{path}.lora_A.weight"].flatten(1)
            for c in (exact, cut)
        ]
        torch.testing.assert_close(products[0], expected, rtol=1e-4, atol=1e-5)
        best = float(values[3:].norm() / values.norm())
        assert best > 0.01
        assert float((products[1] - expected).norm() / values.norm()) == pytest.approx(
            best, abs=1e-5
        )
        assert cut.errors[path] == pytest.approx(best, abs=1e-5)


def test_a_lora_adapter_is_its_own_conversion(several, tmp_path):
    for name, scale in (("a", 1.5), ("b", 1.0)):
        converted = save_as_lora(tmp_path / name, several, adapter_name=name)
        assert converted.error == 0
        for path in KINDS[: 5 if name == "a" else 4]:
            layer = several.base_model.model.get_submodule(path)
            A, B = layer.factors(name)
            ends = [
                f"lora_embedding_{end}" if path == "table" else f"lora_{end}.weight" for end in "AB"
            ]
            own = [
                converted.state_dict[f"base_model.model.{path}.{end}"].flatten(1) for end in ends
            ]
            assert torch.equal(own[0], A) and torch.equal(own[1], B * scale)
    expected = {path: whole(several, path, "a") for path in KINDS}
    loaded = PeftModel.from_pretrained(several.unload(), tmp_path / "a")
    for path, delta in expected.items():
        torch.testing.assert_close(whole(loaded, path, "default"), delta, rtol=1e-5, atol=1e-6)
