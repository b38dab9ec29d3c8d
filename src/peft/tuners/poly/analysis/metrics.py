# SPDX-License-Identifier: Apache-2.0
"""Measures of routing, as pure functions of gates and mixing weights.

Shapes: gates and weights are `[n_tasks, n_splits, n_skills]`, or any `[..., n_skills]`. Gates are
in [0, 1]; weights sum to one over the skills.

Source: arXiv:2202.13914, section 5; arXiv:2211.03831
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def discreteness(gates: Tensor) -> Tensor:
    """Return the mean entropy of gates in bits, `−(g·log₂ g + (1 − g)·log₂(1 − g))`.

    It is 0 if all gates are 0 or 1, and 1 if all are a half.

    Example:
        >>> discreteness(torch.tensor([0.0, 0.5, 1.0, 0.5]))
        tensor(0.5000)

    Source: arXiv:2202.13914, section 5
    """
    shut = 1 - gates
    nats = -(torch.special.xlogy(gates, gates) + torch.special.xlogy(shut, shut))
    return nats.mean() / math.log(2)


def sparsity(gates: Tensor) -> Tensor:
    """Return the share of gates that are open, `g > ½`.

    Source: arXiv:2202.13914, section 5
    """
    return (gates > 0.5).to(gates.dtype).mean()


def usage(weights: Tensor) -> Tensor:
    """Return each skill's share of the total weight, `[n_skills]`:
    `u_s = Σ w[..., s] / Σ_s Σ w[..., s]`.
    """
    return _shares(weights.flatten(0, -2).mean(0))


def entropy(weights: Tensor) -> Tensor:
    """Return the entropy of weights over the skills, `−Σ_s w_s·log w_s / log n_skills`.

    It is 0 for one skill, and 1 if all have the same weight.

    Returns:
        `[...]`; zeros if there is one skill.

    Example:
        >>> entropy(torch.tensor([[0.5, 0.5], [0.75, 0.25]]))
        tensor([1.0000, 0.8113])
    """
    largest = math.log(weights.shape[-1]) or 1.0
    return -torch.special.xlogy(weights, weights).sum(-1) / largest


def spread(weights: Tensor) -> Tensor:
    """Return the largest difference of a task's weight from the mean over tasks, in multiples of
    the equal weight: `max n_skills · |w − mean over tasks of w|`.

    It is 0 if all tasks mix alike.

    Args:
        weights: `[n_tasks, ..., n_skills]`, each row's sum one.

    Example:
        >>> spread(torch.tensor([[0.5, 0.5], [0.75, 0.25]]))
        tensor(0.2500)
    """
    return (weights - weights.mean(0)).abs().max() * weights.shape[-1]


def balance(weights: Tensor) -> Tensor:
    """Return the unevenness of the skills' use: `n_skills · Σ_s u_s² − 1`, the mean over splits,
    with `u` the `usage` of a split.

    It is 0 if all skills are used alike, and `n_skills − 1` if only one is used.

    Args:
        weights: `[..., n_splits, n_skills]`, the leading dimensions for tasks or samples.

    Source: arXiv:1701.06538, section 4 (squared coefficient of variation)
    """
    u = _shares(weights.flatten(0, -3).mean(0))
    return (weights.shape[-1] * u.square().sum(-1) - 1).mean()


def task_similarity(weights: Tensor) -> Tensor:
    """Return the cosines of tasks' weights less their mean over tasks, `[n_tasks, n_tasks]`.

    Args:
        weights: `[n_tasks, ...]`, for example the weights of all layers side by side.
    """
    rows = weights.flatten(1)
    rows = F.normalize(rows - rows.mean(0), dim=-1, eps=1e-8)
    return rows @ rows.T


def _shares(weights: Tensor) -> Tensor:
    """Return weights `[..., n_skills]` divided by their sum, zeros for zeros."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
