# SPDX-License-Identifier: Apache-2.0
"""What LyCORIS has beside the plain product, against dense float64 weights: decomposition, a
scalar, scales, shapes, clipping.
"""

import copy

import pytest
import torch
from helpers.models import gpt2, mlp
from torch import nn

from peft import LoKrConfig, PeftModel, get_peft_model
from peft.tuners.lokr.shapes import factor_shapes, shape_problems

LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (5, 24)),
    "linear without bias": (lambda: nn.Linear(24, 40, bias=False), (2, 3, 24)),
    "conv1d": (lambda: nn.Conv1d(16, 24, 3, stride=2, padding=1), (2, 16, 9)),
    "conv2d": (lambda: nn.Conv2d(16, 32, 3, padding=1, padding_mode="reflect"), (2, 16, 6, 6)),
    "conv2d channels last": (
        lambda: nn.Conv2d(16, 32, 3, padding=1).to(memory_format=torch.channels_last),
        (2, 16, 6, 6),
    ),
    "conv2d groups": (lambda: nn.Conv2d(16, 32, 3, padding=1, groups=4), (2, 16, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(8, 16, (2, 3, 1)), (2, 8, 4, 5, 3)),
}
FORMS = {
    "low rank": {"r": 1, "alpha": 3},
    "full": {"full_matrix": True, "decompose_factor": 2},
    "both": {"r": 1, "decompose_both": True, "decompose_factor": 4},
    "tucker": {"r": 1, "alpha": 2, "use_effective_conv2d": True},
    "scalar": {"r": 1, "use_scalar": True, "use_rslora": True},
    "flat": {"r": 16, "kronecker_layout": "flat"},
}


def decomposed(weight, delta, magnitude, by_rows):
    """`m ⊙ (W + ΔW) / ‖W + ΔW‖` in the textbook's order."""
    total = weight + delta
    kept = 0 if by_rows else 1
    lengths = torch.linalg.vector_norm(
        total, dim=[d for d in range(total.dim()) if d != kept], keepdim=True
    )
    return magnitude.double().view(lengths.shape) * total / lengths


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_decomposed_layer_against_the_dense_weight(kind, form, by_rows):
    make, shape = LAYERS[kind]
    base = make()
    plain = copy.deepcopy(base).double()
    config = LoKrConfig(
        target_modules=["0"],
        init_weights=False,
        weight_decompose=True,
        wd_on_output=by_rows,
        **FORMS[form],
    )
    model = get_peft_model(nn.Sequential(base), config)
    layer, x = model.base_model.model[0], torch.randn(shape)
    start = (
        (plain.weight + layer.get_delta_weight("default").double())
        .transpose(0, 0 if by_rows else 1)
        .flatten(1)
        .norm(dim=1)
    )
    torch.testing.assert_close(
        layer.lokr_magnitude["default"].double(), start, atol=1e-5, rtol=1e-5
    )
    with torch.no_grad():
        layer.lokr_magnitude["default"].mul_(torch.rand_like(layer.lokr_magnitude["default"]) + 0.5)
    changed = decomposed(
        plain.weight,
        layer.get_delta_weight("default").double(),
        layer.lokr_magnitude["default"],
        by_rows,
    )
    before = base.weight.detach().clone()
    plain.weight.data = changed.detach()
    expected = plain(x.double()).float()
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(base.weight, before)
    low = layer.low_rank_factors("default")
    torch.testing.assert_close(
        (low.B @ low.A).view_as(before), (changed - before).float(), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("by_rows", [True, False])
def test_gradients_of_a_decomposed_adapter(by_rows):
    """Against autograd through the dense weight, whose lengths are constants."""
    base = nn.Linear(12, 18)
    config = LoKrConfig(
        r=1,
        target_modules=["0"],
        init_weights=False,
        weight_decompose=True,
        wd_on_output=by_rows,
        decompose_both=True,
    )
    model = get_peft_model(nn.Sequential(base), config).double()
    layer, x = model.base_model.model[0], torch.randn(5, 12, dtype=torch.double)
    direction = torch.randn(5, 18, dtype=torch.double)
    (model(x) * direction).sum().backward()
    got = {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}
    layer.zero_grad()
    total = base.weight + layer.get_delta_weight("default")
    lengths = total.detach().norm(dim=1 if by_rows else 0, keepdim=True)
    magnitude = layer.lokr_magnitude["default"].view(lengths.shape)
    (nn.functional.linear(x, magnitude * total / lengths, base.bias) * direction).sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad)


