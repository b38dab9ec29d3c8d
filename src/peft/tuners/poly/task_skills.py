# SPDX-License-Identifier: Apache-2.0
"""Task-specific skills: a low-rank map for each task, added to the mixture of the shared skills."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...base.geometry import Placement
from ...base.tracing import shapes
from ...core.routing.calls import TaskRows
from .task_table import TaskTable


def draw_skills(A: Tensor, B: Tensor, init_weights: bool = True) -> None:
    """Fill skills `A […, in, r]` and `B […, r, out]` with initial values: `A` as `nn.Linear` draws
    its weight, `B` with zeros, or as `A` if not `init_weights`.
    """
    A.uniform_(-1, 1).mul_(1 / math.sqrt(A.shape[-2]))
    if init_weights:
        B.zero_()
    else:
        B.uniform_(-1, 1).mul_(1 / math.sqrt(B.shape[-2]))


class _Factor(TaskTable):
    """One factor of every task's skill, `[n_tasks, rows, columns]`."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)


class TaskSkills(nn.Module):
    """Task-specific skills of one layer, `x·A_t·B_t` of rank `r_t`.

    Attributes:
        A: `[n_tasks, in, r_t]`.
        B: `[n_tasks, r_t, out]`.

    Source: arXiv:2312.03248, section 3 (task-specific skills)
    """

    def __init__(
        self, n_tasks: int, in_features: int, out_features: int, r: int, placement: Placement
    ) -> None:
        super().__init__()
        device, dtype = placement
        self.A = _Factor(torch.empty(n_tasks, in_features, r, device=device, dtype=dtype))
        self.B = _Factor(torch.empty(n_tasks, r, out_features, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool = True) -> None:
        """Draw every task's skill again; with `init_weights` it starts without effect."""
        A, B = torch.empty_like(self.A.values), torch.empty_like(self.B.values)
        draw_skills(A, B, init_weights)
        self.A.overwrite(A)
        self.B.overwrite(B)

    @property
    def rank(self) -> int:
        """The rank `r_t`."""
        return self.A.values.shape[2]

    def forward(self, x: Tensor, tasks: TaskRows, scale: float) -> Tensor:
        """Return `scale · x·A_t·B_t` for an input `[rows, …, in]`."""
        ids, owners = tasks
        A, B = self.A.table(), self.B.table()
        task_ids = owners.expand(ids, x)
        if owners.sequence_first:
            x, task_ids = x.transpose(0, 1), task_ids[0]
        batch = task_ids.shape[0]
        samples = x.reshape(
            batch, math.prod(x.shape[:-1]) // (batch if shapes(task_ids)[0][0] else 1), x.shape[-1]
        )
        delta = samples.bmm(A[task_ids] * scale).bmm(B[task_ids])
        delta = delta.reshape(*x.shape[:-1], B.shape[2])
        return delta.transpose(0, 1) if owners.sequence_first else delta

    def factors(self, shares: Mapping[int, float]) -> tuple[Tensor, Tensor]:
        """Return the sum of some tasks' skills, each times its share, as factors
        `A [k·r_t, in]` and `B [out, k·r_t]`.
        """
        A, B = self.A.table().detach(), self.B.table().detach()
        left = torch.cat([A[task].T for task in shares])
        right = torch.cat([B[task].T * share for task, share in shares.items()], dim=1)
        return left, right

    def selected(
        self, origin: Sequence[int | None], start: int | str = "uniform"
    ) -> tuple[Tensor, Tensor]:
        """Return the factors of other tasks: `origin` has the number that each had, None for a new
        one. New tasks start from the skill of the task `start`; with "mean" or "uniform" theirs
        have no effect yet.
        """
        source = start if isinstance(start, int) else 0
        index = torch.tensor([source if task is None else task for task in origin])
        A, B = (table.values.data[index.to(table.values.device)] for table in (self.A, self.B))
        new = [i for i, task in enumerate(origin) if task is None]
        if new and not isinstance(start, int):
            fresh = A[new], B[new]
            draw_skills(*fresh)
            A[new], B[new] = fresh
        return A, B
