# SPDX-License-Identifier: Apache-2.0
"""Files of adapters whose start other programs cannot recompute.

An adapter that starts from the base weight adds `s·(B·A - B₀·A₀)`. Where `B₀·A₀` follows from the
weight ("pissa", "olora") a file needs `A` and `B` alone: every reader recomputes the rest. The
start of "pissa_niter_<n>" depends on random numbers: here they are the same each time, but others
draw their own. That of "corda" and "lora_ga" depends on data. So a file has a plain adapter of
twice the rank, `[B, -B₀]·[A; A₀]`, which means the same to all; its config says that the second
half is the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor

from ....base.constants import MODEL_ROOT, ROOT
from ....base.patterns import format_patterns
from ....base.plain_values import JsonObject
from ..base import Start
from ..config import LoraConfig
from ..factors import Factors

_SETTINGS: Mapping[object, str] = {"corda": "corda_config", "lora_ga": "lora_ga_config"}
# The dimension of the rank in each tensor of a layer.
_RANK_DIM = {
    "lora_A.weight": 0,
    "lora_B.weight": 1,
    "lora_embedding_A": 0,
    "lora_embedding_B": 1,
}


def with_start(
    config: LoraConfig, state: Mapping[str, Tensor], starts: Mapping[str, Start]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return config and tensors of an adapter for a file, with its layers' starts in them."""
    factor = math.sqrt(2) if config.use_rslora else 2
    settings = _SETTINGS.get(config.init_lora_weights)
    held = {} if settings is None else {settings: asdict(getattr(config, settings))}
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    changes: JsonObject = {
        "r": 2 * config.r,
        "rank_pattern": {key: 2 * r for key, r in ranks.items()},
        "lora_alpha": factor * config.lora_alpha,
        "alpha_pattern": {key: factor * alpha for key, alpha in alphas.items()},
        "init_lora_weights": True,
        "start": {
            "init_lora_weights": config.init_lora_weights,
            "lora_alpha": config.lora_alpha,
            "alpha_pattern": format_patterns(alphas),
            **held,
        },
        **dict.fromkeys(held),
    }
    result = dict(state)
    for key, tensor in state.items():
        path, name = _layer_and_name(key)
        if name in _RANK_DIM:
            start = starts.get(path)
            if start is None:
                second_half = torch.zeros_like(tensor)
            else:
                second_half = start.A if name == "lora_A.weight" else -start.B
            halves = tensor, second_half.to(tensor.device, tensor.dtype)
            result[key] = torch.cat(halves, dim=_RANK_DIM[name])
    return replace(config, **changes), result


def without_start(config: LoraConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint without the start in their second halves."""
    result = dict(state)
    for key, tensor in state.items():
        path, name = _layer_and_name(key)
        r = config.rank_at(path)
        if name in _RANK_DIM and tensor.dim() == 2 and tensor.shape[_RANK_DIM[name]] == 2 * r:
            result[key] = tensor.narrow(_RANK_DIM[name], 0, r)
    return result


def start_of(config: LoraConfig, state: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Return the start in the second halves of a checkpoint's tensors, by layer."""
    tensors = {_layer_and_name(key): tensor for key, tensor in state.items()}
    starts = {}
    for (path, name), A in tensors.items():
        B = tensors.get((path, "lora_B.weight"))
        r = config.rank_at(path)
        if name == "lora_A.weight" and B is not None and A.dim() == 2 and len(A) == 2 * r:
            starts[path] = Factors(A[r:], -B[:, r:])
    return starts


def _layer_and_name(key: str) -> tuple[str, str]:
    """Return the path of a layer, and the name of a tensor in it."""
    parts = key.removeprefix(MODEL_ROOT).removeprefix(ROOT).split(".")
    at = next((i for i, part in enumerate(parts) if part.startswith("lora_")), len(parts))
    return ".".join(parts[:at]), ".".join(parts[at:])
