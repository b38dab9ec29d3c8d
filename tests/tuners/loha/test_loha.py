# SPDX-License-Identifier: Apache-2.0
"""LoHa against the dense Hadamard product in float64: layers of every kind, cost, dropout,
conversion.
"""

import copy

import pytest
import torch
from helpers.models import gpt2, mlp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from peft import LoHaConfig, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.tuners.loha.hadamard import (
    HadamardFactors,
    factor_shapes,
    hadamard_weight,
    is_low_rank,
    low_rank_pair,
)

pytestmark = pytest.mark.quick


def dense(layer, name="default"):
    """`(alpha/r)·W1 ∘ W2` in float64, element by element of the book's sums."""

    def stored(key):
        container = getattr(layer, f"hada_{key}")
        return container[name].double() if name in container else None

    sides = []
    for i in (1, 2):
        a, b, t = stored(f"w{i}_a"), stored(f"w{i}_b"), stored(f"t{i}")
        sides.append(a @ b if t is None else torch.einsum("ij...,ip,jq->pq...", t, a, b))
    weight = layer.alpha[name] / layer.r[name] * sides[0] * sides[1]
    return weight.reshape(layer.out_features, layer.in_features, *layer.geometry.kernel_size)


LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (5, 24)),
    "linear, any leading": (lambda: nn.Linear(24, 40), (2, 3, 4, 24)),
    "conv1d": (lambda: nn.Conv1d(16, 24, 3, stride=2, padding=1), (2, 16, 9)),
    "conv2d": (lambda: nn.Conv2d(16, 32, 3, padding=1, stride=2), (2, 16, 8, 8)),
    "conv2d 1x1": (lambda: nn.Conv2d(16, 32, 1), (2, 16, 4, 4)),
    "conv2d groups": (lambda: nn.Conv2d(16, 32, 3, padding=1, groups=4), (2, 16, 6, 6)),
    "conv2d depthwise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), (2, 16, 6, 6)),
    "conv2d reflect": (
        lambda: nn.Conv2d(16, 32, (3, 2), padding=1, padding_mode="reflect", dilation=2),
        (2, 16, 8, 8),
    ),
    "conv2d without batch": (lambda: nn.Conv2d(16, 32, 3), (16, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(8, 16, (2, 3, 1), padding=(1, 1, 0)), (2, 8, 4, 5, 3)),
}
FORMS = {
    "thin": {"r": 2, "alpha": 3},
    "whole": {"r": 9},
    "tucker": {"r": 2, "use_effective_conv2d": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_against_the_dense_product(kind, form):
    make, shape = LAYERS[kind]
    base = make()
    changed = copy.deepcopy(base).double()
    model = get_peft_model(
        nn.Sequential(base), LoHaConfig(target_modules=["0"], init_weights=False, **FORMS[form])
    )
    layer = model.base_model.model[0]
    changed.weight.data += dense(layer)
    x = torch.randn(shape)
    expected = changed(x.double())
    torch.testing.assert_close(model(x), expected.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        layer.get_delta_weight("default"), dense(layer).float(), atol=1e-5, rtol=1e-4
    )
    direction = torch.randn_like(expected)
    (model(x).double() * direction).sum().backward()
    got = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    layer.zero_grad()
    (gradient,) = torch.autograd.grad((changed(x.double()) * direction).sum(), changed.weight)
    (dense(layer) * gradient).sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kernel", [(), (3,), (3, 3), (1, 1), (2, 3, 1)])
@pytest.mark.parametrize("tucker", [True, False])
def test_two_forms_of_one_product(kernel, tucker):
    shapes = factor_shapes(10, 12, kernel, r=3, use_effective_conv2d=tucker)
    f = HadamardFactors(
        **{
            name: torch.randn(shape, dtype=torch.double, requires_grad=True)
            for name, shape in shapes.items()
        }
    )
    A, B = low_rank_pair(f, 0.7)
    assert A.shape[0] == 9
    torch.testing.assert_close(B @ A, hadamard_weight(f, 0.7))
    used = [factor for factor in f if factor is not None]
    names = list(shapes)
    assert torch.autograd.gradcheck(
        lambda *t: hadamard_weight(HadamardFactors(**dict(zip(names, t, strict=True))), 0.7), used
    )


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_the_product_is_not_built_where_factors_are_cheaper(kind):
    base = nn.Linear(64, 64) if kind == "linear" else nn.Conv2d(32, 32, 3)
    model = get_peft_model(
        nn.Sequential(base.requires_grad_(False)),
        LoHaConfig(r=2, target_modules=["0"], init_weights=False),
    )
    layer, size = model.base_model.model[0], base.weight.numel()
    x = (
        torch.randn(3, 64, requires_grad=True)
        if kind == "linear"
        else torch.randn(1, 32, 4, 4, requires_grad=True)
    )
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        layer.delta_activations("default", x).sum().backward()
    assert 0 < largest < size


@pytest.mark.parametrize(("out", "columns"), [(8, 8), (16, 64), (64, 64)])
def test_the_cost_model_says_what_is_counted(out, columns):
    for r in (1, 2, 3, 4, 6, 8):
        f = HadamardFactors(
            torch.randn(out, r),
            torch.randn(r, columns),
            torch.randn(out, r),
            torch.randn(r, columns),
        )
        model = get_peft_model(
            nn.Sequential(nn.Linear(columns, out)),
            LoHaConfig(r=r, target_modules=["0"], init_weights=False),
        )
        layer, x = model.base_model.model[0], torch.randn(50, columns)
        with FlopCounterMode(display=False) as counter:
            layer.delta_activations("default", x)
        thin = 2 * 50 * r * r * (out + columns)
        whole = (
            2 * 50 * out * columns + 2 * 2 * r * out * columns
        )  # and the element-wise product, which is not counted
        assert is_low_rank(f) == (r * r * (out + columns) <= out * columns)
        assert counter.get_total_flops() == (thin if is_low_rank(f) else whole)


def test_how_factors_start():
    model = get_peft_model(mlp(), LoHaConfig(r=2, target_modules=["0"]))
    factors = model.base_model.model[0].factors("default")
    assert [bool((f == 0).all()) for f in factors[:4]] == [False, False, False, True]
    model = get_peft_model(mlp(), LoHaConfig(r=2, target_modules=["0"], init_weights=False))
    assert not any((f == 0).all() for f in model.base_model.model[0].factors("default")[:4])


def test_rank_dropout_makes_up_for_what_it_drops():
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 2048)),
        LoHaConfig(r=2, rank_dropout=0.25, target_modules=["0"], init_weights=False),
    )
    layer, x = model.base_model.model[0], torch.randn(3, 8)
    whole = layer.eval().delta_activations("default", x)
    dropped = layer.train().delta_activations("default", x)
    gone = (dropped == 0).all(0)
    assert 0.2 < gone.float().mean() < 0.3
    torch.testing.assert_close(dropped[:, ~gone], whole[:, ~gone] / (1 - gone.float().mean()))


