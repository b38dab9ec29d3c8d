# SPDX-License-Identifier: Apache-2.0
"""What decides how a layer's skills are mixed: a table of tasks, or a map of the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...utils.sharding import whole
from .._geometry import Placement
from .mixing import gates, normalise


class Router(nn.Module):
    """A layer's router: logits for every split and skill, from which come mixing weights that sum to one over the skills.

    Training draws a relaxed Bernoulli sample (temperature 1) for every row; evaluation takes the sigmoid.

    Args:
        n_splits: Number of heads.
        n_skills: Number of skills.

    Source: arXiv:2202.13914, section 3
    """

    def __init__(self, n_splits: int, n_skills: int) -> None:
        super().__init__()
        self.n_splits = n_splits
        self.n_skills = n_skills

    def weights(self, logits: Tensor) -> Tensor:
        """Mixing weights `[..., n_splits, n_skills]` of logits `[..., n_splits·n_skills]`."""
        return normalise(gates(logits.unflatten(-1, (self.n_splits, self.n_skills)), self.training))


class TaskRouter(Router):
    """Routing by task.

    Args:
        n_tasks: Number of tasks.
        n_splits: Number of heads.
        n_skills: Number of skills.
        placement: Device and dtype.
        initialise: False leaves the memory as it is.

    Attributes:
        module_logits: `[n_tasks, n_splits·n_skills]`, uniform between −1e−3 and 1e−3 at the start.

    Source: arXiv:2202.13914, section 3; with several splits arXiv:2211.03831, section 3
    """

    def __init__(self, n_tasks: int, n_splits: int, n_skills: int, placement: Placement, initialise: bool = True) -> None:
        super().__init__(n_splits, n_skills)
        device, dtype = placement
        self.module_logits = nn.Parameter(torch.empty(n_tasks, n_splits * n_skills, device=device, dtype=dtype))
        if initialise:
            nn.init.uniform_(self.module_logits, -1e-3, 1e-3)

    def forward(self, task_ids: Tensor) -> Tensor:
        """Mixing weights `[batch, n_splits, n_skills]` for task ids `[batch]`."""
        return self.weights(nn.functional.embedding(task_ids, self.module_logits))

    def task_weights(self) -> Tensor:
        """The weights each task has in evaluation, `[n_tasks, n_splits, n_skills]`."""
        logits = whole(self.module_logits).unflatten(-1, (self.n_splits, self.n_skills))
        return normalise(gates(logits, False))


class InputRouter(Router):
    """Routing by input.

    Args:
        in_features: Size of the layer's input.
        n_splits: Number of heads.
        n_skills: Number of skills.
        placement: Device and dtype.
        initialise: False leaves the memory as it is.

    Attributes:
        weight: `[n_splits·n_skills, in]`, uniform between −1e−3 and 1e−3 at the start.

    Source: arXiv:2306.03745 (SMEAR: routing by a pooled input, then merging)
    """

    def __init__(self, in_features: int, n_splits: int, n_skills: int, placement: Placement, initialise: bool = True) -> None:
        super().__init__(n_splits, n_skills)
        device, dtype = placement
        self.weight = nn.Parameter(torch.empty(n_splits * n_skills, in_features, device=device, dtype=dtype))
        if initialise:
            nn.init.uniform_(self.weight, -1e-3, 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Mixing weights `[..., n_splits, n_skills]` for inputs `[..., in]`."""
        return self.weights(nn.functional.linear(x.to(self.weight.dtype), self.weight))


def make_router(config: Any, in_features: int, placement: Placement, initialise: bool) -> Router:
    """The router that a config asks for."""
    if config.poly_type == "mope":
        return InputRouter(in_features, config.n_splits, config.n_skills, placement, initialise)
    return TaskRouter(config.n_tasks, config.n_splits, config.n_skills, placement, initialise)
