# SPDX-License-Identifier: Apache-2.0
"""LoRA and DoRA layers: what they compute, merge and refuse, on every kind of layer they adapt."""

import copy
import json
import math
from unittest.mock import ANY

import pytest
import torch
import torch.nn.functional as F
from helpers.models import llama
from helpers.states import assert_unchanged, snapshot
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft
from peft import (
    LoKrConfig,
    LoraConfig,
    PolyConfig,
    VBLoRAConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.helpers import DoraCaching
from peft.tuners.lora import Embedding, Linear
from peft.tuners.lora import base as lora_base
from peft.tuners.lora.layer import Conv2d, LoraLayer
from peft.utils.hotswap import hotswap_adapter

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def transformers_conv1d():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(8, 6)
    nn.init.normal_(layer.bias)
    return layer


def scaled_embedding():
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    return BartScaledWordEmbedding(10, 6, 0, embed_scale=3.0)


def ids():
    return torch.randint(1, 10, (3, 4))  # 0 stands for padding, which has no gradient


# A layer, and inputs for it.
KINDS = {
    "linear": (lambda: nn.Linear(6, 8), lambda: torch.randn(5, 6).double()),
    "linear, no bias, 3d": (
        lambda: nn.Linear(6, 8, bias=False),
        lambda: torch.randn(2, 5, 6).double(),
    ),
    "transformers.Conv1D": (transformers_conv1d, lambda: torch.randn(2, 5, 6).double()),
    "embedding": (lambda: nn.Embedding(10, 6), ids),
    "scaled embedding": (scaled_embedding, ids),
    "conv1d": (
        lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1),
        lambda: torch.randn(2, 4, 9).double(),
    ),
    "conv2d dilated": (
        lambda: nn.Conv2d(4, 8, (1, 3), padding="same", dilation=2, bias=False),
        lambda: torch.randn(2, 4, 6, 6).double(),
    ),
    "conv2d circular": (
        lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"),
        lambda: torch.randn(2, 4, 6, 6).double(),
    ),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2), lambda: torch.randn(1, 4, 3, 3, 3).double()),
}
FORMS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
}


def shaken(model):
    """All of an adapter at random, lengths near what they were."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.mul_(
                    torch.rand_like(parameter) + 0.5
                ) if "magnitude" in name else parameter.normal_(0, 0.5)
    return model


def make(layer, dtype=torch.float64, **fields):
    """A model of one adapted layer, in evaluation."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["0"], **fields})
    return shaken(get_peft_model(nn.Sequential(layer.to(dtype)).eval(), config))


def pieces(layer, name="default"):
    """A layer's `A [r, in · taps]`, `B [out, r]`, `m [out]` or None."""
    if name in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    else:
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    m = layer.lora_magnitude_vector[name].weight if name in layer.lora_magnitude_vector else None
    return A.flatten(1), B.flatten(1), None if m is None else m.flatten()


def textbook(layer, weight, *names, plain=None):
    """The weight after adapters, one after the other: `m ⊙ (W' + s·B·A) / ‖W + s·B·A‖`, and without
    lengths `W' + s·B·A`.
    """
    plain = weight if plain is None else plain
    is_stored_by_input = isinstance(layer, Embedding) or type(layer.base_layer).__name__ == "Conv1D"
    rows, first = (weight.T, plain.T) if is_stored_by_input else (weight, plain)
    shape = rows.shape
    rows, first = rows.flatten(1), first.flatten(1)
    for name in names or ["default"]:
        A, B, m = pieces(layer, name)
        r = layer.r[name]
        s = layer.lora_alpha[name] / (math.sqrt(r) if layer.use_rslora[name] else r)
        rows = rows + s * (B @ A)
        if m is not None:
            rows = rows * (m / (first + s * (B @ A)).norm(dim=1)).unsqueeze(1)
    rows = rows.view(shape)
    return rows.T if is_stored_by_input else rows


