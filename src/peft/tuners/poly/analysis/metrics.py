# SPDX-License-Identifier: Apache-2.0
"""How a routing is spread over its skills: the papers' measures and priors, as pure functions of
gates and mixing weights.

Shapes: gates and weights `[n_tasks, n_splits, n_skills]`, or any `[..., n_skills]`; gates are in
[0, 1], weights sum to one over the skills.

Source: arXiv:2202.13914, section 5; arXiv:2211.03831
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def discreteness(gates: Tensor) -> Tensor:
    """Mean entropy of the gates in bits, `−(g·log₂ g + (1 − g)·log₂(1 − g))`: 0 where all are open
    or shut, 1 where all are a half.

    Args:
        gates: In [0, 1], of any shape.

    Example:
        >>> discreteness(torch.tensor([0.0, 0.5, 1.0, 0.5]))
        tensor(0.5000)

    Source: arXiv:2202.13914, section 5
    """
    shut = 1 - gates
    return -(torch.special.xlogy(gates, gates) + torch.special.xlogy(shut, shut)).mean() / math.log(
        2
    )


def sparsity(gates: Tensor) -> Tensor:
    """Share of the gates that are open, `g > ½`.

    Source: arXiv:2202.13914, section 5
    """
    return (gates > 0.5).to(gates.dtype).mean()


def usage(weights: Tensor) -> Tensor:
    """Each skill's share of all tasks' weight: the mean over all but the last dimension,
    `[n_skills]`, divided by its sum.
    """
    mean = weights.flatten(0, -2).mean(0)
    return mean / mean.sum().clamp(min=torch.finfo(mean.dtype).tiny)


def entropy(weights: Tensor) -> Tensor:
    """Entropy of weights over the skills, divided by its largest value `log n_skills`: 0 for one
    skill, 1 for all alike.

    Args:
        weights: `[..., n_skills]`, each row's sum one.

    Returns:
        `[...]`; 0 where there is one skill.

    Example:
        >>> entropy(torch.tensor([[0.5, 0.5], [0.75, 0.25]]))
        tensor([1.0000, 0.8113])
    """
    largest = math.log(weights.shape[-1]) or 1.0
    return -torch.special.xlogy(weights, weights).sum(-1) / largest


def spread(weights: Tensor) -> Tensor:
    """How far tasks differ in their weights: the largest `n_skills · |w − mean over tasks of w|`. 0
    where all tasks mix alike.

    Args:
        weights: `[n_tasks, ..., n_skills]`, each row's sum one.

    Example:
        >>> spread(torch.tensor([[0.5, 0.5], [0.75, 0.25]]))
        tensor(0.2500)
    """
    return (weights - weights.mean(0)).abs().max() * weights.shape[-1]


def balance(weights: Tensor) -> Tensor:
    """How unevenly skills are used over tasks (or samples): `n_skills · Σ_s u_s² − 1`, the mean
    over splits, with `u` a split's `usage`. 0 where all are used alike, `n_skills − 1` where one
    is.

    Args:
        weights: `[..., n_splits, n_skills]`.

    Source: arXiv:1701.06538, section 4 (squared coefficient of variation)
    """
    mean = weights.flatten(0, -3).mean(0)
    u = mean / mean.sum(-1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
    return (weights.shape[-1] * u.square().sum(-1) - 1).mean()


def ibp_energy(gates: Tensor, alpha: float = 3.0) -> Tensor:
    """Negative logarithm of the Indian buffet process's probability of an allocation of skills to
    tasks, `[n_tasks, n_skills]`:

        `−K·log α + α·H_N − Σ_k [log Γ(N − m_k + 1) + log Γ(m_k) − log Γ(N + 1)]`

    with `m_k` the number of tasks that have skill `k` (the sum of its gates), `N` tasks, `K` skills
    and `H_N = Σ 1/n`. Few skills in most tasks and many in few are likely. Terms for skills that
    have just the same tasks are left out: gates that are not rounded differ.

    Args:
        gates: In [0, 1].
        alpha: Expected number of skills of a task.

    Returns:
        A number; `[...]` for gates `[..., n_tasks, n_skills]`.

    Source: arXiv:2202.13914, section 3 (the prior); Griffiths & Ghahramani, JMLR 12 (2011), eq. 14
    """
    n, k = gates.shape[-2:]
    m = gates.sum(-2).clamp(min=1e-3, max=n)
    harmonic = sum(1 / i for i in range(1, n + 1))
    terms = torch.lgamma(n - m + 1) + torch.lgamma(m) - math.lgamma(n + 1)
    return alpha * harmonic - k * math.log(alpha) - terms.sum(-1)


def task_similarity(weights: Tensor) -> Tensor:
    """Cosine of each two tasks' weights over all splits and skills, less the mean of all tasks:
    `[n_tasks, n_tasks]`.

    Args:
        weights: `[n_tasks, ...]`, such as all layers' side by side.
    """
    rows = weights.flatten(1)
    rows = rows - rows.mean(0)
    return torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
