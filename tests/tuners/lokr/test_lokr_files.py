# SPDX-License-Identifier: Apache-2.0
"""LoKr files of other programs: written by the real LyCORIS, and synthetic ones in every other
layout.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import mlp
from helpers.states import assert_unchanged, snapshot
from image_models import MODELS, flux, output, unet
from lycoris_worker import CASES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import peft
from peft import (
    LoKrConfig,
    PeftModel,
    get_peft_model,
    inspect_lokr_file,
    load_lokr_file,
    save_lokr_file,
)
from peft.tuners.lokr.files.file_module import FileModule
from peft.tuners.lokr.files.fused_layers import Piece, join, split
from peft.tuners.lokr.files.original_names import original_names

pytest.importorskip("diffusers")
pytestmark = pytest.mark.quick
ROOT = Path(peft.__file__).parents[2]
PEER = ROOT / ".peer-lycoris"


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Files that LyCORIS wrote, and what the models gave with them."""
    if not (PEER / "lycoris").is_dir():
        message = f"LyCORIS is not in {PEER}; `make test` puts it there."
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    folder = tmp_path_factory.mktemp("lycoris")
    options = {"PYTHONPATH": str(PEER), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, Path(__file__).with_name("lycoris_worker.py"), folder]
    done = subprocess.run(command, env={**os.environ, **options}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, torch.load(folder / "outputs.pt")


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key].view(tensor.shape), tensor), key


@pytest.mark.processes
@pytest.mark.xdist_group("lycoris")
@pytest.mark.parametrize("case", CASES)
def test_a_file_of_lycoris_gives_its_outputs_and_is_written_again_to_the_bit(
    written, case, tmp_path
):
    folder, outputs = written
    kind, path = CASES[case][0], folder / f"{case}.safetensors"
    model = MODELS[kind][0]()
    plain = output(model, kind)
    component = "lora_unet" if case.startswith("kohya") else "lycoris"
    report = load_lokr_file(model, path, component=component)
    assert report.fits
    found = output(model, kind)
    torch.testing.assert_close(found, outputs[case], atol=2e-4, rtol=1e-4)
    assert (found - plain).abs().max() > 0.05
    keys = save_lokr_file(
        model, tmp_path / "again.safetensors", "kohya" if component == "lora_unet" else "lycoris"
    )
    theirs = {key: tensor for key, tensor in load_file(path).items() if key.startswith(component)}
    same(load_file(tmp_path / "again.safetensors"), theirs)
    assert keys == sorted(theirs)
    # The adapter is an ordinary one: its config says all that its tensors are.
    wrapped = get_peft_model(MODELS[kind][0](), LoKrConfig(target_modules=["to_q"]), "other")
    load_lokr_file(wrapped, path, "style", component)
    wrapped.save_pretrained(tmp_path, selected_adapters=["style"])
    again = PeftModel.from_pretrained(MODELS[kind][0](), tmp_path / "style").eval()
    torch.testing.assert_close(output(again, kind), found, atol=1e-5, rtol=1e-5)


@pytest.mark.processes
@pytest.mark.xdist_group("lycoris")
def test_a_scalar_of_lycoris_beside_the_factors(written):
    folder, outputs = written
    path, model = folder / "scalar-apart.safetensors", MODELS["flux"][0]()
    assert any(key.endswith(".scalar") for key in load_file(path))
    assert load_lokr_file(model, path).fits
    torch.testing.assert_close(output(model, "flux"), outputs["flux-scalar"], atol=2e-4, rtol=1e-4)


@pytest.mark.processes
@pytest.mark.xdist_group("lycoris")
def test_a_text_encoder_beside_an_image_model(written):
    folder, outputs = written
    path, clip = folder / "kohya-unet.safetensors", MODELS["clip"][0]()
    report = inspect_lokr_file(path)
    assert sorted(report.file.components) == ["lora_te1", "lora_unet"]
    assert report.file.writer == "sd-scripts with lycoris.kohya"
    load_lokr_file(clip, path)  # only one component fits
    torch.testing.assert_close(output(clip, "clip"), outputs["kohya-clip"], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no component 'lora_te2'; it has"):
        load_lokr_file(unet(), path, component="lora_te2")


def clip_text(projected):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 48,
    }
    torch.manual_seed(0)
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(CLIPTextConfig(**sizes, projection_dim=16, eos_token_id=47)).eval()


CLIP_KEYS = {
    "lora_te_{flat}": False,  # sd-scripts, Stable Diffusion 1
    "lora_te1_{flat}": False,  # Stable Diffusion XL's first encoder
    "lora_te2_{flat}": True,  # and second
    "text_encoder.{path}": False,  # diffusers
    "text_encoder_2.{path}": True,
    "text_encoders.clip_l.transformer.{path}": False,  # ComfyUI
}