def computed(base, weight, x):
    """What a layer computes with another weight."""
    other = copy.deepcopy(base)
    other.weight = nn.Parameter(weight.detach().clone())
    with torch.no_grad():
        return other(x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_merging_and_back(kind, form):
    build, inputs = KINDS[kind]
    model, x = make(build(), **FORMS[form]), inputs()
    layer = model.base_model.model[0]
    base, weight = layer.base_layer, layer.base_layer.weight.detach().clone()
    expected = computed(base, textbook(layer, weight), x)
    assert not torch.allclose(expected, base(x), atol=1e-2)
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(base.weight, textbook(layer, weight))
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(base.weight, weight)
    torch.testing.assert_close(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_gives_the_weight_back_to_the_bit(kind, dtype):
    build, _ = KINDS[kind]
    model = make(build(), dtype, use_dora=True)
    model.add_adapter("b", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    model.add_adapter(
        "c", LoraConfig(r=1, target_modules=["0"], use_dora=True, init_lora_weights=False)
    )
    shaken(model)
    layer = model.base_model.model[0].base_layer
    weight = layer.weight.detach().clone()
    model.merge_adapter(["default"])
    model.merge_adapter(["b", "c"])
    assert not torch.equal(layer.weight, weight)
    model.base_model.model[0].set_scale("default", 7)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_apply_one_after_the_other(kind):
    """Sums add up; a DoRA adapter scales what is there, by the length that the plain weight has
    with its own delta.
    """
    build, inputs = KINDS[kind]
    model, x = make(build(), use_dora=True), inputs()
    model.add_adapter("plain", LoraConfig(r=1, target_modules=["0"], use_rslora=True))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["0"], use_dora=True))
    shaken(model)
    layer = model.base_model.model[0]
    weight = layer.base_layer.weight.detach().clone()
    for names in (["default", "plain", "other"], ["other", "plain", "default"], ["plain", "other"]):
        model.base_model.set_adapter(names)
        expected = computed(layer.base_layer, textbook(layer, weight, *names), x)
        torch.testing.assert_close(model(x), expected)
        model.merge_adapter(names[:1])
        model.merge_adapter(names[1:])
        torch.testing.assert_close(model(x), expected)
        model.unmerge_adapter()
        assert torch.equal(layer.base_layer.weight, weight)


@pytest.mark.parametrize("form", ["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, form):
    """Those of the textbook formula, in which a row's length has none; finite differences where
    there is no length.
    """
    build, inputs = KINDS[kind]
    model, x = make(build(), **FORMS[form]), inputs()
    layer = model.base_model.model[0]
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == (3 if form == "dora" else 2)
    model(x).square().sum().backward()
    gradients = [p.grad for p in parameters]

    A, B, m = pieces(layer)
    if m is None:
        torch.autograd.gradcheck(lambda *_: model(x), parameters, fast_mode=True)
        return
    base = layer.base_layer
    s = layer.scaling["default"]
    by_input = isinstance(layer, Embedding) or type(base).__name__ == "Conv1D"
    rows = (base.weight.T if by_input else base.weight).detach()
    total = rows.flatten(1) + s * (B @ A)
    weight = ((m / total.detach().norm(dim=1)).unsqueeze(1) * total).view(rows.shape)
    expected = torch.func.functional_call(base, {"weight": weight.T if by_input else weight}, (x,))
    for gradient, other in zip(
        gradients, torch.autograd.grad(expected.square().sum(), parameters), strict=True
    ):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "embedding" not in kind])
@pytest.mark.parametrize("form", ["lora", "dora"])
def test_dropout_in_training(kind, form):
    """On the adapter's input, and on DoRA's part of the base output; bias and the base's own part
    have none.
    """
    build, inputs = KINDS[kind]
    model, x = make(build(), lora_dropout=0.4, **FORMS[form]), inputs()
    layer = model.base_model.model[0]
    expected = model(x)
    torch.testing.assert_close(
        expected, computed(layer.base_layer, textbook(layer, layer.base_layer.weight), x)
    )
    model.train()
    torch.manual_seed(3)
    found = model(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.4)
    plain = copy.deepcopy(layer.base_layer)
    plain.bias = None
    if type(plain).__name__ == "Conv1D":
        plain.bias = nn.Parameter(torch.zeros(8).double())
    change = computed(plain, textbook(layer, plain.weight), dropped) - plain(dropped)
    torch.testing.assert_close(found, layer.base_layer(x) + change)


def test_embeddings_have_no_dropout_and_no_gradient_for_padding():
    model = make(nn.Embedding(10, 6, padding_idx=1), lora_dropout=0.5, use_dora=True).train()
    x = torch.tensor([[1, 2, 3, 1]])
    assert torch.equal(model(x), model(x))
    model(x).sum().backward()
    gradient = model.base_model.model[0].lora_embedding_A["default"].grad
    assert [i for i in range(10) if gradient[:, i].any()] == [2, 3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", False])
@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing(kind, init, dora):
    build, inputs = KINDS[kind]
    base = nn.Sequential(build()).eval()
    x = inputs() if "embedding" in kind else inputs().float()
    expected = base(x)
    if init == "orthogonal" and "conv" in kind:
        init = "gaussian"  # this start is for linear layers
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["0"], use_dora=dora, init_lora_weights=init)
    )
    if init is False:
        assert not torch.allclose(model(x), expected, atol=1e-3)
    else:
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_convolutions_in_groups():
    """`A` sees all channels, `B` goes by groups: the delta has no place in the weight."""
    base = nn.Conv2d(4, 8, 3, groups=2)
    model, x = make(base, r=4, lora_bias=True), torch.randn(2, 4, 6, 6).double()
    layer = model.base_model.model[0]
    assert isinstance(layer, Conv2d)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"]
    expected = base(x)
    for g in range(2):
        h = F.conv2d(x, A[2 * g : 2 * g + 2])
        out = slice(4 * g, 4 * g + 4)
        expected[:, out] += 0.75 * (
            torch.einsum("or,brhw->bohw", B.weight[out].flatten(1), h) + B.bias[out].view(-1, 1, 1)
        )
    torch.testing.assert_close(model(x), expected)
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with pytest.raises(
            NotImplementedError, match="Merging is not supported for Conv2d layers with groups > 1"
        ):
            merge()
    assert_unchanged(before, model)
    for form in FORMS.values():
        found = make(nn.Conv2d(4, 8, 3, groups=2), **form)(x)
        assert found.isfinite().all()
    with pytest.raises(
        ValueError, match=r"`0`: `r`=3 must be divisible by the convolution's groups, 2"
    ):
        get_peft_model(nn.Sequential(base), LoraConfig(r=3, target_modules=["0"]))


