# SPDX-License-Identifier: Apache-2.0
"""Combinations of task vectors, tensors of one shape: weighted sums, pruning and sign election.

Source: arXiv:2212.04089 (task arithmetic), arXiv:2306.01708 (TIES), arXiv:2311.03099 (DARE)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..base.errors import PeftValueError, warn


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """Return `weights [n]` with further dimensions, to broadcast over `task_tensors [n, ...]`."""
    return weights.reshape(*weights.shape, *[1] * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """Keep the `int(density · numel)` elements of largest magnitude and set the others to zero."""
    keep = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    keep[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * keep.view(tensor.shape)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Keep each element with probability `density` and set the others to zero; `rescale` divides by
    `density`, which preserves the mean.
    """
    pruned = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return pruned / density if rescale and density else pruned


def prune(
    tensor: Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False
) -> Tensor:
    """Set a share of a tensor's elements to zero.

    Args:
        tensor: A tensor of any shape.
        density: Share of elements to keep; 1 or more keeps all, with a warning.
        method: "magnitude" keeps the largest elements, "random" draws them.
        rescale: Divide the drawn elements by `density`.

    Raises:
        PeftValueError: `density` is negative, or `method` is unknown.

    Example:
        >>> prune(torch.tensor([1.0, -4.0, 2.0, 0.5]), 0.5, "magnitude")
        tensor([ 0., -4.,  2.,  0.])
    """
    if density >= 1:
        warn(f"The density {density} is greater than or equal to 1, no pruning will be performed.")
        return tensor
    if density < 0:
        raise PeftValueError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale)
    raise PeftValueError(f"Unknown method {method}; choose 'magnitude' or 'random'.")


def calculate_majority_sign_mask(
    tensor: Tensor, method: Literal["total", "frequency"] = "total"
) -> Tensor:
    """Return a mask of the elements of `[n, ...]` that have the majority sign over the first
    dimension; a tie goes to plus.

    Args:
        tensor: The stacked tensors.
        method: "total" weighs each element by its magnitude, "frequency" counts signs.

    Raises:
        PeftValueError: `method` is unknown.

    Source: arXiv:2306.01708, section 4.2
    """
    if method not in ("total", "frequency"):
        raise PeftValueError(
            f'Unimplemented mask method "{method}"; choose "total" or "frequency".'
        )
    signs = tensor.sign()
    votes = (tensor if method == "total" else signs).sum(dim=0)
    return signs == torch.where(votes >= 0, 1, -1)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """Return the mean over the first dimension of the elements in a mask, zero without any.

    Source: arXiv:2306.01708
    """
    members = majority_sign_mask.sum(dim=0).clamp(min=1)
    return (task_tensors * majority_sign_mask).sum(dim=0) / members


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """Return `Σ w_i · t_i`. Source: arXiv:2212.04089"""
    stacked = torch.stack(list(task_tensors))
    return (stacked * reshape_weight_task_tensors(stacked, weights)).sum(dim=0)


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """Return `Σ w_i · t_i` of tensors pruned by magnitude."""
    return task_arithmetic([prune(t, density, "magnitude") for t in task_tensors], weights)


def ties(
    task_tensors: list[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> Tensor:
    """Prune by magnitude, elect a sign for each element, and average the elements with that sign,
    weighted.

    Source: arXiv:2306.01708
    """
    pruned = [prune(tensor, density, "magnitude") for tensor in task_tensors]
    return _elected(pruned, weights, majority_sign_method)


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """Return `Σ w_i · t_i` of tensors pruned at random and rescaled. Source: arXiv:2311.03099"""
    return task_arithmetic([prune(t, density, "random", True) for t in task_tensors], weights)


def dare_ties(
    task_tensors: list[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> Tensor:
    """Combine as `ties`, with tensors pruned at random and rescaled. Source: arXiv:2311.03099"""
    pruned = [prune(tensor, density, "random", True) for tensor in task_tensors]
    return _elected(pruned, weights, majority_sign_method)


def _elected(
    task_tensors: list[Tensor], weights: Tensor, method: Literal["total", "frequency"]
) -> Tensor:
    stacked = torch.stack(task_tensors)
    mask = calculate_majority_sign_mask(stacked, method)
    return disjoint_merge(stacked * reshape_weight_task_tensors(stacked, weights), mask)
