# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of Poly adapters, exact for every task: one adapter with the skills of all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...base.errors import PeftNotSupportedError
from ...core.combining import Combination, Combined, check_same
from ...core.targets import patterns
from ...ops.low_rank import wide
from .config import PolyConfig, reset_routing
from .layer import PolyLayer


class Inventory(NamedTuple):
    """An adapter's skills in one layer, mixing weights and a factor: its delta is
    `factor · x·A_w·B_w`.

    Attributes:
        factor: A number of any sign.
        weights: `[n_tasks, n_splits, n_skills]`, with sum one over the skills.
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
    """Return one inventory whose delta for each task is the sum of the parts' deltas:
    `x·A'_w·B'_w / R = Σ_i f_i · x·A_w,i·B_w,i`.

    Each part has skills and ranks of its own in the result, so that the product of two parts'
    factors is zero. The gates of `m` parts are their mixing weights divided by `2m`: their sum is a
    half for every task, and each skill has an `m`-th of its old weight. `A` and `B` are multiplied
    by `m · √(|f_i| · R)` each to make up for that.

    Args:
        parts: Inventories with the same number of tasks. The result has the least common multiple
            of their numbers of splits.
        with_rest: Add a skill of zeros, which takes the weight that is missing from a sum of one
            (`has_rest`).

    Returns:
        `logits [n_tasks, n_splits · n_skills]`, `A` and `B`, with the skills of all parts and rank
        `R = Σ r`.

    Source: arXiv:2202.13914, section 3 (mixing weights), from which the construction follows
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
    """Return True if some sum of weights is below one: all gates of a split may be closed."""
    return bool((part.weights.sum(-1) < 1 - 1e-6).any())


def combine(
    configs: Mapping[str, PolyConfig], layers: Mapping[str, PolyLayer], request: Combination
) -> Combined:
    """Return the weighted sum of adapters that route by task."""
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
    result = Combined(_combined_config(first, parts, with_rest))
    for path, several in parts.items():
        logits, A, B = side_by_side(several, with_rest)
        result.tensors[f"{path}.poly_lora_A"], result.tensors[f"{path}.poly_lora_B"] = A, B
        result.tensors[f"{path}.poly_router.module_logits"] = logits
        result.errors[path] = 0.0
    return result


def _combined_config(
    config: PolyConfig, parts: Mapping[str, Sequence[Inventory]], with_rest: bool
) -> PolyConfig:
    """Return the config of the combined adapter, with plain routing and patterns for its sizes."""
    sizes = {
        "r": {path: sum(part.A.shape[3] for part in several) for path, several in parts.items()},
        "n_skills": {
            path: sum(part.A.shape[1] for part in several) + with_rest
            for path, several in parts.items()
        },
        "n_splits": {
            path: math.lcm(*(part.A.shape[0] for part in several))
            for path, several in parts.items()
        },
    }
    changes: dict[str, int | dict[str, int]] = {}
    for name, by_path in sizes.items():
        changes[name] = largest = max(by_path.values())
        changes["rank_pattern" if name == "r" else f"{name}_pattern"] = patterns(by_path, largest)
    # The options of the adapters' routing are in the weights already.
    return reset_routing(config, ("task_names", "trainable_token_indices"), **changes)


def _inventory(layer: PolyLayer, name: str, weight: float, config: PolyConfig) -> Inventory:
    """Return an adapter's inventory in a layer; skills of zeros if the adapter is not there."""
    if name in layer.scaling:
        weights = layer.task_weights(name)
        factor = weight * float(layer.scaling[name])
        return Inventory(factor, weights, layer.poly_lora_A(name), layer.poly_lora_B(name))
    q, s, r, size = config.n_splits, config.n_skills, config.r, layer.geometry
    q = q if size.in_features % q == size.out_features % q == 0 else 1
    like = next(layer.poly_lora_A(other) for other in layer.scaling)
    weights = like.new_full((config.n_tasks, q, s), 1 / s)
    A = like.new_zeros(q, s, size.in_features // q, r)
    B = like.new_zeros(q, s, r, size.out_features // q)
    return Inventory(0.0, weights, A, B)


def _refined(part: Inventory, times: int) -> Inventory:
    """Return the same inventory with each split cut into several of the same weights."""
    A = part.A.unflatten(2, (times, -1)).transpose(1, 2).flatten(0, 1)
    B = part.B.unflatten(3, (times, -1)).movedim(3, 1).flatten(0, 1)
    return part._replace(weights=part.weights.repeat_interleave(times, dim=1), A=A, B=B)
