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
from typing import Any

import torch
from torch import Tensor

from ....base.constants import MODEL_ROOT, ROOT
from ....base.errors import PeftNotSupportedError, warn
from ....base.patterns import format_patterns
from ....base.plain_values import JsonObject
from ....core.targets import pattern_value
from ..factors import Factors

# Values of a config's `start`: the adapter starts with values that it would draw again, or with
# those in its file.
REPEATABLE, IN_FILE = "repeatable", "in_file"
# Starts that are a part of the base weight by data: only the layer, or the file, has them.
FROM_DATA = ("corda", "lora_ga")
_SETTINGS = {"corda": "corda_config", "lora_ga": "lora_ga_config"}
_DOUBLED = {
    "lora_A.weight": 0,
    "lora_B.weight": 1,
    "lora_embedding_A": 0,
    "lora_embedding_B": 1,
}  # the rank's dimension


def is_random(init_lora_weights: object) -> bool:
    """Return whether an adapter starts from the base weight by random numbers."""
    return isinstance(init_lora_weights, str) and init_lora_weights.startswith("pissa_niter_")


def is_in_file(init_lora_weights: object) -> bool:
    """Return whether a file has to hold an adapter's start, since readers can't compute it."""
    return is_random(init_lora_weights) or init_lora_weights in FROM_DATA


def with_start(
    config: Any, state: Mapping[str, Tensor], starts: Mapping[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    """Return config and tensors of an adapter for a file, with its layers' starts in them."""
    factor = math.sqrt(2) if config.use_rslora else 2
    settings = _SETTINGS.get(config.init_lora_weights)
    held = {} if settings is None else {settings: asdict(getattr(config, settings))}
    plain = replace(
        config,
        r=2 * config.r,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        lora_alpha=factor * config.lora_alpha,
        alpha_pattern={key: factor * alpha for key, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
        start={
            "init_lora_weights": config.init_lora_weights,
            "lora_alpha": config.lora_alpha,
            "alpha_pattern": format_patterns(config.alpha_pattern),
            **held,
        },
        **dict.fromkeys(held),
    )
    result = dict(state)
    for key, tensor in state.items():
        path, name = _taken_apart(key)
        if name in _DOUBLED:
            own, is_A = starts.get(path), name == "lora_A.weight"
            rest = torch.zeros_like(tensor) if own is None else own.A if is_A else -own.B
            rest = rest.to(tensor.device, tensor.dtype)
            result[key] = torch.cat([tensor, rest], dim=_DOUBLED[name])
    return plain, result


def without_start(config: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint without the start in their second halves."""
    result = dict(state)
    for key, tensor in state.items():
        path, name = _taken_apart(key)
        r = pattern_value(config.rank_pattern, path, config.r)
        if name in _DOUBLED and tensor.dim() == 2 and tensor.shape[_DOUBLED[name]] == 2 * r:
            result[key] = tensor.narrow(_DOUBLED[name], 0, r)
    return result


def start_of(config: Any, state: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Return the start in the second halves of a checkpoint's tensors, by layer."""
    tensors = {_taken_apart(key): tensor for key, tensor in state.items()}
    starts = {}
    for (path, name), A in tensors.items():
        B = tensors.get((path, "lora_B.weight"))
        r = pattern_value(config.rank_pattern, path, config.r)
        if name == "lora_A.weight" and B is not None and A.dim() == 2 and len(A) == 2 * r:
            starts[path] = Factors(A[r:], -B[:, r:])
    return starts


def with_own_rank(content: JsonObject) -> JsonObject:
    """Return the fields of a file with a start, as those of an adapter of its own rank."""
    start = content["start"]
    ranks = {key: r // 2 for key, r in (content.get("rank_pattern") or {}).items()}
    return {
        **content,
        **start,
        "r": content["r"] // 2,
        "rank_pattern": ranks,
        "start": IN_FILE if start.get("init_lora_weights") in FROM_DATA else REPEATABLE,
    }


def check_readable(content: JsonObject) -> None:
    """Check that a file has what its adapter started from, where readers can't compute it.

    Raises:
        PeftNotSupportedError: The start depends on data.
    """
    how = content.get("init_lora_weights")
    if how in FROM_DATA:
        raise PeftNotSupportedError(
            f"LoraConfig: the adapter's `init_lora_weights`={how!r} changed the base weight by "
            "data that is not in its file. Have its writer save it with "
            "`path_initial_model_for_weight_conversion`; or, if this base is the changed one, pass "
            "a config with `init_lora_weights=True`."
        )
    if is_random(how) and content.get("start") is None:
        warn(
            f"The adapter's `init_lora_weights`={how!r} drew random numbers that its file does not "
            "have; with others, its outputs are not those it was trained to. Have its writer save "
            "it with `path_initial_model_for_weight_conversion`."
        )


def _taken_apart(key: str) -> tuple[str, str]:
    """Return the path of a layer, and the name of a tensor in it."""
    parts = key.removeprefix(MODEL_ROOT).removeprefix(ROOT).split(".")
    at = next((i for i, part in enumerate(parts) if part.startswith("lora_")), len(parts))
    return ".".join(parts[:at]), ".".join(parts[at:])
