# SPDX-License-Identifier: Apache-2.0
"""diffusers' models and pipelines with every method: what a user of them does, on tiny random
models.
"""

import copy
import json
import logging
import zlib

import pytest
import torch
from helpers.methods import METHODS
from image_models import flux, flux_inputs, unet, unet_inputs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import peft
from peft.tuners.tuners_utils import BaseTunerLayer

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = pytest.mark.clients
LINEAR = ["to_q", "to_k", "add_q_proj", "ff.net.0.proj", "proj_mlp", "norm1.linear"]
CONVOLUTIONAL = [
    "to_q",
    "to_v",
    "proj_in",
    "conv1",
    "conv_shortcut",
    "conv",
    "ff.net.0.proj",
    "time_emb_proj",
]
# Methods that adapt convolutions, those whose files diffusers can load, with configs that show
# their forms.
CONFIGS = {
    "lokr": ("LOKR", {"decompose_both": True}),
    "lokr-tucker": ("LOKR", {"use_effective_conv2d": True}),
    "lokr-pattern": (
        "LOKR",
        {"rank_pattern": {"conv1": 3}, "alpha_pattern": {"to_q": 1.5}, "decompose_factor": 4},
    ),
    "lora": ("LORA", {}),
    "lora-pattern": ("LORA", {"rank_pattern": {"conv1": 3}, "alpha_pattern": {"to_q": 1.5}}),
}


@pytest.fixture(autouse=True)
def _quiet():
    diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return request.param


def config_of(method, targets=LINEAR, **more):
    """A method's config for clients that know nothing of tasks."""
    one_task = {"n_tasks": 1} if method == "POLY" else {}
    return METHODS[method].config(target_modules=list(targets), **{**one_task, **more})


# --- models
# -------------------------------------------------------------------------------------------------------------
#
#


def flux2():
    torch.manual_seed(1)
    return diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        timestep_guidance_channels=16,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
    ).eval()


def flux2_inputs():
    draw = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(2, 6, 4, generator=draw),
        "encoder_hidden_states": torch.randn(2, 3, 8, generator=draw),
        "timestep": torch.tensor([1.0, 2.0]),
        "img_ids": torch.zeros(6, 4),
        "txt_ids": torch.zeros(3, 4),
        "guidance": torch.ones(2),
    }


def zimage():
    torch.manual_seed(1)
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 4, 8],
        axes_lens=[64, 16, 16],
    ).eval()
    with torch.no_grad():
        model.x_pad_token.normal_()  # made without values
        model.cap_pad_token.normal_()
    return model


def zimage_inputs():
    draw = torch.Generator().manual_seed(2)
    return {
        "x": [torch.randn(4, 1, 4, 4, generator=draw) for _ in range(2)],
        "t": torch.tensor([0.1, 0.2]),
        "cap_feats": [torch.randn(5, 16, generator=draw) for _ in range(2)],
    }


INPUTS = {unet: unet_inputs, flux: flux_inputs, flux2: flux2_inputs, zimage: zimage_inputs}


@torch.no_grad()
def output(model, build, **more):
    result = model(**INPUTS[build](), **more, return_dict=False)[0]
    return torch.stack(list(result)) if isinstance(result, (list, tuple)) else result


@torch.no_grad()
def randomise(model, adapter):
    """Values for an adapter that make it felt."""
    for name, parameter in model.named_parameters():
        if f".{adapter}." in f"{name}.":
            draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 4)


def add(model, config, adapter="a"):
    model.add_adapter(config, adapter)
    randomise(model, adapter)
    return model


def deltas(model, adapter):
    """What an adapter adds to the base weights at scale 1, by module path."""
    return {
        path: layer.get_delta_weight(adapter).detach()
        for path, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and adapter in layer.scaling
    }


@torch.no_grad()
def plain(build, *parts):
    """The base's output with (factor, deltas) added to its weights."""
    model = build()
    for factor, delta in parts:
        for path, value in delta.items():
            model.get_submodule(path).weight.add_(factor * value.to(torch.float32))
    return output(model, build)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def adapter_names(model):
    return {
        name
        for name in model.state_dict()
        if any(key in name for key in ("lokr_", "lora_", "vblora_", "poly_"))
    }


# --- adapters on a model
# ------------------------------------------------------------------------------------------------


