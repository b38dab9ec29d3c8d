# SPDX-License-Identifier: Apache-2.0
"""Skills that belong to one task each, beside those that all tasks share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...base.geometry import Placement
from ...ops.dispatch import shapes
from .tables import TaskTable


class _Factor(TaskTable):
    """One factor of every task's own skill, `[n_tasks, rows, columns]`."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)


class TaskSkills(nn.Module):
    """A low-rank map for each task: `x·A_t·B_t`, of rank `r_t`.

    Args:
        n_tasks: Number of tasks.
        in_features, out_features: Sizes of the layer.
        r: Rank.
        placement: Device and dtype.

    Attributes:
        A: `[n_tasks, in, r]`.
        B: `[n_tasks, r, out]`.

    Source: arXiv:2312.03248, section 3 (task-specific skills)
    """

    def __init__(
        self,
        n_tasks: int,
        in_features: int,
        out_features: int,
        r: int,
        placement: Placement,
    ) -> None:
        super().__init__()
        device, dtype = placement
        self.A = _Factor(torch.empty(n_tasks, in_features, r, device=device, dtype=dtype))
        self.B = _Factor(torch.empty(n_tasks, r, out_features, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool = True) -> None:
        """Draw every task's skill anew, `B` zero or as `A`."""
        A, B = torch.empty_like(self.A.values), torch.empty_like(self.B.values)
        self.draw(A, B, init_weights)
        self.A.overwrite(A)
        self.B.overwrite(B)

    @property
    def rank(self) -> int:
        """`r_t`."""
        return self.A.values.shape[2]

    @staticmethod
    def draw(A: Tensor, B: Tensor, init_weights: bool = True) -> None:
        """Fill factors with what a skill starts from: `A` as `nn.Linear` would, `B` zero or
        likewise.
        """
        A.uniform_(-1, 1).mul_(1 / math.sqrt(A.shape[1]))
        if init_weights:
            B.zero_()
        else:
            B.uniform_(-1, 1).mul_(1 / math.sqrt(B.shape[1]))

    def forward(self, x: Tensor, task_ids: Tensor, scale: float) -> Tensor:
        """What the tasks' own skills add for `x [rows, …, in]`, where each of `task_ids` has the
        same number of rows.
        """
        A, B = self.A.table(), self.B.table()
        batch = task_ids.shape[0]
        samples = x.reshape(
            batch, math.prod(x.shape[:-1]) // (batch if shapes(task_ids)[0][0] else 1), x.shape[-1]
        )
        own = samples.bmm(A[task_ids] * scale).bmm(B[task_ids])
        return own.reshape(*x.shape[:-1], B.shape[2])

    def factors(self, shares: Mapping[int, float]) -> tuple[Tensor, Tensor]:
        """The sum of some tasks' skills, each times its share, as `A [k·r, in]` and `B [out, k·r]`."""
        A, B = self.A.table().detach(), self.B.table().detach()
        left = torch.cat([A[task].T for task in shares])
        right = torch.cat([B[task].T * share for task, share in shares.items()], dim=1)
        return left, right

    def select(self, origin: Sequence[int | None], source: int | None = None) -> None:
        """Put other tasks in place of the present ones.

        Args:
            origin: For each the number it had, None for a new one.
            source: The task whose skill new ones start from; None for one without effect.
        """
        for_new = 0 if source is None else source
        index = torch.tensor([for_new if task is None else task for task in origin])
        A, B = (table.values.data[index.to(table.values.device)] for table in (self.A, self.B))
        new = [i for i, task in enumerate(origin) if task is None]
        if new and source is None:
            fresh = A[new], B[new]
            self.draw(*fresh)
            A[new], B[new] = fresh
        self.A.replace(A, origin)
        self.B.replace(B, origin)
