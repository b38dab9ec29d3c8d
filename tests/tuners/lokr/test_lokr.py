# SPDX-License-Identifier: Apache-2.0
"""LoKr on models: layers of every kind against the dense product, starts, dropout, patterns, the
layout of Conv1d.
"""

import copy
import json

import pytest
import torch
from helpers.models import gpt2, mlp
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft import LoKrConfig, PeftModel, get_peft_model
from peft.tuners.lokr import kronecker

pytestmark = pytest.mark.quick


def dense(layer, name="default"):
    """`(alpha/r)·(W1 ⊗ W2)` in float64, one `torch.kron` for every tap of the kernel."""

    def stored(key):
        container = getattr(layer, f"lokr_{key}")
        return container[name].double() if name in container else None

    w1, w2, t2 = stored("w1"), stored("w2"), stored("t2")
    kernel = layer.geometry.kernel_size
    if w1 is None:
        w1 = stored("w1_a") @ stored("w1_b")
    if w2 is None and t2 is not None:
        w2 = torch.einsum(
            "ij...,ip,jq->pq...", t2.reshape(*t2.shape[:2], *kernel), stored("w2_a"), stored("w2_b")
        )
    elif w2 is None:
        w2 = stored("w2_a") @ stored("w2_b")
    taps = w2.reshape(w2.shape[0], -1, max(1, torch.tensor(kernel).prod().item() if kernel else 1))
    product = torch.stack(
        [torch.kron(w1, taps[..., k].contiguous()) for k in range(taps.shape[-1])], -1
    )
    weight = product.reshape(*product.shape[:2], *kernel)
    return layer.alpha[name] / layer.r[name] * weight


LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (5, 24)),
    "linear, any leading": (lambda: nn.Linear(24, 40), (2, 3, 4, 24)),
    "conv1d": (lambda: nn.Conv1d(16, 24, 3, stride=2, padding=1), (2, 16, 9)),
    "conv2d": (lambda: nn.Conv2d(16, 32, 3, padding=1, stride=2), (2, 16, 8, 8)),
    "conv2d 1x1": (lambda: nn.Conv2d(16, 32, 1), (2, 16, 4, 4)),
    "conv2d dilated": (
        lambda: nn.Conv2d(16, 32, (3, 2), dilation=2, padding="valid"),
        (2, 16, 8, 8),
    ),
    "conv2d same": (lambda: nn.Conv2d(16, 32, 3, padding="same"), (2, 16, 6, 6)),
    "conv2d groups": (lambda: nn.Conv2d(16, 32, 3, padding=1, groups=4), (2, 16, 6, 6)),
    "conv2d depthwise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), (2, 16, 6, 6)),
    "conv2d circular": (
        lambda: nn.Conv2d(16, 32, 3, padding=1, padding_mode="circular"),
        (2, 16, 6, 6),
    ),
    "conv2d reflect": (
        lambda: nn.Conv2d(16, 32, 3, padding=1, padding_mode="reflect"),
        (2, 16, 6, 6),
    ),
    "conv2d without batch": (lambda: nn.Conv2d(16, 32, 3), (16, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(8, 16, (2, 3, 1), padding=(1, 1, 0)), (2, 8, 4, 5, 3)),
}
FORMS = {
    "low rank": {"r": 1, "alpha": 3},
    "full": {"r": 16},
    "both": {"r": 1, "decompose_both": True, "decompose_factor": 4},
    "tucker": {"r": 1, "alpha": 2, "use_effective_conv2d": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_against_the_dense_product(kind, form):
    make, shape = LAYERS[kind]
    base = make()
    changed = copy.deepcopy(base).double()
    model = get_peft_model(
        nn.Sequential(base), LoKrConfig(target_modules=["0"], init_weights=False, **FORMS[form])
    )
    layer = model.base_model.model[0]
    changed.weight.data += dense(layer)
    x = torch.randn(shape)
    expected = changed(x.double())
    torch.testing.assert_close(model(x), expected.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        layer.get_delta_weight("default"), dense(layer).float(), atol=1e-5, rtol=1e-4
    )
    # Gradients, against those that reach the factors through the dense product.
    direction = torch.randn_like(expected)
    (model(x).double() * direction).sum().backward()
    got = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    layer.zero_grad()
    weight = dense(layer)
    (gradient,) = torch.autograd.grad((changed(x.double()) * direction).sum(), changed.weight)
    (weight * gradient).sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d groups"])
def test_the_product_is_never_built(kind):
    make, shape = LAYERS[kind]
    base = make()
    model = get_peft_model(
        nn.Sequential(base.requires_grad_(False)),
        LoKrConfig(r=1, target_modules=["0"], init_weights=False),
    )
    layer, size = model.base_model.model[0], base.weight.numel()
    x = torch.randn(1, *shape[1:], requires_grad=True)
    if x.dim() > 2:
        x = x[..., :4, :4].detach().requires_grad_()
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


@pytest.mark.parametrize(
    ("init", "zero"), [(True, {"w1", "w1_a"}), ("lycoris", {"w2", "w2_b"}), (False, set())]
)
@pytest.mark.parametrize("both", [True, False])
def test_how_factors_start(init, zero, both):
    model = get_peft_model(
        mlp(), LoKrConfig(r=1, init_weights=init, decompose_both=both, target_modules=["2"])
    )
    layer = model.base_model.model[2]
    factors = {name: f for name, f in layer.factors("default")._asdict().items() if f is not None}
    assert set(factors) == ({"w1_a", "w1_b", "w2_a", "w2_b"} if both else {"w1", "w2_a", "w2_b"})
    for name, factor in factors.items():
        assert (factor == 0).all() == (name in zero)
    x = torch.randn(3, 8)
    assert torch.allclose(model(x), model.get_base_model()(x))
    with model.disable_adapter():
        base = model(x)
    assert torch.allclose(model(x), base) == (init is not False)


def test_rank_dropout_drops_output_rows():
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 4096)),
        LoKrConfig(r=8, rank_dropout=0.25, target_modules=["0"], init_weights=False),
    )
    layer, x = model.base_model.model[0], torch.randn(3, 8)
    whole = layer.eval().delta_activations("default", x)
    dropped = layer.train().delta_activations("default", x)
    gone = (dropped == 0).all(0)
    assert 0.2 < gone.float().mean() < 0.3
    torch.testing.assert_close(dropped[:, ~gone], whole[:, ~gone])
    layer.rank_dropout_scale["default"] = True
    scaled = layer.delta_activations("default", x)
    gone = (scaled == 0).all(0)
    torch.testing.assert_close(scaled[:, ~gone], whole[:, ~gone] / (1 - gone.float().mean()))
    torch.testing.assert_close(layer.get_delta_weight("default") @ x.T, whole.T)


