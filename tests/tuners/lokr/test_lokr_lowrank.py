# SPDX-License-Identifier: Apache-2.0
"""Low-rank forms and sums of Kronecker products, against dense singular values in float64."""

import itertools
import math
import warnings

import pytest
import torch
from torch import nn

from peft import LoKrConfig, PeftModel, get_peft_model
from peft.tuners.lokr.kronecker import KroneckerFactors, kronecker_weight
from peft.tuners.lokr.lowrank import kronecker_low_rank, nearest_product
from peft.tuners.lokr.shapes import factor_shapes
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora

SHAPES = [
    pytest.param({"r": 2}, (), id="linear"),
    pytest.param({"r": 2, "decompose_both": True}, (), id="linear-both"),
    pytest.param({"r": 9}, (), id="linear-whole"),
    pytest.param({"r": 2}, (3, 3), id="conv2d"),
    pytest.param({"r": 2, "use_effective_conv2d": True}, (3, 3), id="conv2d-tucker"),
    pytest.param({"r": 9}, (2, 1, 3), id="conv3d-whole"),
    pytest.param(
        {"r": 2, "use_effective_conv2d": True, "decompose_both": True},
        (3,),
        id="conv1d-tucker-both",
    ),
]


def factors(options, kernel, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = factor_shapes(40, 36, kernel, **options)
    return KroneckerFactors(
        **{
            name: torch.randn(shape, generator=generator, dtype=dtype)
            for name, shape in shapes.items()
        }
    )


def dense(f, kernel, scale=1.0, flat=False):
    return kronecker_weight(f, kernel, scale, flat).flatten(1)


def side_rank(f, names, kernel):
    """The rank that the structure of one side gives."""
    whole, pair = getattr(f, names), getattr(f, f"{names}_a")
    return (
        min(whole.flatten(1).shape)
        if whole is not None
        else min(2, *pair.shape, max(1, math.prod(kernel) * 99))
    )


@pytest.mark.parametrize(("options", "kernel"), SHAPES)
@pytest.mark.parametrize("scale", [1.5, -0.5])
def test_the_exact_form_has_the_structures_rank(options, kernel, scale):
    f = factors(options, kernel)
    expected = dense(f, kernel, scale)
    found = kronecker_low_rank(f, kernel, scale)
    assert (
        found.rank
        == side_rank(f, "w1", kernel) * side_rank(f, "w2", kernel)
        == torch.linalg.matrix_rank(expected)
    )
    assert found.error == 0
    torch.testing.assert_close(found.B @ found.A, expected, rtol=0, atol=1e-12)
    assert found.norm == pytest.approx(float(expected.norm()))


@pytest.mark.parametrize(("options", "kernel"), SHAPES)
@pytest.mark.parametrize("flat", [False, True])
def test_every_rank_is_the_best_there_is(options, kernel, flat):
    f = factors(options, kernel)
    expected = dense(f, kernel, -2.0, flat)
    values = torch.linalg.svdvals(expected)
    for rank in (1, 3, 7):
        found = kronecker_low_rank(f, kernel, -2.0, rank, flat)
        assert found.rank == min(rank, int((values > 1e-9).sum()))
        lost = float((found.B @ found.A - expected).norm() / expected.norm())
        best = float(values[found.rank :].norm() / values.norm())
        assert lost == pytest.approx(best, abs=1e-9) == pytest.approx(found.error, abs=1e-9)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_share_of_energy_takes_the_fewest(share):
    f = factors({"r": 2}, ())
    values = torch.linalg.svdvals(dense(f, ()))
    energy = values.square().cumsum(0) / values.square().sum()
    wanted = next(k for k in itertools.count(1) if energy[k - 1] >= share)
    found = kronecker_low_rank(f, (), 1.0, share)
    assert found.rank == wanted
    assert 1 - found.error**2 >= share


def test_all_energy_is_all_that_is_there():
    f = factors({"r": 2}, ())
    assert (
        kronecker_low_rank(f, (), 1.0, 1.0).rank
        == kronecker_low_rank(f).rank
        == 2 * min(f.w1.shape)
    )


def test_a_zero_delta_has_one_zero_rank():
    f = factors({"r": 2}, ())._replace(w1=torch.zeros(5, 6, dtype=torch.float64))
    for rank in (None, 3, 0.5):
        found = kronecker_low_rank(f, (), 1.0, rank)
        assert not found.A.any() and not found.B.any()
        assert (found.error, found.norm) == (0, 0)


def test_factors_keep_their_dtype():
    f = factors({"r": 2}, (), dtype=torch.float32)
    found = kronecker_low_rank(f)
    assert {found.A.dtype, found.B.dtype} == {torch.float32}
    torch.testing.assert_close(found.B @ found.A, dense(f, ()), rtol=1e-5, atol=1e-5)


def rearranged(W, a, b):
    """A row for each element of W1, a column for each of W2: the definition, element by element."""
    rows, columns = W.shape
    c, d = rows // a, columns // b
    result = torch.empty(a * b, c * d, dtype=W.dtype)
    for i, j, p, q in itertools.product(range(a), range(b), range(c), range(d)):
        result[i * b + j, p * d + q] = W[i * c + p, j * d + q]
    return result


@pytest.mark.parametrize(("options", "kernel"), SHAPES)
def test_the_nearest_product_to_a_sum(options, kernel):
    terms = [
        (0.7, factors(options, kernel, 1)),
        (-1.3, factors(options, kernel, 2)),
        (0.4, factors(options, kernel, 3)),
    ]
    whole = sum(factor * kronecker_weight(f, kernel).flatten(1) for factor, f in terms)
    found = nearest_product(terms, kernel=kernel)
    a, b = found.W1.shape
    values = torch.linalg.svdvals(rearranged(whole, a, b))
    product = torch.kron(found.W1, found.W2_a @ found.W2_b)
    lost = float((product - whole).norm() / whole.norm())
    assert lost == pytest.approx(float(values[1:].norm() / values.norm()), abs=1e-9)
    assert found.error == pytest.approx(lost, abs=1e-9)
    assert found.norm == pytest.approx(float(whole.norm()))
    cut = nearest_product(terms, 1, kernel)
    assert cut.W2_a.shape[1] == 1
    lost = float((torch.kron(cut.W1, cut.W2_a @ cut.W2_b) - whole).norm() / whole.norm())
    assert cut.error == pytest.approx(lost, abs=1e-9)


def test_one_term_is_its_own_nearest_product():
    f = factors({"r": 2}, (3, 3))
    found = nearest_product([(-3.0, f)], 2, (3, 3))
    assert found.error == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(
        torch.kron(found.W1, found.W2_a @ found.W2_b), dense(f, (3, 3), -3.0), rtol=0, atol=1e-11
    )


def test_opposite_terms_leave_nothing():
    f = factors({"r": 2}, ())
    found = nearest_product([(1.0, f), (-1.0, f)])
    assert float(torch.kron(found.W1, found.W2_a @ found.W2_b).norm()) < 1e-12


def test_a_rank_above_the_smaller_side_is_filled_up():
    """W2 [2, 60] of rank 8: a combination has the tensors that the config asks for."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(3600, 2, bias=False)),
        config := LoKrConfig(r=8, target_modules=["0"]),
    )
    layer = model.base_model.model[0]
    with torch.no_grad():
        for parameter in layer.adapter_parameters("default"):
            parameter.normal_()
    errors = model.add_weighted_adapter(["default"], [2.0], "twice", "svd")
    assert errors["0"] < 1e-6
    assert layer.lokr_w2_b["twice"].shape == layer.lokr_w2_b["default"].shape == (config.r, 60)
    torch.testing.assert_close(
        layer.get_delta_weight("twice"), 2 * layer.get_delta_weight("default"), rtol=1e-4, atol=1e-4
    )


def test_a_trained_scalar_is_converted_without_a_warning():
    config = LoKrConfig(r=2, target_modules=["0"], use_scalar=True, init_weights=False)
    layer = get_peft_model(nn.Sequential(nn.Linear(12, 12)), config).base_model.model[0]
    layer.lokr_scalar["default"].data.fill_(0.5)
    torch.set_warn_always(True)  # torch warns once in a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            low = layer.low_rank_factors("default")
    finally:
        torch.set_warn_always(False)
    torch.testing.assert_close(low.B @ low.A, layer.get_delta_weight("default").detach())


CONVOLUTIONS = {
    "1d": lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1),
    "2d": lambda: nn.Conv2d(8, 12, (3, 2), dilation=2),
    "2d-circular": lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"),
    "2d-pointwise": lambda: nn.Conv2d(8, 12, 1),
    "2d-groups": lambda: nn.Conv2d(8, 12, 3, groups=4),
    "2d-depthwise": lambda: nn.Conv2d(8, 16, 3, groups=8),
    "3d": lambda: nn.Conv3d(8, 12, 2, padding=1),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"r": 1},
        {"r": 1, "use_effective_conv2d": True},
        {"r": 9},
        {"r": 9, "kronecker_layout": "flat"},
    ],
)
def test_convolutions_become_convolutions(kind, options, tmp_path):
    """`A` with the kernel, `B` over points; in groups each group has rows of `A` to itself."""
    torch.manual_seed(0)
    base = nn.Sequential(CONVOLUTIONS[kind]()).eval()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = LoKrConfig(alpha=3, target_modules=["0"], init_weights=False, **options)
    model = get_peft_model(base, config).eval()
    size = model.base_model.model[0].geometry
    x = torch.randn(2, 8, *[9] * len(size.kernel_size))
    expected = model(x)
    converted = save_as_lora(tmp_path, model)
    assert converted.error < 1e-7
    plain = nn.Sequential(CONVOLUTIONS[kind]())
    plain.load_state_dict(before)
    loaded = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert loaded.base_model.model[0].lora_A["default"].weight.shape[1:] == (8, *size.kernel_size)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)


def test_each_group_of_a_convolution_is_approximated_by_itself():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(8, 12, 3, groups=2))
    model = get_peft_model(base, LoKrConfig(r=9, target_modules=["0"], init_weights=False))
    delta = model.base_model.model[0].get_delta_weight("default").detach().double().flatten(1)
    converted = convert_to_lora(model, 4)
    state = converted.state_dict
    A, B = (
        state["base_model.model.0.lora_A.weight"].double(),
        state["base_model.model.0.lora_B.weight"].double(),
    )
    assert A.shape == (4, 8, 3, 3) and B.shape == (12, 2, 1, 1)
    lost = 0.0
    for group in range(2):
        own, found = (
            delta[6 * group : 6 * group + 6],
            B[6 * group : 6 * group + 6].flatten(1) @ A[2 * group : 2 * group + 2].flatten(1),
        )
        inside = found.view(6, 8, 9)[:, 4 * group : 4 * group + 4]
        assert not found.view(6, 8, 9)[:, 4 - 4 * group : 8 - 4 * group].any()
        best = float(torch.linalg.svdvals(own)[2:].norm())
        assert float((inside.flatten(1) - own).norm()) == pytest.approx(best, rel=1e-5)
        lost += best**2
    assert converted.error == pytest.approx(math.sqrt(lost) / float(delta.norm()), rel=1e-5)
    with pytest.raises(
        ValueError, match=r"`0`: `rank`=3 must be a multiple of the layer's 2 groups"
    ):
        convert_to_lora(model, 3)


def test_a_combination_of_convolutions_is_loaded_again(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Conv1d(8, 12, 3))
    options = {"target_modules": ["0", "1"], "init_weights": False}
    model = get_peft_model(
        base, LoKrConfig(r=1, use_effective_conv2d=True, decompose_both=True, **options), "a"
    )
    model.add_adapter("b", LoKrConfig(r=9, alpha=2, rank_pattern={"0": 2}, **options))
    errors = model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "new", "svd", svd_rank=2)
    for path, layer in model.base_model.named_tuner_layers():
        whole = (
            0.5 * layer.get_delta_weight("a").double() - 2 * layer.get_delta_weight("b").double()
        )
        lost = ((layer.get_delta_weight("new").double() - whole).norm() / whole.norm()).detach()
        assert 0 < errors[path] < 1 and errors[path] == pytest.approx(float(lost), rel=1e-4)
        assert layer.scaling["new"] == 1
    expected = [layer.get_delta_weight("new") for layer in model.base_model.tuner_layers()]
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "new")
    for layer, delta in zip(loaded.base_model.tuner_layers(), expected, strict=True):
        assert torch.equal(layer.get_delta_weight("default"), delta)


def test_orders_of_elements_that_can_not_be_added():
    options = {"target_modules": ["0"], "init_weights": False, "kronecker_layout": "flat"}
    model = get_peft_model(nn.Sequential(nn.Conv1d(16, 64, 3)), LoKrConfig(r=9, **options), "a")
    model.add_adapter("b", LoKrConfig(r=1, **options))
    with pytest.raises(
        ValueError,
        match=r"`0`: adapters of `kronecker_layout` 'flat' can be combined only if `W2` is full",
    ):
        model.add_weighted_adapter(["a", "b"], [1, 1], "new", "svd")
    whole = model.add_weighted_adapter(["a"], [2.0], "new", "svd", svd_rank=9)
    assert whole["0"] < 1e-6
    layer = model.base_model.model[0]
    torch.testing.assert_close(layer.get_delta_weight("new"), 2 * layer.get_delta_weight("a"))
    model.add_adapter("c", LoKrConfig(r=9, decompose_factor=2, **options))
    with pytest.raises(ValueError, match=r"the same `decompose_factor`: a has -1, c has 2"):
        model.add_weighted_adapter(["a", "c"], [1, 1], "other", "svd")