@pytest.mark.parametrize("key", CLIP_KEYS)
def test_names_of_clip_are_those_of_the_world(key, tmp_path):
    """With the `text_model.` that other programs know, read and written, whatever the installed
    version calls the modules.
    """
    path = "text_model.encoder.layers.0.self_attn.q_proj"
    name = key.format(path=path, flat=path.replace(".", "_"))
    tensors = {f"{name}.{end}": tensor for end, tensor in full(16, 16, 4, 4).items()}
    model = clip_text(CLIP_KEYS[key])
    layer = next(
        module
        for path, module in model.named_modules()
        if path.endswith("layers.0.self_attn.q_proj")
    )
    x, before = torch.randn(3, 16), layer.weight.detach().clone()
    load_lokr_file(model, tensors)
    adapted = next(
        module
        for path, module in model.named_modules()
        if path.endswith("layers.0.self_attn.q_proj")
    )
    delta = book({end: tensors[f"{name}.{end}"] for end in ("lokr_w1", "lokr_w2")})
    torch.testing.assert_close(
        adapted(x), x @ (before + delta.float()).T + layer.bias, atol=1e-5, rtol=1e-5
    )
    flat = "{flat}" in key
    component = key.split("_{flat}" if flat else ".{path}")[0]
    keys = save_lokr_file(
        model, tmp_path / "lokr.safetensors", "kohya" if flat else "comfyui", component=component
    )
    assert set(tensors) <= set(keys)
    again = clip_text(CLIP_KEYS[key])
    load_lokr_file(again, tmp_path / "lokr.safetensors")
    ids = torch.tensor([[1, 2, 47]])
    torch.testing.assert_close(again(ids).last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.parametrize("tower", ["text_model.", ""])
def test_a_clip_of_another_version(tower):
    """Whose modules are called otherwise than the file's."""
    layers = nn.ModuleDict(
        {
            "encoder": nn.ModuleDict(
                {"layers": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(16, 16)})])}
            )
        }
    )
    model = nn.ModuleDict({"text_model": layers}) if tower else layers
    for name in ("lora_te_text_model_encoder_layers_0_fc1", "lora_te_encoder_layers_0_fc1"):
        report = inspect_lokr_file(
            {f"{name}.{end}": tensor for end, tensor in full(16, 16, 4, 4).items()}, model
        )
        assert report.fits and report.config.target_modules == {"fc1"}


# Synthetic files


def book(f, scale=1.0, kernel=()):
    """`scale · (W1 ⊗ W2)` by the book, in float64."""
    w1 = (
        f["lokr_w1"].double()
        if "lokr_w1" in f
        else f["lokr_w1_a"].double() @ f["lokr_w1_b"].double()
    )
    w2 = (
        f["lokr_w2"].double()
        if "lokr_w2" in f
        else f["lokr_w2_a"].double() @ f["lokr_w2_b"].double()
    )
    w2 = w2.reshape(w2.shape[0], -1, *kernel)
    grid = torch.einsum("ab,cd...->acbd...", w1, w2)
    return scale * grid.flatten(0, 1).flatten(1, 2)


