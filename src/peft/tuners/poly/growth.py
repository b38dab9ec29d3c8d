# SPDX-License-Identifier: Apache-2.0
"""Growth of an inventory by skills that change no task's function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .gating import gates, normalize


def grow_skills(
    logits: Tensor, A: Tensor, B: Tensor, extra: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Add skills to an inventory without changing any task's function in evaluation.

    Each split clones its most used skills (by mean weight over tasks). A clone shares its parent's
    gate, `σ(l) = f·σ(l) + (1 − f)·σ(l)`, with a random `f` in (0.25, 0.75) for each task, so that
    tasks train parent and clone differently. Sums of gates, and so mixtures, stay the same. If
    `extra` exceeds the number of skills, the inventory doubles as often as needed. In training
    parent and clone draw their gates separately, so a task's weights vary slightly less.

    Args:
        logits: `[n_tasks, n_splits·n_skills]`.
        A: `[n_splits, n_skills, in // n_splits, r]`.
        B: `[n_splits, n_skills, r, out // n_splits]`.
        extra: Number of skills to add.
        generator: The source of the fractions.

    Returns:
        `logits [n_tasks, n_splits·(n_skills + extra)]`, and `A` and `B` with `n_skills + extra`
        skills, the new ones last, in their dtypes.

    Source: arXiv:2202.13914, section 3 (the gates)
    """
    n_splits, n_skills = A.shape[:2]
    clones = min(extra, n_skills)
    if clones <= 0:
        return logits, A, B

    table = logits.reshape(-1, n_splits, n_skills)
    usage = normalize(gates(table, training=False)).mean(dim=0)
    parents = usage.topk(clones, dim=-1).indices
    index = parents.expand(table.shape[0], -1, -1)
    shared = table.gather(-1, index)
    device = generator.device if generator is not None else shared.device
    dtype = torch.promote_types(shared.dtype, torch.float32)
    drawn = torch.rand(shared.shape, generator=generator, dtype=dtype, device=device)
    fraction = 0.25 + 0.5 * drawn.to(shared.device)
    kept = table.scatter(-1, index, _scale_gate(shared, 1 - fraction))
    grown = torch.cat((kept, _scale_gate(shared, fraction)), dim=-1).flatten(-2)

    split = torch.arange(n_splits, device=parents.device).unsqueeze(-1)
    A = torch.cat((A, A[split, parents]), dim=1)
    B = torch.cat((B, B[split, parents]), dim=1)
    return grow_skills(grown, A, B, extra - clones, generator)


def _scale_gate(logits: Tensor, factor: Tensor) -> Tensor:
    """Return the logits of `factor · σ(logits)` for factors well below 1, without cancellation."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scaled = factor.log() + F.logsigmoid(wide) - torch.log1p(-factor * wide.sigmoid())
    return scaled.to(logits.dtype)
