# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of Poly adapters, exact for every task: their skills side by side in one inventory,
each with ranks of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...base.errors import PeftNotSupportedError
from ...core.combining import Combination, Combined, check_same
from ...core.targets import patterns
from ...ops.low_rank import wide
from .config import PolyConfig
from .layer import PolyLayer

# Fields of a config that are for what an adapter trains beside its layers.
_COMPANIONS = ("trainable_token_indices",)


class Inventory(NamedTuple):
    """What an adapter has in one layer, with a factor on its delta.

    Attributes:
        factor: `f`, of any sign: the delta is `f · x·A_w·B_w`.
        weights: `[n_tasks, n_splits, n_skills]`, each row's sum one.
        A: `[n_splits, n_skills, in // n_splits, r]`.
        B: `[n_splits, n_skills, r, out // n_splits]`.
    """

    factor: float
    weights: Tensor
    A: Tensor
    B: Tensor


def side_by_side(
    parts: Sequence[Inventory], with_rest: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """One inventory whose delta for each task is the sum of those of several:
    `x·A'_w·B'_w / R = Σ_i f_i · x·A_w,i·B_w,i`.

    Skills and ranks are put side by side, so that no skill of one part meets the ranks of another.
    The gates of `m` parts are their mixing weights divided by `2m`, which add up to a half in every
    task; so each skill has an `m`-th of the weight it had. The factors are enlarged by `m`, and
    share out `f_i · R` evenly.

    Args:
        parts: With the same number of tasks; numbers of splits may differ, and have their least
            common multiple in the result.
        with_rest: Add a skill of zeros that takes what weights lack to one, as they do where all
            gates are closed (`has_rest`).

    Returns:
        `logits [n_tasks, n_splits · n_skills]`, `A` and `B` with as many skills as all parts, of
        rank `R = Σ r`; with the skill of zeros, one more.

    Source: arXiv:2202.13914, section 3 (mixing weights); the construction follows from it
    """
    n_splits = math.lcm(*(part.A.shape[0] for part in parts))
    parts = [_refined(part, n_splits // part.A.shape[0]) for part in parts]
    ranks, skills = [part.A.shape[3] for part in parts], [part.A.shape[1] for part in parts]
    R, S, first = sum(ranks), sum(skills) + with_rest, parts[0]
    A = first.A.new_zeros(n_splits, S, first.A.shape[2], R, dtype=wide(first.A).dtype)
    B = first.B.new_zeros(n_splits, S, R, first.B.shape[3], dtype=A.dtype)
    s = r = 0
    for part, n, k in zip(parts, skills, ranks, strict=True):
        share = len(parts) * math.sqrt(abs(part.factor) * R)
        A[:, s : s + n, :, r : r + k] = wide(part.A) * share
        B[:, s : s + n, r : r + k] = wide(part.B) * math.copysign(share, part.factor)
        s, r = s + n, r + k
    gates = torch.cat([wide(part.weights) / (2 * len(parts)) for part in parts], dim=-1)
    if with_rest:
        gates = torch.cat([gates, 0.5 - gates.sum(-1, keepdim=True)], dim=-1)
    return gates.clamp(min=torch.finfo(torch.float32).tiny).logit().flatten(1), A, B


def has_rest(part: Inventory) -> bool:
    """Whether some weights add up to less than one, beyond rounding."""
    return bool((part.weights.sum(-1) < 1 - 1e-6).any())


def combine(
    configs: Mapping[str, PolyConfig], layers: Mapping[str, PolyLayer], request: Combination
) -> Combined:
    """Return the weighted sum of adapters that route by task.

    Args:
        configs: The model's configs by adapter name.
        layers: The layers that have any of the adapters, by module path.
        request: The request.

    Raises:
        PeftNotSupportedError: One routes by input, so that its share can't be kept.
        PeftValueError: Their tasks differ.
    """
    for name in request.adapters:
        config = configs[name]
        if config.routes_by_input:
            raise PeftNotSupportedError(
                f"Adapter {name} routes by input; only adapters that route by task can be combined."
            )
        if config.task_rank:
            raise PeftNotSupportedError(
                f"Adapter {name} has a skill of rank {config.task_rank} for each task; these can't "
                "be combined."
            )
    check_same(configs, request, "n_tasks", "task_names")
    first = configs[request.adapters[0]]
    parts = {
        path: [_inventory(layer, name, weight, configs[name]) for name, weight in request.terms()]
        for path, layer in layers.items()
    }
    with_rest = any(has_rest(part) for several in parts.values() for part in several)
    # How the adapters' weights came about is in the weights; what mixes them from now on is plain.
    plain = {
        name: value
        for name, value in type(first).absent_values.items()
        if name not in ("task_names", *_COMPANIONS)
    }
    sizes: dict[str, dict[str, int]] = {
        path: {
            "r": sum(part.A.shape[3] for part in several),
            "n_skills": sum(part.A.shape[1] for part in several) + with_rest,
            "n_splits": math.lcm(*(part.A.shape[0] for part in several)),
        }
        for path, several in parts.items()
    }
    largest = {
        name: max(size[name] for size in sizes.values()) for name in ("r", "n_skills", "n_splits")
    }
    differing = {
        "rank_pattern" if name == "r" else f"{name}_pattern": patterns(
            {path: size[name] for path, size in sizes.items()}, value
        )
        for name, value in largest.items()
    }
    result = Combined(replace(first, **{**plain, **largest, **differing}))
    for path, several in parts.items():
        logits, A, B = side_by_side(several, with_rest)
        result.tensors |= {
            f"{path}.poly_lora_A": A,
            f"{path}.poly_lora_B": B,
            f"{path}.poly_router.module_logits": logits,
        }
        result.errors[path] = 0.0
    return result


def _inventory(layer: PolyLayer, name: str, weight: float, config: PolyConfig) -> Inventory:
    """What an adapter has in a layer; in one that it does not adapt, skills without effect."""
    if name in layer.scaling:
        A, B = layer.poly_lora_A(name), layer.poly_lora_B(name)
        return Inventory(
            weight * float(layer.scaling[name]), layer.router(name).task_weights(), A, B
        )
    q, s, r, size = config.n_splits, config.n_skills, config.r, layer.geometry
    q = q if size.in_features % q == size.out_features % q == 0 else 1
    like = next(layer.poly_lora_A(other) for other in layer.scaling)
    even = like.new_full((config.n_tasks, q, s), 1 / s)
    nothing = (
        like.new_zeros(q, s, size.in_features // q, r),
        like.new_zeros(q, s, r, size.out_features // q),
    )
    return Inventory(0.0, even, *nothing)


def _refined(part: Inventory, times: int) -> Inventory:
    """The same inventory with each split cut into several of the same weights."""
    A = part.A.unflatten(2, (times, -1)).transpose(1, 2).flatten(0, 1)
    B = part.B.unflatten(3, (times, -1)).movedim(3, 1).flatten(0, 1)
    return part._replace(weights=part.weights.repeat_interleave(times, dim=1), A=A, B=B)