def test_several_adapters_with_weights(method):
    model, base = flux(), plain(flux)
    add(model, config_of(method), "a")
    assert not torch.allclose(output(model, flux), base, atol=1e-3)
    add(model, config_of(method, LINEAR[:3]), "b")
    a, b = deltas(model, "a"), deltas(model, "b")
    assert model.active_adapters() == ["b"]
    close(output(model, flux), plain(flux, (1, b)))
    model.set_adapter("a")
    close(output(model, flux), plain(flux, (1, a)))
    model.set_adapters(["a", "b"], [0.5, 2.0])
    assert model.active_adapters() == ["a", "b"]
    close(output(model, flux), plain(flux, (0.5, a), (2.0, b)))
    model.set_adapters("b", 0.3)
    close(output(model, flux), plain(flux, (0.3, b)))
    model.set_adapters(["b", "a"])
    close(output(model, flux), plain(flux, (1, a), (1, b)))
    for switch_off, switch_on in (
        (model.disable_adapters, model.enable_adapters),
        (model.disable_lora, model.enable_lora),
    ):
        switch_off()
        assert torch.equal(output(model, flux), base)
        switch_on()
        close(output(model, flux), plain(flux, (1, a), (1, b)))


def test_scale_of_one_call(method):
    model = add(flux(), config_of(method))
    a = deltas(model, "a")
    for scale in (0.25, 0.0, 3.0):
        close(output(model, flux, joint_attention_kwargs={"scale": scale}), plain(flux, (scale, a)))
        close(output(model, flux), plain(flux, (1, a)))


def test_fusing(method):
    model = add(add(flux(), config_of(method), "a"), config_of(method), "b")
    a, b = deltas(model, "a"), deltas(model, "b")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.fuse_lora()
    close(output(model, flux), plain(flux, (1, b)))
    model.unfuse_lora()
    model.set_adapter("a")
    model.fuse_lora(lora_scale=0.5, safe_fusing=True, adapter_names=["a"])
    close(output(model, flux), plain(flux, (0.5, a)))
    model.unfuse_lora()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_deleting_and_unloading(method):
    base = plain(flux)
    model = add(add(flux(), config_of(method), "a"), config_of(method), "b")
    a = deltas(model, "a")
    model.delete_adapters("b")
    close(output(model, flux), plain(flux, (1, a)))
    model.delete_adapters(["a"])
    assert not hasattr(model, "peft_config")
    assert torch.equal(output(model, flux), base)
    close(output(add(model, config_of(method), "a"), flux), plain(flux, (1, a)))
    model.unload_lora()
    assert torch.equal(output(model, flux), base)
    left = model.state_dict().keys() - flux().state_dict().keys()
    assert all(
        name.startswith("vblora_vector_bank.") for name in left
    )  # the one thing that is no layer's own
    if left:
        del model.vblora_vector_bank
    assert model.state_dict().keys() == flux().state_dict().keys()
    close(output(add(model, config_of(method), "a"), flux), plain(flux, (1, a)))


def test_training_under_checkpointing(method):
    """Gradients are those without checkpointing, and reach all of the active adapter and nothing
    else.
    """
    gradients = []
    for checkpointing in (False, True):
        model = add(add(flux(), config_of(method), "a"), config_of(method), "b")
        model.set_adapter("a")
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(3)
        model(**flux_inputs(), return_dict=False)[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert gradients[-1].keys() == {
            name for name, _ in model.named_parameters() if ".a." in f"{name}."
        }
        assert all(p.grad is None for n, p in model.named_parameters() if not p.requires_grad)
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradients[1][name], gradient)


def test_poly_tasks():
    """`task_ids` go with the call, past the model; they are asked for as long as the adapter is
    there.
    """
    config = METHODS["POLY"].config(target_modules=LINEAR)
    model, base = add(flux(), config), plain(flux)
    both = output(model, flux, task_ids=torch.tensor([0, 2]))
    close(both[0], output(model, flux, task_ids=0)[0])
    close(both[1], output(model, flux, task_ids=[2, 2])[1])
    assert not torch.allclose(both[0], output(model, flux, task_ids=1)[0], atol=1e-3)
    with pytest.raises(ValueError, match="task_ids should not be None"):
        output(model, flux)
    model.disable_adapters()
    assert torch.equal(output(model, flux), base)
    model.enable_adapters()
    model.unload_lora()
    assert torch.equal(output(model, flux), base)
    add(model, copy.deepcopy(config))
    assert torch.equal(output(model, flux, task_ids=[0, 2]), both)
    model.delete_adapters("a")
    assert torch.equal(output(model, flux), base)