def test_decomposed_adapters_start_without_effect_and_are_saved(tmp_path):
    config = LoKrConfig(r=2, target_modules=["c_attn"], weight_decompose=True, use_scalar=True)
    model, ids = get_peft_model(gpt2(), config).eval(), torch.randint(3, 48, (2, 5))
    plain = gpt2().eval()
    plain.load_state_dict(model.get_base_model().state_dict(), strict=False)
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, base, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lokr_" in name:
                parameter.add_(torch.rand_like(parameter))
    expected = model(input_ids=ids).logits
    assert not torch.allclose(expected, base)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, expected, atol=1e-6, rtol=1e-6)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_decomposed_adapter_has_its_layer_to_itself():
    from peft import LoraConfig

    model = get_peft_model(
        mlp(), LoKrConfig(target_modules=["0"], weight_decompose=True), mixed=True
    )
    with pytest.raises(ValueError, match="needs the layer for itself"):
        model.add_adapter("other", LoraConfig(target_modules=["0"]))


def test_module_dropout_leaves_a_decomposed_adapter_out():
    config = LoKrConfig(
        target_modules=["0"],
        weight_decompose=True,
        init_weights=False,
        module_dropout=0.5,
        rank_dropout=0.2,
    )
    model, x = get_peft_model(mlp(), config).train(), torch.randn(3, 8)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lokr_magnitude["default"].mul_(2)
    base = layer.base_layer(x)
    skipped = sum(torch.allclose(layer(x), base) for _ in range(60))
    assert 15 < skipped < 45


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"r": 4, "alpha": 6}, 1.5),
        ({"r": 4, "alpha": 6, "use_rslora": True}, 3.0),
        ({"r": 4, "alpha": 6, "full_matrix": True}, 1.0),
    ],
)
def test_scales(fields, scale):
    model = get_peft_model(mlp(), LoKrConfig(target_modules=["0"], init_weights=False, **fields))
    layer = model.base_model.model[0]
    W1, W2 = layer.lokr_w1["default"], layer.lokr_w2["default"]
    torch.testing.assert_close(layer.get_delta_weight("default"), scale * torch.kron(W1, W2))


def test_a_scalar_starts_at_zero_and_is_trained():
    model = get_peft_model(mlp(), LoKrConfig(r=1, target_modules=["0"], use_scalar=True))
    layer = model.base_model.model[0]
    assert layer.lokr_scalar["default"].tolist() == [0.0]
    assert all((f != 0).any() for f in layer.factors("default") if f is not None)
    model(torch.randn(3, 8)).sum().backward()
    assert layer.lokr_scalar["default"].grad.abs() > 0


def test_unbalanced_factors_and_patterns():
    config = LoKrConfig(
        r=2,
        target_modules=["conv", "point", "lin", "other"],
        unbalanced_factorization=True,
        conv_r=1,
        conv_alpha=5,
        conv_factor=2,
        factor_pattern={"other": [3, 4], "lin": 4},
        rank_pattern={"lin": 1},
    )
    base = nn.ModuleDict(
        {
            "conv": nn.Conv2d(8, 32, 3),
            "point": nn.Conv2d(8, 32, 1),
            "lin": nn.Linear(8, 32),
            "other": nn.Linear(8, 12),
        }
    )
    layers = dict(get_peft_model(base, config).base_model.named_tuner_layers())
    factors = {path: layer.factors("default")._asdict() for path, layer in layers.items()}
    shapes = {
        path: {name: tuple(t.shape) for name, t in own.items() if t is not None}
        for path, own in factors.items()
    }
    assert shapes == {
        "conv": {"w1": (16, 2), "w2_a": (2, 1), "w2_b": (1, 36)},
        "point": {"w1": (8, 2), "w2": (4, 4, 1, 1)},
        "lin": {"w1": (8, 4), "w2_a": (4, 1), "w2_b": (1, 2)},
        "other": {"w1": (3, 4), "w2": (4, 2)},
    }
    assert [layers[p].r["default"] for p in ("conv", "point", "lin")] == [1, 2, 1]
    assert [layers[p].alpha["default"] for p in ("conv", "point", "lin")] == [5, 8, 8]