@pytest.mark.parametrize("kind", ["linear", "transformers.Conv1D", "conv1d"])
def test_a_bias_of_its_own(kind):
    build, inputs = KINDS[kind]
    model, x = make(build(), lora_bias=True), inputs()
    layer = model.base_model.model[0]
    base = layer.base_layer
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    expected = computed(base, textbook(layer, weight), x)
    own = 1.5 * layer.lora_B["default"].bias
    expected = expected + (own.view(-1, 1) if kind == "conv1d" else own)
    torch.testing.assert_close(model(x), expected)
    model.add_adapter(
        "b", LoraConfig(r=1, target_modules=["0"], lora_bias=True, init_lora_weights=False)
    )
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter(["b"])
    model.unmerge_adapter()
    assert torch.equal(base.weight, weight) and torch.equal(base.bias, bias)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_a_bias_that_can_not_be_merged():
    with pytest.warns(
        peft.PeftWarning,
        match="`lora_bias=True` was passed but the targeted layer of type Linear has no bias",
    ):
        model = make(nn.Linear(6, 8, bias=False), lora_bias=True)
    model.base_model.model.append(nn.Linear(8, 8))
    before = snapshot(model)
    with pytest.raises(
        NotImplementedError, match="Adapter default has `lora_bias=True` and the base layer no bias"
    ):
        model.merge_adapter()
    assert_unchanged(before, model)
    model = make(nn.Linear(6, 8), lora_bias=True)
    model.add_adapter("dora", LoraConfig(r=1, target_modules=["0"], use_dora=True))
    with pytest.raises(NotImplementedError, match="DoRA adapter can't be merged after default"):
        model.merge_adapter(["default", "dora"])
    model.merge_adapter(["dora", "default"])
    model.unmerge_adapter()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_20", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_starting_from_the_weight(start, dora, tmp_path):
    """`ΔW = s · (B·A - B₀·A₀)`; the base stays what it is, and a file means the same to others, who
    take `B₀·A₀` off the weight.
    """
    from transformers.pytorch_utils import Conv1D

    def fresh():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), Conv1D(10, 8), nn.Linear(10, 6)).eval()

    base, x = fresh(), torch.randn(4, 6)
    expected = base(x)
    config = LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights=start, use_dora=dora)
    model = get_peft_model(base, config)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    layers = [model.base_model.model[i] for i in (0, 1)]
    firsts = [tuple(t.detach().clone() for t in pieces(layer)[:2]) for layer in layers]
    shaken(model)
    weights = []
    for layer, (A0, B0) in zip(layers, firsts, strict=True):
        is_conv1d = isinstance(layer.base_layer, Conv1D)
        A, B, m = pieces(layer)
        rest = (
            layer.base_layer.weight.T if is_conv1d else layer.base_layer.weight
        ) - layer.scaling["default"] * B0 @ A0
        rows = rest + layer.scaling["default"] * B @ A
        rows = rows if m is None else rows * (m / rows.norm(dim=1)).unsqueeze(1)
        weights.append(rows.T if is_conv1d else rows)
    other = fresh()
    with torch.no_grad():
        for i, weight in enumerate(weights):
            other[i].weight.copy_(weight)
    trained = other(x)
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(model(x), trained, **close)
    assert not any("start" in name for name in model.state_dict())
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(fresh(), tmp_path)
    torch.testing.assert_close(again(x), trained, **close)
    if not dora:
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path)
        plain = peft.PeftModel.from_pretrained(fresh(), tmp_path / "plain")
        assert (plain.peft_config["default"].r, plain.peft_config["default"].init_lora_weights) == (
            6,
            True,
        )
        torch.testing.assert_close(plain(x), trained, **close)
    model.merge_adapter()
    torch.testing.assert_close(model(x), trained, **close)
    assert torch.equal(model.unload()(x), expected)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "alpha_pattern": {"^1": 3}}, {"use_dora": True}]
)
def test_a_start_by_random_numbers_is_in_its_file(options, tmp_path):
    """The file is a plain adapter of twice the rank, which others compute as such; here it is one
    of its own rank again.
    """

    def fresh():
        torch.manual_seed(1)
        return (
            nn.Sequential(nn.Embedding(9, 40), nn.Linear(40, 30), nn.Linear(30, 20)).double().eval()
        )

    def save(model, folder):
        shaken(model)
        model.save_pretrained(folder)
        return model(ids)

    ids = torch.tensor([[1, 2, 3]])
    fields = {
        "r": 3,
        "rank_pattern": {"^1": 2},
        "target_modules": ["0", "1", "2"],
        "init_lora_weights": "pissa_niter_1",
        **options,
    }
    model = get_peft_model(fresh(), LoraConfig(**fields))
    torch.testing.assert_close(
        model(ids), fresh()(ids)
    )  # without effect, however far its start is from the best
    trained = save(model, tmp_path)

    content = json.loads((tmp_path / "adapter_config.json").read_text())
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert (content["init_lora_weights"], content["r"]) == (True, 6)
    x, base = ids, fresh()
    for i in range(3):
        names = [
            f"base_model.model.{i}.lora_{n}"
            for n in (("embedding_A", "embedding_B") if i == 0 else ("A.weight", "B.weight"))
        ]
        A, B = (state[name] for name in names)
        r = 4 if i == 1 else 6
        assert A.shape[0] == B.shape[1] == r
        alpha = (
            next(iter(content["alpha_pattern"].values()))
            if i == 1 and content["alpha_pattern"]
            else content["lora_alpha"]
        )
        delta = alpha / (math.sqrt(r) if content["use_rslora"] else r) * (B @ A).double()
        weight = base[i].weight.data + (delta.mT if i == 0 else delta)
        if options.get("use_dora"):
            rows = weight.mT if i == 0 else weight
            rows = rows * (
                state[f"base_model.model.{i}.lora_magnitude_vector"] / rows.norm(dim=1)
            ).unsqueeze(1)
            weight = rows.mT if i == 0 else rows
        x = weight[x] if i == 0 else x @ weight.mT + base[i].bias
    torch.testing.assert_close(x, trained, atol=1e-5, rtol=1e-4)

    again = peft.PeftModel.from_pretrained(fresh(), tmp_path, is_trainable=True)
    torch.testing.assert_close(again(ids), trained, atol=1e-5, rtol=1e-4)
    assert again.peft_config["default"].to_dict() == {
        **model.peft_config["default"].to_dict(),
        "auto_mapping": ANY,
    }
    assert get_peft_model_state_dict(again).keys() == state.keys()
    assert all(
        torch.equal(t, get_peft_model_state_dict(model)[k])
        for k, t in get_peft_model_state_dict(again).items()
    )
    more = save(
        again, tmp_path / "more"
    )  # trained on and put into an adapter that is there, as trainers do
    model.load_adapter(tmp_path / "more", "default")
    torch.testing.assert_close(model(ids), more, atol=1e-5, rtol=1e-4)
    if not options.get("use_dora"):
        hotswap_adapter(model, tmp_path, "default")
        torch.testing.assert_close(model(ids), trained, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "starts",
    [(True, "pissa"), ("olora", True), ("pissa", "olora"), ("gaussian", True), ("pissa", "pissa")],
)
def test_values_for_an_adapter_of_another_start(starts, tmp_path):
    """They mean another delta where either start is a part of the base weight, which only loading
    under a new name gives.
    """
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(2, 6)
    model, other = (
        get_peft_model(
            copy.deepcopy(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights=start)
        ).eval()
        for start in starts
    )
    shaken(other)
    other.save_pretrained(tmp_path)
    before = model(x)
    if starts[0] != starts[1] and {*starts} & {"pissa", "olora"}:
        with pytest.raises(ValueError, match="`init_lora_weights`=.* load it under a new name"):
            model.load_adapter(tmp_path, "default")
        assert torch.equal(model(x), before)
        model.load_adapter(tmp_path, "new")
        model.set_adapter("new")
    else:
        model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model(x), other(x))