@pytest.mark.parametrize("r", [2, 5])
def test_conversion_to_lora_is_exact(r):
    model, x = (
        get_peft_model(
            mlp(), LoHaConfig(r=r, target_modules=["0", "2"], init_weights=False)
        ).eval(),
        torch.randn(3, 8),
    )
    converted, expected = convert_to_lora(model), model(x)
    assert converted.error < 1e-6
    ranks = [converted.state_dict[f"base_model.model.{i}.lora_A.weight"].shape[0] for i in (0, 2)]
    assert ranks == ([4, 4] if r == 2 else [8, 16])
    lora = get_peft_model(model.unload(), converted.config)
    set_peft_model_state_dict(lora, converted.state_dict)
    torch.testing.assert_close(lora(x), expected, atol=1e-5, rtol=1e-5)


def test_conv1d_of_gpt2_merges():
    model = get_peft_model(
        gpt2(), LoHaConfig(r=2, target_modules=["c_attn", "c_proj"], init_weights=False)
    ).eval()
    ids = torch.randint(3, 48, (2, 5))
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(
        model.merge_and_unload()(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "`r`=0"),
        ({"init_weights": "lycoris"}, "`init_weights`='lycoris'"),
        ({"rank_dropout": 1}, "`rank_dropout`=1"),
    ],
)
def test_fields_that_are_not_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        LoHaConfig(**fields)
