# SPDX-License-Identifier: Apache-2.0
"""Mixing weights from a router's logits, with the options of the papers:

    gates    g = σ(l), in training a relaxed Bernoulli draw; then rounded, dropped, held open
    weights  w = g / Σ_s g

Pure functions of tensors. Logits, gates and weights have the shape `[..., n_splits, n_skills]`.

Source: arXiv:2202.13914, section 3; arXiv:2211.03831, section 3
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base.tracing import shapes
from ...ops.triton_support import with_kernel


class Gating(NamedTuple):
    """Options for making mixing weights of logits.

    Args:
        relaxed: Draw each gate in training from a relaxed Bernoulli distribution; False takes the
            sigmoid as evaluation does.
        hard: Round gates to 0 or 1, and pass gradients as if they were not rounded
            (straight-through).
        dropout: Probability in training that a gate is closed.
        always_on: Number of skills, the last ones, whose gates are open in every task.
        top_k: Number of skills of each split that keep their weight in evaluation; None for all.
    """

    relaxed: bool = True
    hard: bool = False
    dropout: float = 0.0
    always_on: int = 0
    top_k: int | None = None


def gates(logits: Tensor, training: bool) -> Tensor:
    """Return a gate for each logit: `σ(l)`, in training a draw from the relaxed Bernoulli
    distribution of temperature 1, `σ(l + log u − log(1 − u))` with `u` uniform in (0, 1).

    The draws are to the bit those of `torch.distributions.RelaxedBernoulli(1, logits=l).rsample()`,
    without its checks of values.

    Returns:
        The shape of `logits`, in float32 at least: half precision has too few numbers near 0 and 1.

    Source: arXiv:2202.13914, section 3
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not training:
        return logits.sigmoid()
    return relaxed_gates(logits, torch.rand(logits.shape, dtype=logits.dtype, device=logits.device))


def relaxed_gates(logits: Tensor, u: Tensor) -> Tensor:
    """Return the gates in training for random numbers `u` of the shape of `logits`."""
    info = torch.finfo(logits.dtype)
    p = logits.sigmoid().clamp(info.eps, 1 - info.eps)
    u = u.clamp(info.eps, 1 - info.eps)
    relaxed = u.log() - (-u).log1p() + p.log() - (-p).log1p()
    return relaxed.sigmoid().clamp(info.tiny, 1 - info.eps)


def open_gates(logits: Tensor, gating: Gating, training: bool) -> Tensor:
    """Return the gates of logits with all options, in [0, 1] and in float32 at least.

    Source: arXiv:2202.13914, section 3 (relaxed Bernoulli); arXiv:1308.3432 (straight-through)
    """
    g = gates(logits, training and gating.relaxed)
    if gating.hard:
        g = g + (g.round() - g).detach()
    if training and gating.dropout:
        g = F.dropout(g, gating.dropout)
    if gating.always_on:
        learned, held = g.split([g.shape[-1] - gating.always_on, gating.always_on], dim=-1)
        g = torch.cat([learned, torch.ones_like(held)], dim=-1)
    return g


def normalize(gates: Tensor, eps: float = 1e-12) -> Tensor:
    """Return mixing weights, `w_s = g_s / (Σ_s g_s + eps)`; zeros if all gates are closed.

    Example:
        >>> normalize(torch.tensor([0.5, 0.5, 1.0]))
        tensor([0.2500, 0.2500, 0.5000])

    Source: arXiv:2202.13914, section 3
    """
    return gates / (gates.sum(dim=-1, keepdim=True) + eps)


def mixing_weights(logits: Tensor, gating: Gating, training: bool) -> Tensor:
    """Return the mixing weights of logits: normalized gates, in evaluation the largest of them.

    Args:
        logits: `[..., n_splits, n_skills]`.
        gating: The options.
        training: Draw and drop gates.

    Returns:
        The shape of `logits`, in float32 at least. Rows sum to one, or to zero if all of their
        gates are closed.

    Example:
        >>> gating = Gating(hard=True, always_on=1)
        >>> mixing_weights(torch.tensor([[2.0, -1.0, 0.5]]), gating, training=False)
        tensor([[0.5000, 0.0000, 0.5000]])

    Source: arXiv:2202.13914, section 3
    """
    w = normalize(open_gates(logits, gating, training))
    return w if training or gating.top_k is None else keep_top_k(w, gating.top_k)


def _example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return arguments of `_weights_of_draws` to try its kernel; one task has two samples."""
    table = (torch.arange(70, device=device, dtype=torch.float32).sin() * 4).view(7, 10)
    draws = torch.arange(1, 31, device=device, dtype=torch.float32).view(3, 2, 5) / 31
    return table.requires_grad_(), torch.tensor([6, 0, 6], device=device), draws, 2


@with_kernel(
    "task_weights",
    "Tensor table, Tensor task_ids, Tensor? draws, SymInt n_splits",
    "Tensor",
    _example,
)
def _weights_of_draws(
    table: Tensor, task_ids: Tensor, draws: Tensor | None, n_splits: int
) -> Tensor:
    """Return the mixing weights of each sample's task, without options, for given draws or none."""
    logits = F.embedding(task_ids, table).unflatten(-1, (n_splits, -1))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return normalize(logits.sigmoid() if draws is None else relaxed_gates(logits, draws))


def task_weights(
    table: Tensor, task_ids: Tensor, n_splits: int, gating: Gating, training: bool
) -> Tensor:
    """Return the mixing weights of each sample's task. In training each sample has its own draw.

    On a GPU a Triton kernel computes them if no option but `relaxed` is set (`gating_triton.py`).

    Args:
        table: Logits, `[n_tasks, n_splits·n_skills]`.
        task_ids: `[batch]`.
        training: Draw and drop gates.

    Returns:
        `[batch, n_splits, n_skills]`, in float32 at least.

    Source: arXiv:2202.13914, section 3
    """
    if gating.hard or gating.always_on or (gating.dropout if training else gating.top_k):
        logits = F.embedding(task_ids, table).unflatten(-1, (n_splits, -1))
        return mixing_weights(logits, gating, training)
    draws = None
    if training and gating.relaxed:
        (_, width), (batch,) = shapes(table, task_ids)
        dtype = torch.promote_types(table.dtype, torch.float32)
        draws = torch.rand((batch, n_splits, width // n_splits), dtype=dtype, device=table.device)
    return _weights_of_draws(table, task_ids, draws, n_splits)


def keep_top_k(weights: Tensor, k: int) -> Tensor:
    """Return weights with zeros for all but the `k` largest of each row, which are scaled up to the
    sum of the row.

    Args:
        weights: `[..., n_skills]`, not negative.
        k: At least 1.

    Example:
        >>> keep_top_k(torch.tensor([0.5, 0.2, 0.3]), 2)
        tensor([0.6250, 0.0000, 0.3750])
    """
    if k >= shapes(weights)[0][-1]:
        return weights
    values, index = weights.topk(k, dim=-1)
    total = weights.sum(-1, keepdim=True)
    values = values / (values.sum(-1, keepdim=True) + 1e-12) * total
    return torch.zeros_like(weights).scatter(-1, index, values)