def test_starts_that_are_not_in_a_file(tmp_path):
    model = make(nn.Linear(6, 8), init_lora_weights="pissa")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "init_lora_weights": "pissa_niter_4"}))
    with pytest.warns(UserWarning, match="drew random numbers that its file does not have"):
        LoraConfig.from_pretrained(tmp_path)
    file.write_text(json.dumps({**content, "init_lora_weights": "corda", "corda_config": {}}))
    with pytest.raises(
        NotImplementedError, match="'corda' changed the base weight by data that is not in its file"
    ):
        LoraConfig.from_pretrained(tmp_path)


def test_only_a_start_from_the_weight_can_be_taken_out(tmp_path):
    model = make(nn.Linear(6, 8))
    with pytest.raises(
        ValueError, match="`path_initial_model_for_weight_conversion` is not supported"
    ):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path)
    assert not (tmp_path / "plain").exists()


def test_starts_that_do_not_fit():
    def refuse(message, layer, **fields):
        base = nn.Sequential(layer)
        before = snapshot(base)
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ["0"], **fields}))
        assert_unchanged(before, base)

    refuse(
        "`0`: `r`=4 is more than the 3 singular values", nn.Linear(3, 8), init_lora_weights="pissa"
    )
    refuse(
        "'olora' is for linear layers, not for convolutions",
        nn.Conv1d(8, 8, 1),
        init_lora_weights="olora",
    )
    refuse(
        "'orthogonal' is for linear layers, not for convolutions",
        nn.Conv1d(8, 8, 1),
        init_lora_weights="orthogonal",
    )
    refuse(
        "needs a positive alpha, found 0",
        nn.Linear(8, 8),
        init_lora_weights="pissa",
        alpha_pattern={"0": 0},
    )
    refuse(
        "Orthogonal initialization requires the LoRA rank to be even, got 3",
        nn.Linear(8, 8),
        init_lora_weights="orthogonal",
        rank_pattern={"0": 3},
    )
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(
        NotImplementedError, match="reads the base weight, which is on the meta device"
    ):
        get_peft_model(empty, LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa"))


def test_embeddings_that_can_not_be_adapted():
    base = nn.Sequential(nn.Embedding(10, 8, max_norm=1.0))
    with pytest.raises(ValueError, match="`0`: an embedding with `max_norm` rewrites its rows"):
        get_peft_model(base, LoraConfig(target_modules=["0"]))
    base = nn.Sequential(nn.Embedding(8, 8))
    with pytest.raises(ValueError, match="`0`: `lora_bias`=True is not supported for embeddings"):
        get_peft_model(base, LoraConfig(target_modules=["0"], lora_bias=True))
    for config in (LoKrConfig, VBLoRAConfig, PolyConfig):
        with pytest.raises(TypeError, match=r"Target module Embedding\(8, 8\) is not supported"):
            get_peft_model(base, config(target_modules=["0"]))
    assert type(base[0]) is nn.Embedding


def test_all_linear_does_not_mean_embeddings():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    assert {type(layer) for layer in model.base_model.tuner_layers()} == {Linear}


def test_the_scale_and_rank_of_each_layer():
    base = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    fields = {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"1": 2},
        "alpha_pattern": {"2": 1},
        "target_modules": ["0", "1", "2"],
    }
    layers = get_peft_model(base, LoraConfig(**fields)).base_model.model
    assert [layer.scaling["default"] for layer in layers] == [1.5, 3.0, 0.25]
    assert [layer.lora_A["default"].weight.shape[0] for layer in layers] == [4, 2, 4]
    base = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    layers = get_peft_model(base, LoraConfig(**fields, use_rslora=True)).base_model.model
    assert [layer.scaling["default"] for layer in layers] == [3.0, 6 / math.sqrt(2), 0.5]
    layers[0].set_scale("default", 2)
    assert layers[0].scaling["default"] == 6.0
    layers[0].unscale_layer()
    assert layers[0].scaling["default"] == 3.0


