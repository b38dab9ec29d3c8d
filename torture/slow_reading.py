# SPDX-License-Identifier: Apache-2.0
"""A slow reading of an adapter's files, byte by byte, and the textbook's outputs in float64."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peft

from .scenarios import TARGETS, X, base

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "C64": torch.complex64, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_ROOT = "base_model.model."


def difference(model: Any, folder: Path) -> str | None:
    """Return how a loaded model differs from its files, None if it does not."""
    config = json.loads((folder / "adapter_config.json").read_bytes())
    found = tensors((folder / "adapter_model.safetensors").read_bytes())
    own = peft.get_peft_model_state_dict(model)
    if missing := found.keys() - own.keys():
        return f"the model has no {sorted(missing)[:3]}"
    if missing := own.keys() - found.keys():
        return f"the file has no {sorted(missing)[:3]}"
    for key, tensor in found.items():
        if own[key].shape != tensor.shape:
            return f"{key} has the shape {list(own[key].shape)}, in the file {list(tensor.shape)}"
        if not torch.equal(own[key].nan_to_num(), tensor.to(own[key].dtype).nan_to_num()):
            return f"{key} has other values than the file"
    expected = _outputs(config, {key: tensor.double() for key, tensor in found.items()})
    if expected is None or not torch.isfinite(expected).all():
        return None
    with torch.no_grad():
        outputs = model(X)
    scale = 1 + expected.abs().max().item()
    if scale < 1e6 and not torch.allclose(outputs.double(), expected, rtol=0, atol=1e-4 * scale):
        return f"outputs differ by {(outputs.double() - expected).abs().max().item()}"
    return None


def tensors(content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    result = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype = _DTYPES[entry["dtype"]]
        flat = (
            torch.frombuffer(bytearray(data[begin:end]), dtype=dtype)
            if end > begin
            else torch.zeros(0, dtype=dtype)
        )
        result[key] = flat.reshape(entry["shape"])
    return result


def _outputs(config: dict[str, Any], found: dict[str, Tensor]) -> Tensor | None:
    """Return the model's outputs with a LoRA or LoHa adapter; None for other options."""
    odd = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "alora_invocation_tokens",
           "layer_replication", "target_parameters", "modules_to_save", "fan_in_fan_out",
           "use_effective_conv2d", "rank_dropout", "trainable_token_indices")  # fmt: skip
    if config.get("peft_type") not in ("LORA", "LOHA") or any(config.get(name) for name in odd):
        return None
    model = base().double()
    rank = config.get("r", 8)
    alpha = config.get("lora_alpha" if config["peft_type"] == "LORA" else "alpha", 8)
    is_stable = config["peft_type"] == "LORA" and config.get("use_rslora")
    scale = alpha / (math.sqrt(rank) if is_stable else rank)
    for name in TARGETS:
        own = {key.removeprefix(f"{_ROOT}{name}."): t for key, t in found.items()
               if key.startswith(f"{_ROOT}{name}.")}  # fmt: skip
        if {"lora_A.weight", "lora_B.weight"} == own.keys():
            delta = own["lora_B.weight"] @ own["lora_A.weight"]
        elif {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} == own.keys():
            delta = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
        elif own:
            return None
        else:
            continue
        model.get_submodule(name).weight.data += scale * delta
    with torch.no_grad():
        return model(X.double())
