# SPDX-License-Identifier: Apache-2.0
"""What decides how a layer's skills are mixed: a table of tasks, or a map of the input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...base.errors import PeftTypeError
from ...base.geometry import Placement
from ...integrations.distributed import gathered_tensor
from .gating import Gating, mixing_weights, open_gates, task_weights
from .pooling import pool
from .tables import TaskTable
from .task_ids import as_task_ids


class Router(nn.Module):
    """A layer's router: logits for every split and skill, from which come mixing weights that sum
    to one over the skills.

    Args:
        n_splits: Number of heads.
        n_skills: Number of skills.
        how: How logits become weights; by default training draws a relaxed Bernoulli sample
            (temperature 1) for every row, and evaluation takes the sigmoid.

    Source: arXiv:2202.13914, section 3
    """

    def __init__(self, n_splits: int, n_skills: int, how: Gating = Gating()) -> None:  # noqa: B008
        super().__init__()
        self.n_splits = n_splits
        self.n_skills = n_skills
        self.how = how

    def reset_parameters(self) -> None:
        """Draw the logits' parameter anew."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The sizes."""
        return f"n_splits={self.n_splits}, n_skills={self.n_skills}"

    def weights(self, logits: Tensor) -> Tensor:
        """Mixing weights `[..., n_splits, n_skills]` of logits `[..., n_splits·n_skills]`."""
        return mixing_weights(
            logits.unflatten(-1, (self.n_splits, self.n_skills)), self.how, self.training
        )

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
        how: Gating = Gating(),  # noqa: B008
        fixed: bool = False,
    ) -> None:
        super().__init__(n_splits, n_skills, how)
        device, dtype = placement
        self.fixed = fixed
        self.module_logits = nn.Parameter(
            torch.empty(n_tasks, n_splits * n_skills, device=device, dtype=dtype)
        )

    def reset_parameters(self) -> None:
        """Draw the table anew, uniform between −1e−3 and 1e−3; a fixed one becomes zero."""
        bound = 0 if self.fixed else 1e-3
        self.overwrite(nn.init.uniform_(torch.empty_like(self.module_logits), -bound, bound))

    def forward(
        self, task_ids: Any = None, input_ids: Any = None, *, checked: bool = False
    ) -> Tensor:
        """Return mixing weights `[batch, n_splits, n_skills]`.

        Args:
            task_ids: `[batch]`; also in the other forms that a call of the model takes, names
                apart.
            input_ids: The layer's input, which has no influence.
            checked: The task ids are a tensor `[batch]` of valid ids.

        Raises:
            PeftTypeError: The task ids are no integers.
            PeftValueError: They are missing though there are several tasks, or out of range.
        """
        ids = (
            task_ids if checked else as_task_ids(task_ids, [self], None, self.module_logits.device)
        )
        return task_weights(self.table(), ids, self.n_splits, self.how, self.training)

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return self.module_logits.shape[0]

    @property
    def task_names(self) -> None:
        """Names of the tasks, which are with the config."""
        return None

    def extra_repr(self) -> str:
        """The sizes, and which rows are open."""
        opened = f", open={self.opened}" if self.runs else ""
        return f"n_tasks={self.n_tasks}, {super().extra_repr()}{opened}"

    def logits(self) -> Tensor:
        """The table as `[n_tasks, n_splits, n_skills]`, whole."""
        return gathered_tensor(self.table()).unflatten(-1, (self.n_splits, self.n_skills))

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
        how: Gating = Gating(),  # noqa: B008
    ) -> None:
        super().__init__(n_splits, n_skills, how)
        device, dtype = placement
        self.in_features = in_features
        self.weight = nn.Parameter(
            torch.empty(n_splits * n_skills, in_features, device=device, dtype=dtype)
        )

    def reset_parameters(self) -> None:
        """Draw the map anew, uniform between −1e−3 and 1e−3."""
        nn.init.uniform_(self.weight, -1e-3, 1e-3)

    def forward(
        self, task_ids: Any = None, input_ids: Tensor | None = None, *, pooled: bool = False
    ) -> Tensor:
        """Return mixing weights `[batch, n_splits, n_skills]`.

        Args:
            task_ids: Task ids, which have no influence.
            input_ids: The layer's input, `[batch, in]`; or `[batch, *leading, in]`, of which the
                mean over `leading` decides.
            pooled: Whether each entry of `leading` decides for itself: the result is
                `[batch, *leading, n_splits, n_skills]` then.

        Raises:
            PeftTypeError: `input_ids` is missing.
        """
        if input_ids is None:
            raise PeftTypeError(
                "A router by input needs `input_ids`, the layer's input [batch, …, in]."
            )
        x = input_ids if pooled else pool(input_ids)
        return self.weights(nn.functional.linear(x.to(self.weight.dtype), self.weight))

    def extra_repr(self) -> str:
        """The sizes."""
        return f"in_features={self.in_features}, {super().extra_repr()}"


class SharedRouter(nn.Module):
    """The place of a router in a layer that shares the router of another, which alone has it as a
    part.

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

    def forward(self, task_ids: Any = None, input_ids: Any = None) -> Tensor:
        """Return the router's mixing weights."""
        return self.router(task_ids, input_ids)


def make_router(config: Any, in_features: int, placement: Placement) -> Router:
    """Return the router that a config asks for, without values yet."""
    fixed = config.routing == "fixed"
    relaxed, dropout = (False, 0.0) if fixed else (config.relaxed_bernoulli, config.router_dropout)
    how = Gating(
        relaxed, config.straight_through, dropout, config.n_shared_skills, config.eval_top_k
    )
    if config.poly_type == "mope":
        return InputRouter(in_features, config.n_splits, config.n_skills, placement, how)
    return TaskRouter(config.n_tasks, config.n_splits, config.n_skills, placement, how, fixed)
