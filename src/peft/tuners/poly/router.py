# SPDX-License-Identifier: Apache-2.0
"""What decides how a layer's skills are mixed: a table of tasks, or a map of the input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...utils.sharding import whole
from .._geometry import Placement
from .gating import Gating, mixing_weights, open_gates, task_weights
from .tables import TaskTable


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


class TaskRouter(Router, TaskTable):
    """Routing by task: a table of logits, whose rows can be trained by themselves.

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

    table_name: ClassVar[str] = "module_logits"

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
        if initialise and fixed:
            nn.init.zeros_(self.module_logits)
        elif initialise:
            nn.init.uniform_(self.module_logits, -1e-3, 1e-3)

    def forward(self, task_ids: Tensor) -> Tensor:
        """Mixing weights `[batch, n_splits, n_skills]` for task ids `[batch]`."""
        return task_weights(self.table(), task_ids, self.n_splits, self.how, self.training)

    def logits(self) -> Tensor:
        """The table as `[n_tasks, n_splits, n_skills]`, whole."""
        return whole(self.table()).unflatten(-1, (self.n_splits, self.n_skills))

    def task_weights(self) -> Tensor:
        """The weights each task has in evaluation, `[n_tasks, n_splits, n_skills]`."""
        return mixing_weights(self.logits(), self.how, False)

    def task_gates(self) -> Tensor:
        """The gates that the weights are made of, likewise."""
        return open_gates(self.logits(), self.how, False)


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
