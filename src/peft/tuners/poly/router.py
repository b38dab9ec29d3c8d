# SPDX-License-Identifier: Apache-2.0
"""Routers of a layer: modules that return the mixing weights of its skills, by a table of tasks or
by a linear map of the input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ...base.errors import PeftTypeError
from ...base.geometry import Placement
from ...base.placeholders import placeholders
from ...core.routing.pooling import pool
from ...core.routing.task_ids import as_task_ids
from ...integrations.distributed import gathered_tensor
from .gating import Gating, mixing_weights, open_gates, task_weights
from .task_table import TaskTable

if TYPE_CHECKING:
    from .config import PolyConfig

_GATING = Gating()


if not TYPE_CHECKING:  # names of the interface that are elsewhere here, or not provided
    __getattr__ = placeholders(__name__)


class Router(nn.Module):
    """Base class of routers: logits for each split and skill become mixing weights.

    Args:
        gating: Options of the mixing weights; by default a relaxed Bernoulli draw for each sample
            in training, and the sigmoid in evaluation.

    Source: arXiv:2202.13914, section 3
    """

    def __init__(self, n_splits: int, n_skills: int, gating: Gating = _GATING) -> None:
        super().__init__()
        self.n_splits = n_splits
        self.n_skills = n_skills
        self.gating = gating

    def reset_parameters(self) -> None:
        """Initialize the parameter."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"n_splits={self.n_splits}, n_skills={self.n_skills}"


class TaskRouter(Router, TaskTable):
    """Routing by task: a table of logits, of which single rows can be trained.

    Args:
        fixed: Start with equal weights and do not train the table.

    Attributes:
        module_logits: `[n_tasks, n_splits·n_skills]`, initially uniform between −1e−3 and 1e−3.

    Source: arXiv:2202.13914, section 3; with several splits arXiv:2211.03831, section 3
    """

    table_name: ClassVar[str] = "module_logits"

    def __init__(
        self,
        n_tasks: int,
        n_splits: int,
        n_skills: int,
        placement: Placement,
        gating: Gating = _GATING,
        fixed: bool = False,
    ) -> None:
        super().__init__(n_splits, n_skills, gating)
        device, dtype = placement
        self.fixed = fixed
        self.module_logits = nn.Parameter(
            torch.empty(n_tasks, n_splits * n_skills, device=device, dtype=dtype)
        )

    def reset_parameters(self) -> None:
        """Initialize the table, with zeros if it is fixed."""
        bound = 0 if self.fixed else 1e-3
        self.overwrite(nn.init.uniform_(torch.empty_like(self.module_logits), -bound, bound))

    def forward(
        self, task_ids: object = None, input_ids: object = None, *, checked: bool = False
    ) -> Tensor:
        """Return the mixing weights of each sample's task, `[batch, n_splits, n_skills]`.

        Args:
            task_ids: `[batch]`, or another form that a call of the model accepts, except names.
            checked: `task_ids` is a tensor `[batch]` of valid ids.
        """
        if not checked or not isinstance(task_ids, Tensor):
            task_ids = as_task_ids(task_ids, [self], None, self.module_logits.device)
        return task_weights(self.table(), task_ids, self.n_splits, self.gating, self.training)

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return self.module_logits.shape[0]

    @property
    def task_names(self) -> None:
        """None: names of tasks belong to the config."""
        return None

    def extra_repr(self) -> str:
        """Return the sizes, and the rows that train."""
        opened = f", open={self.opened}" if self.runs else ""
        return f"n_tasks={self.n_tasks}, {super().extra_repr()}{opened}"

    def logits(self) -> Tensor:
        """Return the full table as `[n_tasks, n_splits, n_skills]`."""
        return gathered_tensor(self.table()).unflatten(-1, (self.n_splits, self.n_skills))

    def task_weights(self) -> Tensor:
        """Return the mixing weights of all tasks in evaluation, `[n_tasks, n_splits, n_skills]`."""
        return mixing_weights(self.logits(), self.gating, False)

    def task_gates(self) -> Tensor:
        """Return the gates of all tasks in evaluation, `[n_tasks, n_splits, n_skills]`."""
        return open_gates(self.logits(), self.gating, False)


class InputRouter(Router):
    """Routing by input: logits are a linear map of the layer's input.

    Attributes:
        weight: `[n_splits·n_skills, in]`, initially uniform between −1e−3 and 1e−3.

    Source: arXiv:2306.03745 (SMEAR: routing by a pooled input, then merging)
    """

    def __init__(
        self,
        in_features: int,
        n_splits: int,
        n_skills: int,
        placement: Placement,
        gating: Gating = _GATING,
    ) -> None:
        super().__init__(n_splits, n_skills, gating)
        device, dtype = placement
        self.in_features = in_features
        self.weight = nn.Parameter(
            torch.empty(n_splits * n_skills, in_features, device=device, dtype=dtype)
        )

    def reset_parameters(self) -> None:
        """Initialize the map."""
        nn.init.uniform_(self.weight, -1e-3, 1e-3)

    def forward(
        self, task_ids: object = None, input_ids: Tensor | None = None, *, pooled: bool = False
    ) -> Tensor:
        """Return the mixing weights of each sample, `[batch, n_splits, n_skills]`.

        Args:
            input_ids: The layer's input, `[batch, in]`; or `[batch, *leading, in]`, whose mean over
                `leading` is routed.
            pooled: Route each entry of `leading` by itself: the result is
                `[batch, *leading, n_splits, n_skills]` then.
        """
        if input_ids is None:
            raise PeftTypeError(
                "A router by input needs `input_ids`, the layer's input [batch, …, in]."
            )
        x = input_ids if pooled else pool(input_ids)
        logits = nn.functional.linear(x.to(self.weight.dtype), self.weight)
        logits = logits.unflatten(-1, (self.n_splits, self.n_skills))
        return mixing_weights(logits, self.gating, self.training)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"in_features={self.in_features}, {super().extra_repr()}"


class SharedRouter(nn.Module):
    """Placeholder in a layer that uses the router of another layer, where alone its parameters are
    registered.
    """

    def __init__(self, router: Router) -> None:
        super().__init__()
        self._held = (router,)  # in a tuple, so that torch does not register it

    @property
    def router(self) -> Router:
        """The other layer's router."""
        return self._held[0]

    def forward(self, task_ids: object = None, input_ids: object = None) -> Tensor:
        """Return the router's mixing weights."""
        return self.router(task_ids, input_ids)


def make_router(config: PolyConfig, in_features: int, placement: Placement) -> Router:
    """Return the router of a config, its parameter not yet initialized."""
    fixed = config.routing == "fixed"
    gating = Gating(
        config.relaxed_bernoulli and not fixed,
        config.straight_through,
        0.0 if fixed else config.router_dropout,
        config.n_shared_skills,
        config.eval_top_k,
    )
    if config.poly_type == "mope":
        return InputRouter(in_features, config.n_splits, config.n_skills, placement, gating)
    return TaskRouter(config.n_tasks, config.n_splits, config.n_skills, placement, gating, fixed)
