# SPDX-License-Identifier: Apache-2.0
"""What decides how a layer's skills are mixed: a table of tasks, or a map of the input."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...utils.error import PeftRuntimeError
from ...utils.sharding import cut_like, is_distributed, is_managed, whole
from .._geometry import Placement
from .gating import Gating, mixing_weights, open_gates


class Router(nn.Module):
    """A layer's router: logits for every split and skill, from which come mixing weights that sum to one over the skills.

    Args:
        n_splits: Number of heads.
        n_skills: Number of skills.
        how: How logits become weights; by default training draws a relaxed Bernoulli sample (temperature 1) for every row, and
            evaluation takes the sigmoid.

    Source: arXiv:2202.13914, section 3
    """

    def __init__(self, n_splits: int, n_skills: int, how: Gating = Gating()) -> None:  # noqa: B008
        super().__init__()
        self.n_splits = n_splits
        self.n_skills = n_skills
        self.how = how

    def weights(self, logits: Tensor) -> Tensor:
        """Mixing weights `[..., n_splits, n_skills]` of logits `[..., n_splits·n_skills]`."""
        return mixing_weights(logits.unflatten(-1, (self.n_splits, self.n_skills)), self.how, self.training)

    @property
    def kept(self) -> int | None:
        """How many skills of a split have a weight now, where that is limited."""
        return None if self.training else self.how.top_k


class _Rows(nn.ParameterList):
    """Rows of a table that are trained by themselves. They share the table's memory, and a checkpoint has the table."""

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class TaskRouter(Router):
    """Routing by task.

    Rows can be opened for training: each run of successive rows becomes a parameter of its own, in the table's memory, and the
    table is frozen. An optimiser then sees those rows alone: closed rows get no gradient, no weight decay, and have no state in
    it. All that reads the table (saving, merging, converting) sees what was learned.

    Args:
        n_tasks: Number of tasks.
        n_splits: Number of heads.
        n_skills: Number of skills.
        placement: Device and dtype.
        initialise: False leaves the memory as it is.
        how: How logits become weights.
        fixed: Weights are equal at the start, and the table is not trained.

    Attributes:
        module_logits: `[n_tasks, n_splits·n_skills]`, uniform between −1e−3 and 1e−3 at the start.

    Source: arXiv:2202.13914, section 3; with several splits arXiv:2211.03831, section 3
    """

    def __init__(
        self,
        n_tasks: int,
        n_splits: int,
        n_skills: int,
        placement: Placement,
        initialise: bool = True,
        how: Gating = Gating(),  # noqa: B008
        fixed: bool = False,
    ) -> None:
        super().__init__(n_splits, n_skills, how)
        device, dtype = placement
        self.fixed = fixed
        self.module_logits = nn.Parameter(torch.empty(n_tasks, n_splits * n_skills, device=device, dtype=dtype))
        self.rows = _Rows()
        self.runs: list[tuple[int, int]] = []  # where each of `rows` begins in the table, and ends
        if initialise and fixed:
            nn.init.zeros_(self.module_logits)
        elif initialise:
            nn.init.uniform_(self.module_logits, -1e-3, 1e-3)

    def forward(self, task_ids: Tensor) -> Tensor:
        """Mixing weights `[batch, n_splits, n_skills]` for task ids `[batch]`."""
        return self.weights(nn.functional.embedding(task_ids, self.table()))

    def table(self) -> Tensor:
        """All logits `[n_tasks, n_splits·n_skills]`, through which gradients reach what is trained of them."""
        if not self.runs:
            return self.module_logits
        pieces, end = [], 0
        for row, (start, stop) in zip(self.rows, self.runs, strict=True):
            pieces += [self.module_logits[end:start], row]
            end = stop
        return torch.cat([*pieces, self.module_logits[end:]])

    def logits(self) -> Tensor:
        """The table as `[n_tasks, n_splits, n_skills]`, whole."""
        return whole(self.table()).unflatten(-1, (self.n_splits, self.n_skills))

    def task_weights(self) -> Tensor:
        """The weights each task has in evaluation, `[n_tasks, n_splits, n_skills]`."""
        return mixing_weights(self.logits(), self.how, False)

    def task_gates(self) -> Tensor:
        """The gates that the weights are made of, likewise."""
        return open_gates(self.logits(), self.how, False)

    # --- rows that are trained ------------------------------------------------------------------------------------------

    @property
    def opened(self) -> list[int]:
        """The tasks whose rows are open."""
        return [task for start, stop in self.runs for task in range(start, stop)]

    def open_rows(self, tasks: Collection[int]) -> None:
        """Train the rows of some tasks, and no others.

        Raises:
            PeftRuntimeError: An engine holds the table's memory.
        """
        self.close_rows()
        if is_managed(self.module_logits):
            raise PeftRuntimeError("An engine has sharded the router; choose what trains before the model is sharded.")
        self.module_logits.requires_grad_(False)
        for task in sorted(set(tasks)):
            if self.runs and self.runs[-1][1] == task:
                self.runs[-1] = (self.runs[-1][0], task + 1)
            else:
                self.runs.append((task, task + 1))
        self.rows.extend(nn.Parameter(self.module_logits.data[start:stop]) for start, stop in self.runs)

    def close_rows(self) -> None:
        """Train no rows by themselves; the table stays frozen or not as it is."""
        self._gather()
        self.rows, self.runs = _Rows(), []

    def replace(self, table: Tensor, origin: Sequence[int | None]) -> None:
        """Put another table in place, with the rows open that were.

        Args:
            table: `[n_tasks, n_splits·n_skills]`.
            origin: For each of its rows the number it had, None for new ones.
        """
        opened = set(self.opened)
        self.close_rows()
        self.module_logits = nn.Parameter(table, requires_grad=self.module_logits.requires_grad)
        if opened:
            self.open_rows([task for task, before in enumerate(origin) if before in opened])

    # --- one memory -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _gather(self) -> None:
        """Where an engine has put rows elsewhere, bring the table up to date."""
        if any(is_distributed(row) for row in self.rows):
            values = whole(self.module_logits).clone()
            for row, (start, stop) in zip(self.rows, self.runs, strict=True):
                values[start:stop] = whole(row)
            self.module_logits.copy_(cut_like(self.module_logits, values))

    def _tie(self) -> None:
        """Give the rows the table's memory again, which has the same values."""
        for row, (start, stop) in zip(self.rows, self.runs, strict=True):
            row.data = self.module_logits.data[start:stop]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TaskRouter:
        super()._apply(fn, recurse)
        self._tie()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tie()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._gather()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._tie()