def test_a_peft_model_of_a_unet():
    """As training scripts wrap it; merged, it is a plain one again."""
    model = peft.get_peft_model(unet(), config_of("LOKR", CONVOLUTIONAL)).eval()
    randomise(model, "default")
    expected = output(model, unet)
    assert not torch.allclose(expected, plain(unet), atol=1e-3)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is diffusers.UNet2DConditionModel
    close(output(merged, unet), expected)


# --- files
# --------------------------------------------------------------------------------------------------------------
#
#


@torch.no_grad()
def kronecker(tensors, scale):
    """ΔW by the book, in float64, from a module's tensors."""

    def side(name):
        full = tensors.get(f"lokr_{name}")
        if full is not None:
            return full.double()
        left, right = tensors[f"lokr_{name}_a"].double(), tensors[f"lokr_{name}_b"].double()
        if "lokr_t2" in tensors:
            return torch.einsum(
                "ijkl,ip,jq->pqkl", tensors["lokr_t2"].double(), left, right
            ).contiguous()
        return left @ right

    w1, w2 = side("w1"), side("w2")
    if w2.dim() == 4:
        w1 = w1[:, :, None, None]
    return scale * torch.kron(w1, w2)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_file_with_metadata(name, low_memory, tmp_path):
    """Linear and convolutional layers, saved with their config, come back exactly."""
    method, more = CONFIGS[name]
    model = add(unet(), config_of(method, CONVOLUTIONAL, **more))
    expected = output(model, unet)
    close(expected, plain(unet, (1, deltas(model, "a"))))
    model.save_lora_adapter(tmp_path, adapter_name="a")
    again = unet()
    again.load_lora_adapter(
        tmp_path, prefix=None, adapter_name="x", use_safetensors=True, low_cpu_mem_usage=low_memory
    )
    assert again.active_adapters() == ["x"]
    assert not any(p.is_meta for p in again.parameters())
    assert torch.equal(output(again, unet), expected)
    again.load_lora_adapter(
        tmp_path, prefix=None, use_safetensors=True, low_cpu_mem_usage=low_memory
    )
    assert sorted(again.peft_config) == ["default_1", "x"]


@pytest.mark.parametrize("name", [name for name in sorted(CONFIGS) if name.startswith("lokr")])
def test_convolutions_are_kronecker_products(name):
    """The model's output against weights made by the book from the saved factors."""
    model = add(unet(), config_of("LOKR", CONVOLUTIONAL, **CONFIGS[name][1]))
    by_module = {}
    for key, tensor in peft.get_peft_model_state_dict(model, adapter_name="a").items():
        module, _, factor = key.rpartition(".")
        by_module.setdefault(module, {})[factor] = tensor
    book = {}
    for module, tensors in by_module.items():
        layer = model.get_submodule(module)
        weight = layer.get_base_layer().weight
        if (
            weight.dim() == 4 and "lokr_w2_b" in tensors and "lokr_t2" not in tensors
        ):  # a kernel in a matrix's columns
            product = tensors.pop("lokr_w2_a").double() @ tensors.pop("lokr_w2_b").double()
            tensors["lokr_w2"] = product.reshape(product.shape[0], -1, *weight.shape[2:])
        book[module] = kronecker(tensors, layer.alpha["a"] / layer.r["a"]).reshape(weight.shape)
    close(output(model, unet), plain(unet, (1, book)))


def test_metadata_is_what_others_can_read(tmp_path):
    """Only fields of the documented interface are written, since readers make their config of all
    of them.
    """
    interface = {
        *(
            "task_type",
            "peft_type",
            "auto_mapping",
            "peft_version",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
        ),
        *(
            "rank_pattern",
            "alpha_pattern",
            "r",
            "alpha",
            "rank_dropout",
            "module_dropout",
            "use_effective_conv2d",
        ),
        *(
            "decompose_both",
            "decompose_factor",
            "rank_dropout_scale",
            "target_modules",
            "exclude_modules",
            "init_weights",
        ),
        *("layers_to_transform", "layers_pattern", "modules_to_save"),
    }
    add(unet(), config_of("LOKR", CONVOLUTIONAL)).save_lora_adapter(tmp_path, adapter_name="a")
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    assert set(fields) == interface
    assert peft.LoKrConfig(**fields).to_dict() == {
        **fields,
        "target_modules": set(fields["target_modules"]),
    }