class Operations(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_forward_does_no_more_than_it_must():
    """Two products beside the base's, the second added as it is taken; no dropout, casts
    or scale cost anything.
    """

    def run(alpha, dtype=torch.float32, **fields):
        base = nn.Sequential(nn.Linear(6, 8).to(dtype))
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"], **fields)
        model = get_peft_model(base, config, autocast_adapter_dtype=False).train()
        with Operations() as operations, torch.no_grad():
            model(torch.randn(5, 6, dtype=dtype))
        free = ("t", "view", "_unsafe_view", "detach", "transpose", "randn")
        return [name for name in operations.names if name not in free]

    assert run(2) == ["addmm", "mm", "addmm_"]
    assert run(4) == ["addmm", "mm", "addmm_"]
    assert run(2, torch.bfloat16) == ["addmm", "mm", "addmm_"]
    assert "native_dropout" not in run(2, use_dora=True) and "copy_" not in run(2, use_dora=True)


def test_a_scale_is_multiplied_into_the_smaller_factor():
    """Also where the base layer's output may not be overwritten: here a hook has seen it."""
    base = nn.Sequential(nn.Linear(6, 64))
    base[0].register_forward_hook(lambda module, args, output: None)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["0"])).eval()
    sizes = []

    class Multiplied(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mul.Tensor:
                sizes.append(args[0].numel())
            return function(*args, **(kwargs or {}))

    with Multiplied(), torch.no_grad():
        model(torch.randn(5, 6))
    assert sizes == [5 * 2]


def test_autocast_and_mixed_precision():
    x = torch.randn(5, 6)
    for layer in (nn.Linear(6, 8), nn.Linear(6, 8).bfloat16()):
        for dora in (False, True):
            base = nn.Sequential(layer)
            model = shaken(
                get_peft_model(base, LoraConfig(r=2, target_modules=["0"], use_dora=dora))
            )
            parameters = [p for name, p in model.named_parameters() if "lora_" in name]
            assert {p.dtype for p in parameters} == {torch.float32}
            adapted = model.base_model.model[0]
            weight = textbook(adapted, layer.weight.float())
            expected = F.linear(x, weight, layer.bias.float())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                for inputs in (x, x.bfloat16()):
                    found = model(inputs)
                    assert found.dtype is torch.bfloat16
                    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.05)
                found.sum().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
            if layer.weight.dtype is torch.bfloat16:
                found = model(x.bfloat16())
                assert found.dtype is torch.bfloat16
                torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)
            model.unload()