def low_rank(out, columns, a, b, r):
    return {
        "lokr_w1": torch.randn(a, b) * 0.3,
        "lokr_w2_a": torch.randn(out // a, r) * 0.3,
        "lokr_w2_b": torch.randn(r, columns // b) * 0.3,
    }


def full(out, columns, a, b):
    return {
        "lokr_w1": torch.randn(a, b) * 0.3,
        "lokr_w2": torch.randn(out // a, columns // b) * 0.3,
    }


LAYOUTS = {
    "ai-toolkit": "diffusion_model.{path}",
    "comfyui, whole checkpoint": "model.diffusion_model.{path}",
    "simpletuner and diffusers": "transformer.{path}",
    "lycoris": "lycoris_{flat}",
    "onetrainer": "lora_transformer_{flat}",
    "kohya": "lora_unet_{flat}",
    "peft": "base_model.model.{path}",
    "bare": "{path}",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_scales_of_each_layout(layout):
    """A layer of low rank with alpha, one whole with a placeholder, one whole with any alpha, one
    without alpha.
    """
    paths = {
        "transformer_blocks.0.attn.to_q": (low_rank(32, 32, 2, 4, 3), 6.0, 2.0),
        "transformer_blocks.0.ff.net.0.proj": (full(128, 32, 8, 2), 9999999999.0, 1.0),
        "single_transformer_blocks.0.proj_mlp": (full(128, 32, 4, 4), 1.0, 1.0),
        "single_transformer_blocks.0.attn.to_k": (low_rank(32, 32, 4, 4, 2), None, 1.0),
    }
    tensors, changed = {}, flux()
    for path, (factors, alpha, scale) in paths.items():
        stem = LAYOUTS[layout].format(path=path, flat=path.replace(".", "_"))
        tensors |= {f"{stem}.{name}": tensor for name, tensor in factors.items()}
        tensors |= {} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)}
        changed.get_submodule(path).weight.data += book(factors, scale).float()
    model = flux()
    before = snapshot(model)
    report = inspect_lokr_file(tensors, model)
    assert report.fits
    assert_unchanged(before, model)
    load_lokr_file(model, tensors)
    torch.testing.assert_close(output(model, "flux"), output(changed, "flux"), atol=1e-5, rtol=1e-4)
    text = str(report)
    for path in paths:
        assert f"  {path} <- " in text
    assert "rank 3, scale 2" in text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "layout", ["kohya", "lycoris", "simpletuner", "onetrainer", "comfyui", "ai-toolkit"]
)
def test_round_trips_are_exact(layout, dtype, tmp_path):
    component, flat = peft.tuners.lokr.files.LAYOUTS[layout][:2]
    tensors = {}
    for path, factors, alpha in [
        ("transformer_blocks.0.attn.to_q", low_rank(32, 32, 2, 4, 3), 6.0),
        (
            "transformer_blocks.0.attn.to_v",
            full(32, 32, 8, 2),
            1e10 if dtype == torch.bfloat16 else 16.0,
        ),
        ("proj_out", full(4, 32, 1, 1), 7.0),
    ]:
        stem = f"{component}_{path.replace('.', '_')}" if flat else f"{component}.{path}"
        tensors |= {f"{stem}.{name}": tensor.to(dtype) for name, tensor in factors.items()}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
    save_file(
        tensors, tmp_path / "theirs.safetensors", {"software": json.dumps({"name": "ai-toolkit"})}
    )
    model = flux()
    report = load_lokr_file(model, tmp_path / "theirs.safetensors", "a")
    assert report.file.writer == "ai-toolkit"
    save_lokr_file(
        model, tmp_path / "ours.safetensors", layout, "a", dtype=dtype, metadata={"note": "x"}
    )
    same(load_file(tmp_path / "ours.safetensors"), tensors)
    assert metadata(tmp_path / "ours.safetensors")["note"] == "x"


def test_an_alpha_that_half_precision_made_infinite():
    factors = full(32, 32, 2, 2)
    model = flux()
    tensors = {f"lycoris_transformer_blocks_0_attn_to_q.{n}": t for n, t in factors.items()}
    tensors["lycoris_transformer_blocks_0_attn_to_q.alpha"] = torch.tensor(
        float("inf"), dtype=torch.float16
    )
    load_lokr_file(model, tensors)
    delta = model.transformer_blocks[0].attn.to_q.get_delta_weight("default")
    torch.testing.assert_close(delta, book(factors).float())


@pytest.mark.parametrize("a", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("r", [2, None])
def test_one_layer_in_the_file_that_is_three_in_the_model(a, r, tmp_path):
    """Flux's own names: `qkv` of 96 rows, whose blocks of `96 / a` rows go across the ends of q, k
    and v.
    """
    factors = low_rank(96, 32, a, 4, r) if r else full(96, 32, a, 4)
    mlp_factors = full(96 + 128, 32, 4, 4)
    tensors = {f"diffusion_model.double_blocks.0.img_attn.qkv.{n}": t for n, t in factors.items()}
    tensors |= {f"diffusion_model.single_blocks.0.linear1.{n}": t for n, t in mlp_factors.items()}
    for name in ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"):
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(4.0)
    changed = flux()
    delta = book(factors, 4.0 / r if r else 1.0).float()
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        getattr(changed.transformer_blocks[0].attn, name).weight.data += delta[
            32 * i : 32 * (i + 1)
        ]
    delta = book(mlp_factors).float()
    for i, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
        changed.single_transformer_blocks[0].get_submodule(name).weight.data += delta[
            32 * i : 32 * (i + 1)
        ]
    changed.single_transformer_blocks[0].proj_mlp.weight.data += delta[96:]
    model = flux()
    report = load_lokr_file(model, tensors)
    expected = output(changed, "flux")
    torch.testing.assert_close(output(model, "flux"), expected, atol=1e-5, rtol=1e-4)
    # Back to what it was, to the bit; and through its own config.
    save_lokr_file(model, tmp_path / "again.safetensors", "comfyui", original_names=True)
    same(load_file(tmp_path / "again.safetensors"), tensors)
    if report.config.row_offsets:
        with pytest.raises(NotImplementedError, match="pass `original_names=True`"):
            save_lokr_file(model, tmp_path / "no.safetensors", "comfyui")
        assert not (tmp_path / "no.safetensors").exists()
    wrapped = get_peft_model(flux(), LoKrConfig(target_modules=["to_q"]), "other")
    load_lokr_file(wrapped, tensors, "style")
    wrapped.save_pretrained(tmp_path, selected_adapters=["style"])
    again = PeftModel.from_pretrained(flux(), tmp_path / "style").eval()
    torch.testing.assert_close(output(again, "flux"), expected, atol=1e-5, rtol=1e-4)
    again.merge_adapter()
    torch.testing.assert_close(output(again, "flux"), expected, atol=1e-5, rtol=1e-4)


def attention(fused):
    torch.manual_seed(3)
    layers = (
        {"qkv": nn.Linear(8, 24)}
        if fused
        else {name: nn.Linear(8, 8) for name in ("to_q", "to_k", "to_v")}
    )
    return nn.ModuleDict({"attn": nn.ModuleDict(layers)})


def test_three_layers_in_the_file_that_are_one_in_the_model():
    shared = torch.randn(4, 2)
    tensors = {}
    for name in ("to_q", "to_k", "to_v"):
        tensors |= {
            f"transformer.attn.{name}.lokr_w1": torch.randn(2, 4),
            f"transformer.attn.{name}.lokr_w2": shared.clone(),
        }
    model = attention(fused=True)
    load_lokr_file(model, tensors)
    deltas = [
        torch.kron(tensors[f"transformer.attn.{n}.lokr_w1"], shared)
        for n in ("to_q", "to_k", "to_v")
    ]
    torch.testing.assert_close(model.attn.qkv.get_delta_weight("default"), torch.cat(deltas))
    tensors["transformer.attn.to_k.lokr_w2"] += 1
    model = attention(fused=True)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="are one layer in the model, `attn.qkv`, and no Kronecker product"
    ):
        load_lokr_file(model, tensors)
    assert_unchanged(before, model)
    tensors["transformer.attn.to_k.lokr_w2"] -= 1
    both = {
        "transformer.attn.qkv.lokr_w1": torch.ones(6, 4),
        "transformer.attn.qkv.lokr_w2": shared,
    }
    with pytest.raises(ValueError, match="`attn.qkv` is meant by both 'attn.qkv' and 'attn.to_q'"):
        load_lokr_file(model, {**tensors, **both})
    assert_unchanged(before, model)


@pytest.mark.parametrize("rows", [24, 25])
@pytest.mark.parametrize("form", ["whole", "low rank", "both"])
def test_splitting_and_joining_are_inverse(form, rows):
    sizes = [rows - 13, 8, 5]
    for a in (d for d in range(1, rows + 1) if rows % d == 0):
        factors = (
            {"w1": torch.randn(a, 2)}
            if form != "both"
            else {"w1_a": torch.randn(a, 2), "w1_b": torch.randn(2, 2)}
        )
        c = rows // a
        factors |= (
            {"w2": torch.randn(c, 3)}
            if form == "whole"
            else {"w2_a": torch.randn(c, 2), "w2_b": torch.randn(2, 3)}
        )
        module = FileModule("qkv", "", False, factors, alpha=2.0, dora_scale=torch.randn(rows, 1))
        whole = book({f"lokr_{n}": t for n, t in factors.items()})
        pieces, start = split(module, sizes, ()), 0
        for piece, size in zip(pieces, sizes, strict=True):
            part = book({f"lokr_{n}": t for n, t in piece.module.factors.items()})
            offset = piece.row_offset or 0
            torch.testing.assert_close(part[offset : offset + size], whole[start : start + size])
            start += size
        again = join(pieces, sizes, ())
        assert all(torch.equal(again.factors[name], tensor) for name, tensor in factors.items())
        assert torch.equal(again.dora_scale, module.dora_scale)
        if a > 1 and form == "whole":
            changed = copy.deepcopy(pieces)
            changed[1].module.factors["w2"] = factors["w2"] + 1
            assert join(changed, sizes, ()) is None
    assert (
        join(
            [
                Piece(module),
                Piece(FileModule("k", "", False, {"w1": torch.ones(2, 2), "w2": torch.ones(2, 2)})),
            ],
            [1, 1],
            (),
        )
        is None
    )


def test_names_of_stable_diffusion():
    """Blocks are numbered through: with two layers a block, as in the published models."""
    model = unet(layers=2)
    paths = [
        path for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    known = original_names(paths)
    expected = {
        "input_blocks.0.0": "conv_in",
        "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
        "input_blocks.2.1.transformer_blocks.0.attn1.to_q": "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
        "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
        "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
        "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.3.0.emb_layers.1": "up_blocks.1.resnets.0.time_emb_proj",
        "output_blocks.5.1.proj_out": "up_blocks.1.attentions.2.proj_out",
        "time_embed.2": "time_embedding.linear_2",
        "out.2": "conv_out",
    }
    assert {name: known[name][0] for name in expected} == expected
    assert sorted(path for own in known.values() for path in own) == sorted(paths)
    factors = {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(4, 4, 3, 3)}
    load_lokr_file(
        model, {f"lora_unet_input_blocks_1_0_in_layers_2.{n}": t for n, t in factors.items()}
    )
    delta = model.down_blocks[0].resnets[0].conv1.get_delta_weight("default")
    torch.testing.assert_close(delta, book(factors, kernel=(3, 3)).float())


def test_files_with_their_config(tmp_path):
    """Hugging Face PEFT's rule, `alpha / r` always, holds where the config says so: in the header,
    or beside the file.
    """
    config = LoKrConfig(
        r=4,
        alpha=6,
        target_modules=["to_q", "proj_mlp"],
        rank_pattern={"proj_mlp": 64},
        init_weights=False,
    )
    source = get_peft_model(flux(), config).eval()
    expected = output(source, "flux")
    source.save_pretrained(tmp_path / "peft")
    plain = flux()
    plain.add_adapter(config)
    peft.set_peft_model_state_dict(
        plain,
        {
            k.removeprefix("base_model.model."): t
            for k, t in peft.get_peft_model_state_dict(source).items()
        },
    )
    plain.save_lora_adapter(tmp_path / "diffusers")
    for path in (tmp_path / "peft", tmp_path / "diffusers" / "pytorch_lora_weights.safetensors"):
        model = flux()
        report = load_lokr_file(model, path)
        torch.testing.assert_close(output(model, "flux"), expected, atol=1e-6, rtol=1e-6)
        assert report.config.r == 4
    (tmp_path / "peft" / "adapter_config.json").unlink()
    model = flux()
    report = load_lokr_file(model, tmp_path / "peft")  # nothing says a scale then
    layer = model.single_transformer_blocks[0].proj_mlp
    assert layer.scaling["default"] == 1.0


def test_the_order_of_elements_of_hugging_face():
    factors = {"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(6, 4, 3)}
    base = nn.Sequential(nn.Conv1d(16, 24, 3))
    theirs, lycoris = copy.deepcopy(base), copy.deepcopy(base)
    load_lokr_file(theirs, {f"base_model.model.0.{n}": t for n, t in factors.items()})
    load_lokr_file(lycoris, {f"lycoris_0.{n}": t for n, t in factors.items()})
    assert theirs[0].flat_layout["default"] and not lycoris[0].flat_layout["default"]
    torch.testing.assert_close(
        lycoris[0].get_delta_weight("default"), book(factors, kernel=(3,)).float()
    )
    torch.testing.assert_close(
        theirs[0].get_delta_weight("default"),
        torch.kron(factors["lokr_w1"], factors["lokr_w2"]).view(24, 16, 3),
    )
    with pytest.raises(NotImplementedError, match="`kronecker_layout`='flat'"):
        save_lokr_file(theirs, "never.safetensors")


def test_tucker_of_one_dimension_and_axes_of_one(tmp_path):
    model = nn.ModuleDict(
        {"conv": nn.Conv1d(8, 12, 3), "point": nn.Conv2d(8, 12, 1), "lin": nn.Linear(8, 12)}
    )
    tensors = {
        "lycoris_conv.lokr_w1": torch.randn(2, 2),
        "lycoris_conv.lokr_t2": torch.randn(2, 2, 3),
        "lycoris_conv.lokr_w2_a": torch.randn(2, 6),
        "lycoris_conv.lokr_w2_b": torch.randn(2, 4),
        "lycoris_point.lokr_w1": torch.randn(2, 2),
        "lycoris_point.lokr_w2": torch.randn(6, 4),
        "lycoris_lin.lokr_w1": torch.randn(2, 2),
        "lycoris_lin.lokr_w2": torch.randn(6, 4, 1, 1),
    }
    load_lokr_file(model, tensors)
    w2 = torch.einsum(
        "ijk,ip,jq->pqk", *(tensors[f"lycoris_conv.lokr_{n}"] for n in ("t2", "w2_a", "w2_b"))
    )
    expected = (
        torch.einsum("ab,cdk->acbdk", tensors["lycoris_conv.lokr_w1"], w2)
        .flatten(0, 1)
        .flatten(1, 2)
    )
    torch.testing.assert_close(model.conv.get_delta_weight("default"), expected)
    assert model.point.lokr_w2["default"].shape == (6, 4, 1, 1) and model.lin.lokr_w2[
        "default"
    ].shape == (6, 4)
    save_lokr_file(model, tmp_path / "a.safetensors")
    ours = load_file(tmp_path / "a.safetensors")
    same(
        {k: t for k, t in ours.items() if "conv" in k and "alpha" not in k},
        {k: t for k, t in tensors.items() if "conv" in k},
    )


def test_our_own_features_in_their_files(tmp_path):
    """What a layout has no number for goes into the tensors."""
    config = LoKrConfig(
        r=2,
        alpha=5,
        target_modules=["0", "2"],
        use_scalar=True,
        use_rslora=True,
        init_weights=False,
        weight_decompose=True,
    )
    config.rank_pattern = {"2": 32}
    model, x = get_peft_model(mlp(), config).eval(), torch.randn(3, 8)
    with torch.no_grad():
        for layer in model.base_model.tuner_layers():
            layer.lokr_scalar["default"].fill_(0.7)
            layer.lokr_magnitude["default"].mul_(1.3)
    expected = model(x)
    for layout in ("lycoris", "diffusers"):
        path = tmp_path / f"{layout}.safetensors"
        save_lokr_file(model, path, layout)
        again = mlp()
        again.load_state_dict(peft.get_base_model_state_dict(model))
        load_lokr_file(again, path)
        torch.testing.assert_close(again(x), expected, atol=1e-5, rtol=1e-5)
        assert any(key.endswith(".alpha") for key in load_file(path)) == (layout == "lycoris")


# What does not fit


def refused(model, tensors, message, **options):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_lokr_file(model, tensors, **options)
    assert_unchanged(before, model)
    assert "peft_config" not in vars(model)


def test_what_can_not_be_placed_is_named_and_nothing_is_changed():
    good = {f"lycoris_transformer_blocks_0_attn_to_q.{n}": t for n, t in full(32, 32, 2, 2).items()}
    wrong = {
        f"lycoris_transformer_blocks_0_attn_to_k.{n}": t for n, t in full(32, 64, 2, 2).items()
    }
    absent = {
        f"lycoris_transformer_blocks_9_attn_to_k.{n}": t for n, t in full(32, 32, 2, 2).items()
    }
    refused(
        flux(),
        {**good, **wrong},
        "does not fit `transformer_blocks.0.attn.to_k`: its factors make a weight of 32 x 64",
    )
    refused(flux(), {**good, **absent}, "no layer that 'transformer_blocks_9_attn_to_k' names")
    refused(
        flux(),
        {**good, "lycoris_x.lora_down.weight": torch.ones(1)},
        "Keys of no LoKr module: 'lycoris_x.lora_down.weight'",
    )
    refused(
        flux(),
        {**good, "lycoris_x.alpha": torch.tensor(1.0)},
        "Keys of no LoKr module: 'lycoris.x'",
    )
    half = {key: tensor for key, tensor in good.items() if "w1" in key}
    refused(flux(), half, "tensors w1 are not those of one adapter")
    refused(
        flux(), {"some.weight": torch.ones(2)}, "holds no LoKr modules; its keys are 'some.weight'"
    )
    dora = {**good, "lycoris_transformer_blocks_0_attn_to_q.dora_scale": torch.ones(7)}
    refused(flux(), dora, "dora_scale is of shape")
    other = {
        f"lycoris_transformer_blocks_0_attn_to_v.{n}": t for n, t in full(32, 32, 2, 2).items()
    }
    mixed = {
        **good,
        **other,
        "lycoris_transformer_blocks_0_attn_to_q.dora_scale": torch.ones(32, 1),
    }
    refused(flux(), mixed, "an adapter can't have both")
    refused(flux(), mixed, "an adapter can't have both", ignore_unplaced=True)
    again = {
        key.replace("lycoris_transformer_blocks_0", "lycoris_double_blocks_0"): t
        for key, t in good.items()
    }
    again = {
        key.replace("attn_to_q", "img_attn_qkv"): torch.cat([t] * 3) if "w2" in key else t
        for key, t in again.items()
    }
    refused(
        flux(),
        {**good, **again},
        "`transformer_blocks.0.attn.to_q` is meant by both 'transformer_blocks_0_attn_to_q' and "
        "'double_",
    )
    fused = {
        f"diffusion_model.double_blocks.0.img_attn.qkv.{n}": t
        for n, t in full(96, 32, 2, 2).items()
    }
    refused(
        flux(),
        {**fused, "diffusion_model.double_blocks.0.img_attn.qkv.dora_scale": torch.ones(1, 32)},
        "can't be told apart",
    )
    model = flux()
    report = load_lokr_file(model, {**good, **absent}, ignore_unplaced=True)
    assert not report.fits
    assert [path for path, module in model.named_modules() if hasattr(module, "lokr_w1")] == [
        "transformer_blocks.0.attn.to_q"
    ]
    with pytest.raises(ValueError, match="already exists"):
        load_lokr_file(model, good)
    load_lokr_file(model, good, "second")
    assert sorted(model.peft_config) == ["default", "second"]


def test_names_that_can_mean_several_layers():
    model = nn.ModuleDict(
        {"a_b": nn.ModuleDict({"c": nn.Linear(4, 4)}), "a": nn.ModuleDict({"b_c": nn.Linear(4, 4)})}
    )
    tensors = {"lycoris_a_b_c.lokr_w1": torch.ones(2, 2), "lycoris_a_b_c.lokr_w2": torch.ones(2, 2)}
    refused(model, tensors, "'a_b_c' is ambiguous: it can mean `a.b_c`, `a_b.c`")
    load_lokr_file(
        model,
        {
            "transformer.a_b.c.lokr_w1": torch.ones(2, 2),
            "transformer.a_b.c.lokr_w2": torch.ones(2, 2),
        },
    )


def test_several_components_that_fit():
    tensors = {}
    for component in ("lora_te1", "lora_te2"):
        tensors |= {
            f"{component}_0.lokr_w1": torch.ones(2, 2),
            f"{component}_0.lokr_w2": torch.ones(8, 4),
        }
    refused(
        mlp(),
        tensors,
        "pass `component`. Modules that fit: 'lora_te1' .1 of 1., 'lora_te2' .1 of 1.",
    )
    refused(mlp(), tensors, "pass `component`", ignore_unplaced=True)
    load_lokr_file(mlp(), tensors, component="lora_te2")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (5, "`file`=5 must be a path or tensors by key, not int"),
        ({"0.lokr_w1": 3.0}, "'0.lokr_w1' has float"),
        ({}, "'tensors' is empty"),
        (
            {"lora_unet_0.lora_down.weight": torch.ones(2, 8)},
            "It is a LoRA file: load it with .*`load_lora_weights`",
        ),
        (
            {"base_model.model.0.lora_A.weight": torch.ones(2, 8)},
            "It is a LoRA file: load it with `PeftModel.from_pretrained`",
        ),
        ({"lycoris_0.hada_w1_a": torch.ones(2, 8)}, "It is a LoHa file"),
        ({"0.vblora_logits_A": torch.ones(2, 8)}, "It is a Poly or VB-LoRA adapter"),
    ],
)
def test_what_is_no_lokr_file_is_told_what_it_is(file, message):
    model = mlp()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        load_lokr_file(model, file)
    assert_unchanged(before, model)
    with pytest.raises(TypeError, match="`model`='mlp' must be a module"):
        load_lokr_file("mlp", file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_scalar_is_a_factor_on_the_delta(dtype):
    factors = {name: tensor.to(dtype) for name, tensor in low_rank(8, 8, 2, 2, 2).items()}
    tensors = {f"lycoris_0.{name}": tensor for name, tensor in factors.items()}
    numbers = {
        "lycoris_0.scalar": torch.tensor(-0.3, dtype=dtype),
        "lycoris_0.alpha": torch.tensor(6.0, dtype=dtype),
    }
    model = nn.Sequential(nn.Linear(8, 8))
    load_lokr_file(model, {**tensors, **numbers})
    expected = book(factors, 3 * float(numbers["lycoris_0.scalar"]))
    torch.testing.assert_close(
        model[0].get_delta_weight("default").double(), expected, atol=1e-6, rtol=1e-5
    )
    for key, value in (("scalar", torch.nan), ("scalar", torch.inf), ("alpha", torch.nan)):
        wrong = {**tensors, **numbers, f"lycoris_0.{key}": torch.tensor(value)}
        refused(
            nn.Sequential(nn.Linear(8, 8)), wrong, f"'lycoris_0.{key}' is {value}.* an earlier step"
        )


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_factors_that_are_not_finite_are_loaded_and_named(value):
    tensors = {f"lycoris_0.{name}": tensor for name, tensor in low_rank(8, 8, 2, 2, 2).items()}
    tensors["lycoris_0.lokr_w2_b"][1, 0] = value
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.warns(
        UserWarning,
        match="'tensors' has values that are NaN or infinite.* 0.lokr_w2_b. It is loaded",
    ):
        load_lokr_file(model, tensors)
    assert not model[0].lokr_w2_b["default"].isfinite().all()


def test_an_unreadable_file(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a readable weights file"):
        inspect_lokr_file(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        load_lokr_file(mlp(), tmp_path / "missing.safetensors")
    tensors = {"0.lokr_w1": torch.ones(2, 2), "0.lokr_w2": torch.ones(8, 4)}
    save_file(tensors, tmp_path / "b.safetensors", {"lora_adapter_metadata": "{"})
    with pytest.raises(ValueError, match="the config in its header. is not valid JSON"):
        load_lokr_file(mlp(), tmp_path / "b.safetensors")


def test_what_can_not_be_written(tmp_path):
    model = get_peft_model(mlp(), LoKrConfig(target_modules=["0"], modules_to_save=["2"]))
    with pytest.raises(NotImplementedError, match="`modules_to_save`"):
        save_lokr_file(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="`layout`='a1111' must be one of 'kohya'"):
        save_lokr_file(model, tmp_path / "a.safetensors", "a1111")
    with pytest.raises(ValueError, match="no adapter 'x' of LoKr"):
        save_lokr_file(model, tmp_path / "a.safetensors", adapter_name="x")
    with pytest.raises(ValueError, match="is a folder; give the path of a file"):
        save_lokr_file(model, tmp_path)
    with pytest.raises(TypeError, match="`path`=5 must be a path"):
        save_lokr_file(model, 5)
    with pytest.raises(TypeError, match="`model`='model' must be a module"):
        save_lokr_file("model", tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tensor", ["lokr_w1", "lokr_w2_a", "alpha", "dora_scale"])
def test_a_value_that_the_dtype_does_not_hold_is_named(tensor, tmp_path):
    config = LoKrConfig(
        r=1,
        alpha=1e5 if tensor == "alpha" else 2,
        target_modules=["0"],
        weight_decompose=tensor == "dora_scale",
    )
    model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), config)
    container = {"alpha": None, "dora_scale": "lokr_magnitude"}.get(tensor, tensor)
    if container is not None:
        getattr(model.base_model.model[0], container)["default"].data.flatten()[1] = -1e5
    with pytest.raises(
        ValueError,
        match=rf"`0`: the values of `{tensor}` go up to 1e\+05, those of torch.float16 to 6.55e\+04",
    ):
        save_lokr_file(model, tmp_path / "new" / "a.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    save_lokr_file(model, tmp_path / "new" / "a.safetensors", dtype=torch.bfloat16)
    assert all(
        value.isfinite().all() for value in load_file(tmp_path / "new" / "a.safetensors").values()
    )


def test_the_only_adapter_is_written(tmp_path):
    model = get_peft_model(
        mlp(), LoKrConfig(r=1, target_modules=["0"], init_weights=False), "style"
    )
    model.add_adapter("other", LoKrConfig(r=1, target_modules=["0"], init_weights=False))
    for active in ("style", "other"):
        model.set_adapter(active)
        save_lokr_file(model, tmp_path / "a.safetensors")
        save_lokr_file(model, tmp_path / "b.safetensors", adapter_name=active)
        same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"))
    model.base_model.set_adapter(["style", "other"])
    with pytest.raises(
        ValueError, match="no adapter 'default' of LoKr, and several could be meant.* style, other"
    ):
        save_lokr_file(model, tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()
    with pytest.raises(ValueError, match="The model has no adapter of LoKr; there are none"):
        save_lokr_file(mlp(), tmp_path / "c.safetensors")


def test_a_product_with_the_scale_is_rounded_once(tmp_path):
    """Scale and scalar together are ordinary where one after the other would leave half precision."""
    config = LoKrConfig(r=2, alpha=2e4, target_modules=["0"], use_scalar=True, init_weights=False)
    model = get_peft_model(
        nn.Sequential(nn.Linear(16, 16)).half(), config, autocast_adapter_dtype=False
    )
    layer = model.base_model.model[0]
    layer.lokr_scalar["default"].data.fill_(3e-6)
    expected = layer.lokr_w1["default"].double() * layer.lokr_scalar["default"].double() * 1e4
    save_lokr_file(model, tmp_path / "a.safetensors", "diffusers")
    found = load_file(tmp_path / "a.safetensors")["transformer.0.lokr_w1"]
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), expected.detach(), atol=1e-5, rtol=1e-3)


def test_diffusers_goes_on_with_the_adapter():
    model = flux()
    load_lokr_file(
        model,
        {f"lycoris_proj_out.{n}": t for n, t in full(4, 32, 1, 1).items()},
        "style",
        is_trainable=True,
    )
    assert model.active_adapters() == ["style"]
    assert any(p.requires_grad for p in model.parameters())
    strong = output(model, "flux")
    model.set_adapters("style", 0.5)
    assert not torch.allclose(output(model, "flux"), strong)
    model.disable_adapters()
    torch.testing.assert_close(output(model, "flux"), output(flux(), "flux"))


def test_hugging_face_can_read_what_followed_its_rules():
    """A file whose factors follow a rule makes a config without this project's fields."""
    tensors = {}
    for path, shape in [("to_q", (32, 32)), ("to_k", (32, 32)), ("to_v", (32, 32))]:
        stem = f"lycoris_transformer_blocks_0_attn_{path}"
        tensors |= {f"{stem}.{n}": t for n, t in low_rank(*shape, 2, 2, 2).items()} | {
            f"{stem}.alpha": torch.tensor(3.0)
        }
    fields = inspect_lokr_file(tensors, flux()).config.to_dict()
    assert fields["r"] == 2 and fields["alpha"] == 3 and fields["decompose_factor"] == 2
    assert not set(fields) & (set(LoKrConfig.absent_values) - {"kronecker_layout"})


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, "float16"])
def test_a_file_holds_floating_point_numbers(dtype, tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), LoKrConfig(r=1, target_modules=["0"]))
    with pytest.raises(ValueError, match="must be a floating-point dtype"):
        save_lokr_file(model, tmp_path / "lokr.safetensors", "kohya", dtype=dtype)
    assert not any(tmp_path.iterdir())