class Sound(
    diffusers.ModelMixin,
    diffusers.configuration_utils.ConfigMixin,
    diffusers.loaders.peft.PeftAdapterMixin,
):
    """A model with a one-dimensional convolution, whose full factor writers order in two ways."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(16, 24, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


def sound():
    torch.manual_seed(1)
    return Sound().eval()


def test_the_order_of_elements_in_a_file_of_conv1d(tmp_path):
    x = torch.randn(2, 16, 7)
    model = add(sound(), config_of("LOKR", ["conv"], r=8))
    expected = model(x)
    model.save_lora_adapter(tmp_path, adapter_name="a")
    again = sound()
    again.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.equal(again(x), expected)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    assert fields.pop("kronecker_layout") == "channels"
    tensors = load_file(path)
    theirs, plain_model = sound(), sound()
    theirs.load_lora_adapter(tensors, prefix=None, metadata=fields)
    delta = torch.kron(tensors["conv.lokr_w1"], tensors["conv.lokr_w2"]).reshape(24, 16, 3)
    plain_model.conv.weight.data += config_of("LOKR").alpha / 8 * delta
    close(theirs(x), plain_model(x))
    theirs.save_lora_adapter(tmp_path, adapter_name="default_0")
    again = sound()
    again.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.equal(again(x), theirs(x))


@pytest.mark.parametrize("method", ["LOKR", "LORA"])
def test_a_file_without_metadata(method, tmp_path):
    """diffusers finds rank and factors in the shapes; alpha is taken to be the rank."""
    alpha = {"LOKR": "alpha", "LORA": "lora_alpha"}[method]
    model = add(flux(), config_of(method, ["to_q", "to_k", "proj_mlp"], **{alpha: 2}))
    path = tmp_path / "plain.safetensors"
    state = peft.get_peft_model_state_dict(model, adapter_name="a")
    save_file({f"transformer.{key}": tensor.contiguous() for key, tensor in state.items()}, path)
    for low_memory in (False, True):
        again = flux()
        again.load_lora_adapter(str(path), use_safetensors=True, low_cpu_mem_usage=low_memory)
        close(output(again, flux), output(model, flux))


@pytest.mark.parametrize("low_memory", [False, True])
def test_files_that_do_not_fit(low_memory, caplog):
    """What is missing is named; parameters without values are refused; the model goes on as it was."""
    base = plain(flux)
    source = add(flux(), config_of("LOKR", ["to_q"]))
    state = peft.get_peft_model_state_dict(source, adapter_name="a")
    lacking = {
        key: tensor
        for key, tensor in state.items()
        if not key.endswith("single_transformer_blocks.0.attn.to_q.lokr_w1")
    }
    assert len(lacking) == len(state) - 1
    model, metadata = flux(), source.peft_config["a"].to_dict()
    arguments = {"prefix": None, "metadata": metadata, "low_cpu_mem_usage": low_memory}
    if low_memory:
        with pytest.raises(
            RuntimeError, match=r"meta device.*single_transformer_blocks\.0\.attn\.to_q\.lokr_w1"
        ):
            model.load_lora_adapter(lacking, **arguments)
        assert torch.equal(output(model, flux), base)
        assert "default_0" not in getattr(model, "peft_config", {})
    else:
        diffusers.utils.logging.set_verbosity_warning()
        diffusers.utils.logging.enable_propagation()
        with caplog.at_level(logging.WARNING):
            model.load_lora_adapter(lacking, **arguments)
        assert (
            "missing keys in the model: single_transformer_blocks.0.attn.to_q.lokr_w1.default_0"
            in caplog.text
        )
    wrong = {key: torch.zeros(3, 3) for key in state}
    model = flux()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_lora_adapter(wrong, **arguments)
    assert torch.equal(output(model, flux), base)
    model.load_lora_adapter(state, **arguments)
    assert torch.equal(output(model, flux), output(source, flux))


# --- LyCORIS files through pipelines
# ------------------------------------------------------------------------------------


def divisor(size, factor):
    return max(d for d in range(1, factor + 1) if size % d == 0)


def lycoris(model, paths, form, factor=8, r=1, alpha=3.0):
    """LyCORIS tensors for modules, and the deltas they mean: `alpha / r` counts where a side is
    decomposed.
    """
    draw = torch.Generator().manual_seed(4)
    tensors, meant = {}, {}
    for path in paths:
        out, inner = model.get_submodule(path).weight.shape
        a, b = divisor(out, factor), divisor(inner, factor)
        shapes = {"lokr_w1": (a, b), "lokr_w2": (out // a, inner // b)}
        for side in {"both": ("lokr_w1", "lokr_w2"), "right": ("lokr_w2",), "none": ()}[form]:
            rows, columns = shapes.pop(side)
            shapes |= {f"{side}_a": (rows, r), f"{side}_b": (r, columns)}
        own = {name: torch.randn(shape, generator=draw) / 3 for name, shape in shapes.items()}
        meant[path] = kronecker(own, 1.0 if form == "none" else alpha / r)
        tensors[path] = {**own, "alpha": torch.tensor(alpha)}
    return tensors, meant


def flux2_pipeline(transformer):
    parts = {"scheduler": None, "vae": None, "text_encoder": None, "tokenizer": None}
    return diffusers.Flux2Pipeline(transformer=transformer, **parts)


def zimage_pipeline(transformer):
    parts = {"scheduler": None, "vae": None, "text_encoder": None, "tokenizer": None}
    return diffusers.ZImagePipeline(transformer=transformer, **parts)


@pytest.mark.parametrize("form", ["both", "right", "none"])
def test_lycoris_keys_in_flux2(form):
    """A file as LyCORIS writes it; then everything a pipeline does with adapters."""
    model, base = flux2(), plain(flux2)
    inside = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and "transformer_blocks" in n and ".attn." in n
    ]
    tensors, meant = lycoris(model, inside, form)
    state = {
        f"lycoris_{path.replace('.', '_')}.{key}": t
        for path, own in tensors.items()
        for key, t in own.items()
    }
    pipeline = flux2_pipeline(model)
    pipeline.load_lora_weights(state, adapter_name="x")
    close(output(model, flux2), plain(flux2, (1, meant)))
    assert not torch.allclose(output(model, flux2), base, atol=1e-3)
    assert pipeline.get_active_adapters() == ["x"]
    assert pipeline.get_list_adapters() == {"transformer": ["x"]}
    pipeline.set_adapters("x", 0.5)
    close(output(model, flux2), plain(flux2, (0.5, meant)))
    pipeline.set_adapters(["x"])
    pipeline.fuse_lora(safe_fusing=True)
    assert pipeline.num_fused_loras == 1
    close(output(model, flux2), plain(flux2, (1, meant)))
    pipeline.unfuse_lora()
    assert pipeline.num_fused_loras == 0
    pipeline.disable_lora()
    close(output(model, flux2), base)
    pipeline.enable_lora()
    close(output(model, flux2), plain(flux2, (1, meant)))
    pipeline.unload_lora_weights()
    close(output(model, flux2), base)
    assert model.state_dict().keys() == flux2().state_dict().keys()


@pytest.mark.parametrize("form", ["right", "none"])
def test_fused_projections_in_flux2(form):
    """Files of the original layout, whose query, key and value are one matrix: the model's are
    fused to fit.
    """
    places = {
        "double_blocks.0.img_attn.qkv": "transformer_blocks.0.attn.to_qkv",
        "double_blocks.0.txt_attn.proj": "transformer_blocks.0.attn.to_add_out",
        "double_blocks.0.img_mlp.2": "transformer_blocks.0.ff.linear_out",
        "single_blocks.0.linear1": "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    }

    def fused():
        model = flux2()
        model.fuse_qkv_projections()
        return model

    tensors, meant = lycoris(fused(), places.values(), form)
    model = flux2()
    state = {
        f"diffusion_model.{theirs}.{key}": t
        for theirs, ours in places.items()
        for key, t in tensors[ours].items()
    }
    flux2_pipeline(model).load_lora_weights(state)
    expected = fused()
    with torch.no_grad():
        for path, delta in meant.items():
            expected.get_submodule(path).weight.add_(delta.float())
    close(output(model, flux2), output(expected, flux2))


@pytest.mark.parametrize("form", ["both", "right", "none"])
def test_lycoris_in_z_image(form, tmp_path):
    model = zimage()
    tensors, meant = lycoris(
        model, [f"layers.0.attention.to_{name}" for name in ("q", "k", "v", "out.0")], form
    )
    state = {
        f"diffusion_model.{path}.{key}": tensor
        for path, own in tensors.items()
        for key, tensor in own.items()
    }
    save_file(state, tmp_path / "lokr.safetensors")
    pipeline = zimage_pipeline(model)
    pipeline.load_lora_weights(tmp_path, weight_name="lokr.safetensors")
    close(output(model, zimage), plain(zimage, (1, meant)))
    with pytest.raises(ValueError, match="[Hh]otswap"):
        pipeline.load_lora_weights(state, adapter_name="default_0", hotswap=True)


@pytest.mark.parametrize("method", ["LOKR", "LORA"])
def test_a_pipeline_saves_and_loads(method, tmp_path):
    model = add(flux2(), config_of(method, ["to_q", "to_k", "to_qkv_mlp_proj"]))
    diffusers.Flux2Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(model, adapter_name="a"),
        transformer_lora_adapter_metadata=model.peft_config["a"].to_dict(),
    )
    again = flux2()
    flux2_pipeline(again).load_lora_weights(tmp_path)
    assert torch.equal(output(again, flux2), output(model, flux2))


# --- LoRA: files of other ranks in place of what is there
# -----------------------------------------------------------------


@pytest.mark.parametrize("prepared", [False, True])
def test_hotswapping(prepared, tmp_path):
    """With `enable_lora_hotswap` the ranks may differ; without, the values alone are exchanged."""
    ranks = (2, 3) if prepared else (2, 2)
    expected = []
    for i, r in enumerate(ranks):
        model = flux()
        torch.manual_seed(i)
        model.add_adapter(config_of("LORA", ["to_q", "to_k"], r=r, lora_alpha=r + i), "a")
        expected.append(output(model, flux))
        model.save_lora_adapter(tmp_path / str(i), adapter_name="a")
    model = flux()
    if prepared:
        model.enable_lora_hotswap(target_rank=4)
    model.load_lora_adapter(tmp_path / "0", prefix=None, adapter_name="x", use_safetensors=True)
    close(output(model, flux), expected[0])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert (
        4 in {size for name, shape in shapes.items() if "lora_" in name for size in shape}
    ) is prepared
    for i in (1, 0):
        model.load_lora_adapter(
            tmp_path / str(i), prefix=None, adapter_name="x", use_safetensors=True, hotswap=True
        )
        close(output(model, flux), expected[i])
        assert shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}


# --- precision and memory
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("build", [flux, unet], ids=["flux", "unet"])
def test_layerwise_casting(method, build, storage):
    """Base weights are stored in fewer bits and computed with in float32; the adapter keeps all of
    its own.
    """
    if build is unet and method not in ("LOKR", "LORA"):
        targets = ["to_q", "to_v", "ff.net.0.proj"]
    else:
        targets = LINEAR if build is flux else CONVOLUTIONAL
    model = add(build(), config_of(method, targets))
    adapter = {name: model.state_dict()[name].clone() for name in adapter_names(model)}
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    stored = {name: p.dtype for name, p in model.named_parameters()}
    assert all(stored.get(name, torch.float32) is torch.float32 for name in adapter)
    narrow = {name for name, dtype in stored.items() if dtype is storage}
    assert any(".base_layer.weight" in name for name in narrow)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in adapter.items())
    expected = add(build(), config_of(method, targets))
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if name in narrow:
                parameter.copy_(parameter.to(storage).float())
    torch.testing.assert_close(output(model, build), output(expected, build), rtol=1e-5, atol=1e-6)


def offloaded_by_group(kind, folder=None):
    def offload(model):
        disk = {"offload_to_disk_path": str(folder)} if folder else {}
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        model.enable_group_offload(
            torch.device("cpu"), torch.device("cpu"), offload_type=kind, **blocks, **disk
        )

    return offload


def offloaded_one_by_one(model):
    from accelerate import cpu_offload

    cpu_offload(model, execution_device="cpu", offload_buffers=True)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("how", ["block", "leaf", "disk", "accelerate"])
def test_offloading(method, how, tmp_path):
    """Weights that are brought in layer by layer, adapters' too; also those added to a model that
    is offloaded already.
    """
    expected = output(add(flux(), config_of(method)), flux)
    offload = {
        "block": offloaded_by_group("block_level"),
        "leaf": offloaded_by_group("leaf_level"),
        "disk": offloaded_by_group("block_level", tmp_path),
        "accelerate": offloaded_one_by_one,
    }[how]
    model = add(flux(), config_of(method))
    offload(model)
    for _ in range(2):
        close(output(model, flux), expected)
    if how in ("block", "leaf"):
        model = flux()
        offload(model)
        close(output(add(model, config_of(method)), flux), expected)
        model.delete_adapters("a")
        close(output(model, flux), plain(flux))


def test_one_task_fused():
    """What the documentation says for pipelines, which know nothing of tasks."""
    config = METHODS["POLY"].config(target_modules=LINEAR)
    model = add(flux(), config)
    expected = output(model, flux, task_ids=2)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge(task_id=2)
    close(output(model, flux), expected)
    model.unfuse_lora()
    close(output(model, flux, task_ids=2), expected)