def test_rank_dropout_of_channels():
    model = get_peft_model(
        nn.Sequential(nn.Conv2d(4, 512, 3)),
        LoKrConfig(r=8, rank_dropout=0.5, target_modules=["0"], init_weights=False),
    )
    layer = model.base_model.model[0].train()
    dropped = layer.delta_activations("default", torch.randn(2, 4, 5, 5))
    gone = (dropped == 0).all(0).all(-1).all(-1)
    assert 0.4 < gone.float().mean() < 0.6
    assert (dropped[:, ~gone] != 0).any(-1).any(-1).all()


@pytest.mark.compile
def test_module_dropout_skips_the_adapter():
    model = get_peft_model(
        mlp(), LoKrConfig(r=2, module_dropout=0.5, target_modules=["0"], init_weights=False)
    )
    layer, x = model.base_model.model[0].train(), torch.randn(3, 8)
    whole, base = layer.eval()(x), layer.base_layer(x)
    layer.train()
    outputs = [layer(x) for _ in range(60)]
    skipped = sum(torch.allclose(output, base) for output in outputs)
    assert 15 < skipped < 45
    assert skipped + sum(torch.allclose(output, whole) for output in outputs) == 60
    torch._dynamo.reset()
    torch.compile(model.train(), fullgraph=True, backend="aot_eager")(x).sum().backward()


