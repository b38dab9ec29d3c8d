# SPDX-License-Identifier: Apache-2.0
"""From a router's logits to mixing weights: the settings of the papers, and the saving where few
skills are used.

    gates `g = σ(l)`, or in training a relaxed Bernoulli draw; rounded, dropped and held open as
    asked; `w = g / Σ g`

Pure functions of tensors; shapes as in `mixing.py`.

Source: arXiv:2202.13914, section 3; arXiv:2211.03831, section 3
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.dispatch import shapes
from ...ops.triton_support import with_kernel
from .mixing import _certainly, gates, normalise


class Gating(NamedTuple):
    """How logits become mixing weights.

    Args:
        relaxed: Training draws each gate from a relaxed Bernoulli distribution; False takes the
            sigmoid as evaluation does.
        hard: Gates are rounded to 0 or 1, and gradients pass as if they were not
            (straight-through).
        dropout: Probability in training that a gate is shut.
        always_on: How many skills, the last ones, have an open gate in every task.
        top_k: In evaluation, how many skills of each split keep their weight; None for all.
    """

    relaxed: bool = True
    hard: bool = False
    dropout: float = 0.0
    always_on: int = 0
    top_k: int | None = None


def open_gates(logits: Tensor, how: Gating, training: bool) -> Tensor:
    """Gates of logits, in [0, 1]: what mixing weights are before they are divided by their sum.

    Args:
        logits: `[..., n_splits, n_skills]`.
        how: The settings.
        training: Whether gates are drawn and dropped.

    Returns:
        The shape of `logits`, in float32 at least.

    Source: arXiv:2202.13914, section 3 (relaxed Bernoulli); arXiv:1308.3432 (straight-through)
    """
    g = gates(logits, training and how.relaxed)
    if how.hard:
        g = g + (g.round() - g).detach()
    if training and how.dropout:
        g = F.dropout(g, how.dropout)
    if how.always_on:
        learned, held = g.split([g.shape[-1] - how.always_on, how.always_on], dim=-1)
        g = torch.cat([learned, torch.ones_like(held)], dim=-1)
    return g


def mixing_weights(logits: Tensor, how: Gating, training: bool) -> Tensor:
    """Mixing weights of logits: `open_gates` divided by their sum over the skills, and in
    evaluation the largest of them.

    Args:
        logits: `[..., n_splits, n_skills]`.
        how: The settings.
        training: Whether gates are drawn and dropped.

    Returns:
        The shape of `logits`, in float32 at least. Sums to one over the skills, unless all gates of
        a row are shut: to zero then.

    Example:
        >>> mixing_weights(torch.tensor([[2.0, -1.0, 0.5]]), Gating(hard=True, always_on=1), training=False)
        tensor([[0.5000, 0.0000, 0.5000]])

    Source: arXiv:2202.13914, section 3
    """
    w = normalise(open_gates(logits, how, training))
    return w if training or how.top_k is None else keep_largest(w, how.top_k)


def _example(device: torch.device) -> tuple[Tensor, Tensor, int, Gating, bool]:
    """Make arguments of `task_weights` to try a kernel with: one task has two samples, others none."""
    table = (
        (torch.arange(70, device=device, dtype=torch.float32).sin() * 4)
        .view(7, 10)
        .requires_grad_()
    )
    return table, torch.tensor([6, 0, 6], device=device), 2, Gating(), True


@with_kernel(1, _example)
def task_weights(
    table: Tensor, task_ids: Tensor, n_splits: int, how: Gating, training: bool
) -> Tensor:
    """`mixing_weights` of the rows of a table that tasks have, drawn for each sample where they
    are.

    Args:
        table: `[n_tasks, n_splits * n_skills]`.
        task_ids: `[batch]`.
        n_splits: Number of heads.
        how: The settings.
        training: Whether gates are drawn and dropped.

    Returns:
        `[batch, n_splits, n_skills]`, in float32 at least. On a GPU it is one kernel where that can
        be had (`gating_triton.py`) and gates are drawn, or not, and no more is done to them.

    Source: arXiv:2202.13914, section 3
    """
    logits = F.embedding(task_ids, table).unflatten(-1, (n_splits, -1))
    return mixing_weights(logits, how, training)


def keep_largest(weights: Tensor, k: int) -> Tensor:
    """The `k` largest weights of each row, made larger so that their sum stays what it was; the
    others zero.

    Args:
        weights: `[..., n_skills]`, not negative.
        k: At least 1.

    Example:
        >>> keep_largest(torch.tensor([0.5, 0.2, 0.3]), 2)
        tensor([0.6250, 0.0000, 0.3750])
    """
    if k >= shapes(weights)[0][-1]:
        return weights
    values, index = weights.topk(k, dim=-1)
    total = weights.sum(-1, keepdim=True)
    return torch.zeros_like(weights).scatter(
        -1, index, values / (values.sum(-1, keepdim=True) + 1e-12) * total
    )


def only_used(weights: Tensor, A: Tensor, B: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The skills that a call uses, where that is a smaller inventory: with at most `k` weights in a
    row, `samples · k` skills.

    What they compute is the same. An inventory of `n_skills` is read whole to mix it, so a lone
    sample reads `k / n_skills` of it.

    Args:
        weights: `[..., n_splits, n_skills]` with at most `k` weights that are not zero in each row.
        A: `[n_splits, n_skills, in // n_splits, r]`.
        B: `[n_splits, n_skills, r, out // n_splits]`.
        k: At least 1.

    Returns:
        Weights, `A` and `B` with `samples · k` skills; as they were, where there are no more skills
        than that.

    Source: the papers mix all skills; the construction follows from zero weights
    """
    samples, (*leading, n_splits, n_skills) = math.prod(weights.shape[:-2]), *shapes(weights)
    if not _certainly(math.prod(leading) * k < n_skills):
        return weights, A, B
    values, index = weights.reshape(samples, n_splits, n_skills).topk(k, dim=-1)
    slots = index.transpose(0, 1).flatten(
        1
    )  # [n_splits, samples * k]: each sample has `k` skills to itself
    split = torch.arange(n_splits, device=index.device).unsqueeze(-1)
    own = torch.eye(samples, dtype=values.dtype, device=values.device)
    spread = (own[:, None, :, None] * values[:, :, None, :]).flatten(2)
    return spread.reshape(*weights.shape[:-1], samples * k), A[split, slots], B[split, slots]
