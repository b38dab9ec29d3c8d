# SPDX-License-Identifier: Apache-2.0
"""LoftQ beside bitsandbytes: the same quantized values, and a start for models that it quantized."""

import json

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from peft import LoraConfig, get_peft_model, replace_lora_weights_loftq
from peft.core.weights import dense_weight
from peft.tuners.lora.starts.loftq import quantized

SIZES = {"up": (128, 64), "down": (64, 128)}


def weights():
    torch.manual_seed(3)
    return {f"model.{name}.weight": torch.randn(size) for name, size in SIZES.items()}


def quantized_model(kind):
    """A model in 4 or 8 bits, in a wrapper that its files leave out."""
    inner = nn.Module()
    for name, (rows, columns) in SIZES.items():
        layer = (
            bnb.nn.Linear4bit(columns, rows, False, torch.float, False, "nf4")
            if kind == 4
            else bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        )
        layer.load_state_dict({"weight": weights()[f"model.{name}.weight"]})
        setattr(inner, name, layer.to("cpu").requires_grad_(False))
    outer = nn.Module()
    outer.model, outer.base_model_prefix = inner, "model"
    outer.forward = lambda x: inner.down(inner.up(x).relu())
    return outer


@pytest.mark.parametrize("kind", [4, 8])
def test_the_codes_are_those_of_bitsandbytes(kind):
    model = quantized_model(kind)
    for key, weight in weights().items():
        expected = dense_weight(model.get_submodule(key.removesuffix(".weight")))
        torch.testing.assert_close(quantized(weight, kind).dense(), expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", [4, 8])
@pytest.mark.parametrize("files", ["one", "shards", "without prefix"])
def test_a_quantized_model_starts_from_what_it_lost(kind, files, tmp_path):
    state = weights()
    if files == "without prefix":
        state = {key.removeprefix("model."): weight for key, weight in state.items()}
    if files == "shards":
        for i, (key, weight) in enumerate(state.items()):
            save_file({key: weight}, tmp_path / f"model-{i}.safetensors")
        names = {key: f"model-{i}.safetensors" for i, key in enumerate(state)}
        index = json.dumps({"weight_map": names})
        (tmp_path / "model.safetensors.index.json").write_text(index)
    else:
        save_file(state, tmp_path / "model.safetensors")
    config = LoraConfig(r=8, lora_alpha=12, target_modules=["up", "down"])
    model = get_peft_model(quantized_model(kind), config)
    replace_lora_weights_loftq(model, tmp_path)
    for key, weight in weights().items():
        layer = model.base_model.model.get_submodule(key.removesuffix(".weight"))
        lost = (weight - dense_weight(layer.base_layer)).double()
        U, S, Vh = torch.linalg.svd(lost)
        best = U[:, :8] * S[:8] @ Vh[:8]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close((1.5 * B @ A).double(), best, atol=1e-4, rtol=1e-3)


def test_norms_of_dora_follow(tmp_path):
    """The model computes with `Q + s·B·A` as it is, close to the weights before."""
    save_file(weights(), tmp_path / "model.safetensors")
    x = torch.randn(5, 64)
    outputs = []
    for dora in (False, True):
        config = LoraConfig(r=8, target_modules=["up", "down"], use_dora=dora)
        model = get_peft_model(quantized_model(4), config)
        replace_lora_weights_loftq(model, tmp_path)
        outputs.append(model(x))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-3, rtol=1e-3)


def test_a_callback_decides_for_each_layer(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    model = get_peft_model(quantized_model(4), LoraConfig(r=4, target_modules=["up", "down"]))
    before = {n: p.clone() for n, p in model.named_parameters() if "lora" in n}
    seen = []

    def callback(inner, path):
        assert inner is model
        seen.append(path)
        return path.endswith("up")

    replace_lora_weights_loftq(model, str(tmp_path / "model.safetensors"), callback=callback)
    assert seen == ["model.up", "model.down"]
    for name, parameter in model.named_parameters():
        if "lora" in name:
            assert torch.equal(parameter, before[name]) == ("down" in name)


def test_a_sharded_adapter_is_left_as_it_is(tmp_path):
    """An engine's parameter, by the mark that ZeRO-3 leaves on it."""
    save_file(weights(), tmp_path / "model.safetensors")
    model = get_peft_model(quantized_model(4), LoraConfig(r=4, target_modules=["up", "down"]))
    before = {n: p.clone() for n, p in model.named_parameters() if "lora" in n}
    weight = model.base_model.model.model.down.lora_B["default"].weight
    weight.ds_numel = weight.numel()
    with pytest.raises(RuntimeError, match=r"`model\.down`: an engine has sharded .* by LoftQ"):
        replace_lora_weights_loftq(model, tmp_path)
    for name, parameter in model.named_parameters():
        assert "lora" not in name or torch.equal(parameter, before[name])


def test_weights_that_are_not_there(tmp_path):
    model = get_peft_model(quantized_model(4), LoraConfig(r=4, target_modules=["up", "down"]))
    with pytest.raises(ValueError, match="does not tell where it was loaded from"):
        replace_lora_weights_loftq(model)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        replace_lora_weights_loftq(model, tmp_path)
    save_file({"model.up.weight": torch.ones(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"`model\.up\.weight` has shape \(3, 3\)"):
        replace_lora_weights_loftq(model, tmp_path)
    plain = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="No quantized layer has adapter default"):
        replace_lora_weights_loftq(plain, tmp_path)
    with pytest.raises(NotImplementedError, match="call `replace_lora_weights_loftq`"):
        get_peft_model(
            quantized_model(4), LoraConfig(target_modules=["up"], init_lora_weights="loftq")
        )