class InputRouter(Router):
    """Routing by input.

    Args:
        in_features: Size of the layer's input.
        n_splits: Number of heads.
        n_skills: Number of skills.
        placement: Device and dtype.
        initialise: False leaves the memory as it is.
        how: How logits become weights.

    Attributes:
        weight: `[n_splits·n_skills, in]`, uniform between −1e−3 and 1e−3 at the start.

    Source: arXiv:2306.03745 (SMEAR: routing by a pooled input, then merging)
    """

    def __init__(
        self,
        in_features: int,
        n_splits: int,
        n_skills: int,
        placement: Placement,
        initialise: bool = True,
        how: Gating = Gating(),  # noqa: B008
    ) -> None:
        super().__init__(n_splits, n_skills, how)
        device, dtype = placement
        self.weight = nn.Parameter(torch.empty(n_splits * n_skills, in_features, device=device, dtype=dtype))
        if initialise:
            nn.init.uniform_(self.weight, -1e-3, 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Mixing weights `[..., n_splits, n_skills]` for inputs `[..., in]`."""
        return self.weights(nn.functional.linear(x.to(self.weight.dtype), self.weight))


class SharedRouter(nn.Module):
    """The place of a router in a layer that shares the router of another, which alone has it as a part.

    Args:
        router: The other layer's.
    """

    def __init__(self, router: Router) -> None:
        super().__init__()
        self._held = (router,)  # in a tuple, torch does not see it

    @property
    def router(self) -> Router:
        """The router itself."""
        return self._held[0]


def make_router(config: Any, in_features: int, placement: Placement, initialise: bool) -> Router:
    """The router that a config asks for."""
    fixed = config.routing == "fixed"
    relaxed, dropout = (False, 0.0) if fixed else (config.relaxed_bernoulli, config.router_dropout)
    how = Gating(relaxed, config.straight_through, dropout, config.n_shared_skills, config.eval_top_k)
    if config.poly_type == "mope":
        return InputRouter(in_features, config.n_splits, config.n_skills, placement, initialise, how)
    return TaskRouter(config.n_tasks, config.n_splits, config.n_skills, placement, initialise, how, fixed)