def test_rows_of_a_product_for_several_layers(tmp_path):
    shapes = {"w1": [3, 4], "w2_a": [6, 2], "w2_b": [2, 3]}
    config = LoKrConfig(
        r=2,
        target_modules=["0"],
        tensor_shapes={"0": shapes},
        row_offsets={"0": 5},
        init_weights=False,
        weight_decompose=True,
    )
    base = nn.Sequential(nn.Linear(12, 10))
    plain = copy.deepcopy(base)
    model, x = get_peft_model(base, config), torch.randn(4, 12)
    layer = model.base_model.model[0]
    f = layer.factors("default")
    delta = (4 * torch.kron(f.w1, f.w2_a @ f.w2_b))[5:15]
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    torch.testing.assert_close(
        layer.lokr_magnitude["default"], (plain[0].weight + delta).norm(dim=1)
    )
    plain[0].weight.data += delta
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(nn.Sequential(layer.base_layer), tmp_path)
    torch.testing.assert_close(again(x), model(x), atol=1e-6, rtol=1e-6)
    columns = LoKrConfig(**{**config.to_dict(), "wd_on_output": False})
    layer.update_layer(
        "columns", columns, shapes={n: tuple(s) for n, s in shapes.items()}, row_offset=5
    )
    total = layer.base_layer.weight + layer.get_delta_weight("columns")
    torch.testing.assert_close(layer.lokr_magnitude["columns"], total.norm(dim=0))
    low = layer.low_rank_factors("columns")
    assert low.A.shape[1] == 12


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        ({"w1": (2, 2), "w2": (4, 4)}, "8 x 8, the layer has 8 x 10"),
        ({"w1": (2, 2)}, "w2_a, w2_b would be"),
        ({"w1": (2, 2), "w2_a": (4, 2), "w2_b": (3, 5)}, "do not fit together"),
        ({"w1": (2, 2, 1), "w2": (4, 5)}, "w1 is of shape"),
        (
            {"w1": (2, 2), "w1_a": (2, 1), "w1_b": (1, 2), "w2": (4, 5)},
            "are not those of one adapter",
        ),
    ],
)
def test_shapes_that_do_not_fit_a_layer(shapes, problem):
    assert problem in shape_problems(shapes, 8, 10)
    with pytest.raises(ValueError, match="`tensor_shapes`"):
        get_peft_model(
            nn.Sequential(nn.Linear(10, 8)),
            LoKrConfig(target_modules=["0"], tensor_shapes={"0": shapes}),
        )


@pytest.mark.parametrize("kernel", [(), (3,), (3, 3), (1, 1)])
@pytest.mark.parametrize(
    "options", [{"r": 1}, {"r": 9}, {"r": 1, "decompose_both": True, "use_effective_conv2d": True}]
)
def test_shapes_by_rule_fit_their_layer(kernel, options):
    assert shape_problems(factor_shapes(40, 36, kernel, **options), 40, 36, kernel) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"full_matrix": True, "decompose_both": True}, "leaves nothing to decompose"),
        ({"conv_r": 0}, "`conv_r`=0"),
        ({"conv_factor": 0}, "`conv_factor`=0"),
        ({"factor_pattern": {"a": [1, 2, 3]}}, "a factor or a pair"),
        ({"tensor_shapes": {"a": {"w3": [1]}}}, "a dictionary of shapes"),
        ({"row_offsets": {"a": -1}}, "`row_offsets"),
        ({"use_rslora": 1}, "`use_rslora`=1 must be True or False"),
    ],
)
def test_fields_that_are_not_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        LoKrConfig(**fields)


def test_pairs_that_do_not_divide_a_layer():
    with pytest.raises(ValueError, match="does not divide its sizes, 16 and 8"):
        get_peft_model(mlp(), LoKrConfig(target_modules=["0"], factor_pattern={"0": [3, 2]}))
    with pytest.raises(ValueError, match="needs `tensor_shapes`"):
        get_peft_model(mlp(), LoKrConfig(target_modules=["0"], row_offsets={"0": 3}))


def test_clipping_norms():
    config = LoKrConfig(
        r=1, target_modules=["0", "2"], init_weights=False, decompose_both=True, decompose_factor=4
    )
    model = get_peft_model(mlp(), config)
    layers = dict(model.base_model.named_tuner_layers())
    before = {path: layer.get_delta_weight("default").detach() for path, layer in layers.items()}
    norms = {path: float(delta.norm()) for path, delta in before.items()}
    limit = sum(norms.values()) / 2
    found = model.base_model.clip_weight_norms(limit)
    for path, layer in layers.items():
        after = layer.get_delta_weight("default")
        assert found[path] == pytest.approx(min(norms[path], limit), rel=1e-5)
        torch.testing.assert_close(after, before[path] * min(1, limit / norms[path]))
    with pytest.raises(ValueError, match="`largest`=0"):
        model.base_model.clip_weight_norms(0)


def test_what_has_no_product_is_not_combined():
    config = LoKrConfig(target_modules=["0"], weight_decompose=True)
    model = get_peft_model(mlp(), config, "a")
    with pytest.raises(ValueError, match="Adapter a has `weight_decompose`"):
        model.add_weighted_adapter(["a"], [1.0], "b", combination_type="svd")