@pytest.mark.compile
@pytest.mark.parametrize(
    "kind", ["linear", "transformers.Conv1D", "embedding", "scaled embedding", "conv2d circular"]
)
@pytest.mark.parametrize(
    "fields",
    [{}, {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.3}],
    ids=["lora", "dora", "dropout"],
)
def test_compiled_whole(kind, fields):
    torch._dynamo.reset()
    build, inputs = KINDS[kind]
    model = make(build(), torch.float32, **fields).train("lora_dropout" in fields)
    x = inputs() if "embedding" in kind else inputs().float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        torch.manual_seed(5)
        model.zero_grad()
        result = run(x)
        result.square().sum().backward()
        results.append(
            [result.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
        )
    torch.testing.assert_close(*results)


def test_dora_and_another_method_do_not_share_a_layer():
    """Its factor would be on what the other method adds, or not, as merging has it."""
    config, dora = LoKrConfig(target_modules=["0"]), LoraConfig(target_modules=["0"], use_dora=True)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), dora, mixed=True)
    with pytest.raises(
        ValueError, match="`0`: Linear has an adapter that needs the layer for itself"
    ):
        model.add_adapter("lokr", config)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config, mixed=True)
    with pytest.raises(
        ValueError, match="`use_dora`=True is for layers that no other method adapts"
    ):
        model.add_adapter("dora", dora)
    model.add_adapter("lora", LoraConfig(target_modules=["0"]))