def test_patterns_of_the_documentation():
    from transformers import OPTConfig, OPTForCausalLM

    opt = OPTForCausalLM(
        OPTConfig(
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=32,
            word_embed_proj_dim=16,
        )
    )
    config = LoKrConfig(
        r=8,
        alpha=16,
        target_modules="all-linear",
        decompose_both=True,
        use_effective_conv2d=True,
        rank_pattern={"^model.decoder.layers.0": 16, r".*layers\.1\..*k_proj": 3, "fc1": 5},
        alpha_pattern={"q_proj": 7},
    )
    model = get_peft_model(opt, config)
    layers = dict(model.base_model.named_tuner_layers())
    assert len(layers) == 12
    for path, layer in layers.items():
        rank = (
            16
            if ".layers.0." in path
            else 3
            if "k_proj" in path
            else 5
            if path.endswith("fc1")
            else 8
        )
        assert layer.r["default"] == rank, path
        assert layer.alpha["default"] == (7 if path.endswith("q_proj") else 16)


def test_conv1d_of_gpt2_and_what_is_not_supported():
    model = get_peft_model(
        gpt2(), LoKrConfig(r=2, target_modules=["c_attn", "c_proj"], init_weights=False)
    ).eval()
    ids = torch.randint(3, 48, (2, 5))
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(
        model.merge_and_unload()(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4
    )
    with pytest.raises(TypeError, match="ConvTranspose2d.*LoKrModel adapts nn.Linear"):
        get_peft_model(nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), LoKrConfig(target_modules=["0"]))


def conv1d_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv1d(16, 24, 3, padding=1)).eval()


def test_the_layout_of_conv1d_is_kept(tmp_path):
    x = torch.randn(2, 16, 7)
    model = get_peft_model(
        conv1d_model(), LoKrConfig(r=8, target_modules=["0"], init_weights=False)
    ).eval()
    expected = model(x)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    assert fields["kronecker_layout"] == "channels"
    assert torch.equal(PeftModel.from_pretrained(conv1d_model(), tmp_path)(x), expected)
    # Without the field the file is another implementation's, whose full W2 of a Conv1d goes by
    # torch.kron on padded shapes.
    del fields["kronecker_layout"]
    path.write_text(json.dumps(fields))
    theirs = PeftModel.from_pretrained(conv1d_model(), tmp_path)
    layer = theirs.base_model.model[0]
    w1, w2 = layer.lokr_w1["default"], layer.lokr_w2["default"]
    plain = conv1d_model()
    plain[0].weight.data += torch.kron(w1, w2).reshape(24, 16, 3)
    torch.testing.assert_close(theirs(x), plain(x), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(theirs(x), expected)
    theirs.save_pretrained(tmp_path)
    assert "kronecker_layout" not in json.loads(path.read_text())
    torch.testing.assert_close(
        PeftModel.from_pretrained(conv1d_model(), tmp_path)(x), plain(x), atol=1e-5, rtol=1e-4
    )


def test_configs_without_conv1d_say_nothing_of_layout(tmp_path):
    get_peft_model(mlp(), LoKrConfig(target_modules=["0"])).save_pretrained(tmp_path)
    assert "kronecker_layout" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_a_file_with_layer_indices_alone(tmp_path):
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(3)])}
    )
    fields = {
        "peft_type": "LOKR",
        "r": 8,
        "target_modules": ["q"],
        "layers_to_transform": [1],
        "layers_pattern": None,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    save_file(
        {f"base_model.model.layers.1.q.lokr_w{i}": torch.ones(2, 2) for i in (1, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    loaded = PeftModel.from_pretrained(model, tmp_path)
    assert [path for path, _ in loaded.base_model.named_tuner_layers()] == ["layers.1.q"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("fields", [{}, {"decompose_both": True, "r": 2}], ids=["defaults", "both"])
def test_a_traced_layer(fields):
    """The tracer checks its graph against one made without gradients; it leaves nothing behind in
    what is known of shapes.
    """
    config = LoKrConfig(**{"r": 8, "target_modules": ["0"], "init_weights": False, **fields})
    model = get_peft_model(nn.Sequential(nn.Linear(384, 384)), config).eval()
    layer, x = model.base_model.model[0], torch.randn(4, 384)
    sizes = []
    for _ in range(2):
        traced = torch.jit.trace(model, x)
        sizes.append(
            [
                kept.cache_info().currsize
                for kept in vars(kronecker).values()
                if hasattr(kept, "cache_info")
            ]
        )
    assert sizes[0] == sizes[1] != []
    x = torch.randn(4, 384)
    expected = layer.base_layer(x).double() + x.double() @ dense(layer).T
    torch.testing.assert_close(traced(x).double(), expected, rtol=1e-4, atol=1e-4)