def test_an_adapter_for_each_sample():
    """DoRA too, on an embedding and a linear layer."""
    base = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 8)).double().eval()
    config = LoraConfig(r=2, target_modules=["0", "1"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="a")
    model.add_adapter("b", LoraConfig(r=1, target_modules=["0", "1"], init_lora_weights=False))
    shaken(model)
    x, names = ids(), ["b", "__base__", "a"]
    found = model(x, adapter_names=names)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = model(x[i : i + 1])
        else:
            model.set_adapter(name)
            expected = model(x[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], expected)


def test_the_attributes_that_other_libraries_read():
    model = make(nn.Linear(6, 8), torch.float32, use_dora=True, lora_dropout=0.1)
    layer = model.base_model.model[0]
    assert isinstance(layer, LoraLayer) and isinstance(layer, peft.tuners.lora.LoraLayer)
    assert isinstance(layer.lora_A["default"], nn.Linear) and isinstance(
        layer.lora_B["default"], nn.Linear
    )
    assert (
        isinstance(layer.lora_dropout["default"], nn.Dropout)
        and not layer.lora_dropout["default"].training
    )
    assert (layer.r, layer.lora_alpha, layer.scaling) == (
        {"default": 2},
        {"default": 3},
        {"default": 1.5},
    )
    assert (layer.use_dora, layer.use_rslora, layer.lora_bias) == (
        {"default": True},
        {"default": False},
        {"default": False},
    )
    assert {name for name in layer.state_dict() if "lora_" in name} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
        "lora_magnitude_vector.default.weight",
    }
    model.delete_adapter("default")
    assert not any(
        "default" in getattr(layer, name) for name in (*layer.container_names, *layer.value_names)
    )


def test_what_scripts_read_from_layers():
    from transformers.pytorch_utils import Conv1D

    base = nn.Sequential(nn.Linear(4, 6), Conv1D(8, 6), nn.Embedding(5, 4))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = get_peft_model(base, LoraConfig(target_modules=["0", "1", "2"]))
    assert [layer.fan_in_fan_out for layer in model.base_model.tuner_layers()] == [
        False,
        True,
        True,
    ]
    assert [repr(layer).partition("(")[0] for layer in model.base_model.tuner_layers()] == [
        "lora.Linear",
        "lora.Linear",
        "lora.Embedding",
    ]
    assert model.special_peft_forward_args == {"adapter_names", "alora_offsets"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bias_that_is_not_finite_is_not_merged(value):
    model = make(nn.Linear(4, 6), lora_bias=True)
    layer = next(model.base_model.tuner_layers())
    before = {name: tensor.clone() for name, tensor in layer.base_layer.state_dict().items()}
    layer.lora_B["default"].bias.data[0] = value
    with pytest.raises(
        ValueError, match="NaNs detected in the merged bias. The adapter default seems to be broken"
    ):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in layer.base_layer.state_dict().items()
    )


def test_steps_of_one_generate_share_the_norms(monkeypatch):
    """They are computed once a layer and generate, and are those of the parameters as they are."""
    model = get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_dora=True)
    ).eval()
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    counted, row_norms = [], lora_base.row_norms
    monkeypatch.setattr(
        lora_base, "row_norms", lambda *given: counted.append(1) or row_norms(*given)
    )
    ids = torch.arange(3, 7)[None]

    def generated():
        counted.clear()
        return model.generate(
            input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
        )

    def step_by_step():
        tokens = ids
        for _ in range(6):
            with torch.no_grad():
                scores = model(input_ids=tokens).logits[:, -1]
            tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], 1)
        return tokens

    for change in (
        lambda layer: layer.lora_B["default"].weight,
        lambda layer: layer.lora_A["default"].weight,
        lambda layer: layer.base_layer.weight,
    ):
        for layer in layers:
            change(layer).data.normal_()
        assert torch.equal(generated(), step_by_step())
    for layer in layers:
        layer.set_scale("default", 30)
    assert torch.equal(generated(), step_by_step())
    generated()
    assert len(counted) <= len(layers)
    with DoraCaching():
        torch.testing.assert_close(generated(), step_by_step())
