# SPDX-License-Identifier: Apache-2.0
"""`ParamWrapper`: Poly on a parameter that is a matrix or a stack of experts' matrices."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.method_info import AdapterCost, low_rank_cost
from ...core.parameter_layer import ParameterLayer, stacked_product
from ...core.routing.calls import Routing, TaskRows
from ...ops.exact_merge import Recipe
from ...ops.grouped import GroupedRows
from .config import PolyConfig
from .layer import PolyLayer
from .mixing import mix
from .router import TaskRouter
from .task_skills import TaskSkills


class ParamWrapper(ParameterLayer, PolyLayer):
    """A layer around a module with Poly on one of its parameters.

    A stack has one router, and skills of rank `experts · r`, of which an expert has `r`. In the
    experts of transformers each token is routed by its sample's task; any other module reads the
    sum for one task, that of all samples.

    Attributes:
        poly_lora_A: `[n_splits, n_skills, in // n_splits, experts · r]` by adapter name.
        poly_lora_B: `[n_splits, n_skills, experts · r, out // n_splits]`.

    Source: arXiv:2202.13914, section 3; arXiv:2211.03831, section 3
    """

    depends_on_sample: ClassVar[bool] = True

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: PolyConfig,
        parameter_name: str,
        routing: Routing | None = None,
        at: PolyConfig | None = None,
        **options: Any,
    ) -> None:
        self.parameter_name = parameter_name
        PolyLayer.__init__(self, base_layer, routing)
        self.update_layer(adapter_name, at or config, **options)
        self.set_adapter(adapter_name)

    def update_layer(  # type: ignore[override]
        self, adapter_name: str, poly_config: PolyConfig, **options: Any
    ) -> None:
        """Make an adapter's skills for all experts, and its router."""
        stacked = copy.copy(poly_config)  # its patterns are resolved, and its values checked
        for name in ("r", "alpha", "task_rank"):
            setattr(stacked, name, getattr(poly_config, name) * self.num_experts)
        super().update_layer(adapter_name, stacked, **options)

    def forward_delta(self, adapter_name: str) -> Tensor:
        """Return the dense delta of the task that all samples have; raise if they differ."""
        x = self.poly_lora_A(adapter_name).new_empty(1, self.in_features)
        ids, _ = self._tasks(adapter_name, x)
        weights = self._weights_of_tasks(adapter_name, self._task_router(adapter_name), ids)
        A, B = self._mixed(adapter_name, weights)
        if (skills := self.task_skills(adapter_name)) is not None:
            own = self._stacks(skills.A.table()[ids[0]].T, skills.B.table()[ids[0]].T, skills.rank)
            scale = self._task_skill_scale(adapter_name, skills)
            A, B = torch.cat([A, own[0]], -2), torch.cat([B, own[1] * scale], -1)
        return stacked_product(self.geometry.transposed, A, B)

    def delta_recipe(
        self, adapter_name: str, task_id: int | None = None, **options: object
    ) -> Recipe:
        """Return one task's delta as a pair of factors."""
        task = self.resolve_task(adapter_name, task_id)
        pairs = [
            self._stacks(A, B, A.shape[0]) for A, B in self._factors(adapter_name, {task: 1.0})
        ]
        A, B = torch.cat([A for A, _ in pairs], -2), torch.cat([B for _, B in pairs], -1)
        return Recipe(stacked_product, (self.geometry.transposed, A, B))

    def expert_delta(self, adapter_name: str, x: Tensor, rows: GroupedRows) -> Tensor:
        """Return the deltas of rows that are sorted by expert, each routed by its sample's task:
        `h_qs = x_q A_qs[e]`, `z = Σ_qs w_qs h_qs`, `Δ_q = Σ_s (scale · w_qs z) B_qs[e]`.
        """
        ids, owners = self._tasks(adapter_name, rows.tokens)
        weights = self._weights_of_tasks(adapter_name, self._task_router(adapter_name), ids)
        w = rows.of_samples(weights, owners).to(x.dtype)  # [rows, n_splits, n_skills]
        down, up = self._skill_stacks(adapter_name, x.dtype)
        splits = x.unflatten(1, (len(down), -1)).unbind(1)
        hidden = [
            rows.product(x_q.contiguous(), A_q) for x_q, A_q in zip(splits, down, strict=True)
        ]
        h = torch.stack(hidden, 1).unflatten(2, (w.shape[2], -1))
        z = torch.einsum("nqs,nqsr->nr", w, h) * self.scaling[adapter_name]
        mixed = torch.einsum("nqs,nr->qnsr", w, z).flatten(2)
        delta = torch.cat([rows.product(z_q, B_q) for z_q, B_q in zip(mixed, up, strict=True)], 1)
        skills = self.task_skills(adapter_name)
        if skills is None:
            return delta
        task = rows.of_samples(ids, owners)
        return delta + self._own_skills(adapter_name, skills, x, rows, task)

    def _skill_stacks(self, adapter_name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the skills of each expert side by side, `A [n_splits, experts, in / n_splits,
        n_skills·r]` and `B [n_splits, experts, n_skills·r, out / n_splits]`.
        """
        sizes = self.num_experts, -1
        A = self.poly_lora_A(adapter_name).to(dtype).unflatten(3, sizes)
        B = self.poly_lora_B(adapter_name).to(dtype).unflatten(2, sizes)
        return A.permute(0, 3, 2, 1, 4).flatten(3), B.permute(0, 2, 1, 3, 4).flatten(2, 3)

    def _own_skills(
        self, adapter_name: str, skills: TaskSkills, x: Tensor, rows: GroupedRows, task: Tensor
    ) -> Tensor:
        """Return the deltas of the skills that tasks have for themselves: the rows are sorted by
        pairs of expert and task.
        """
        n_tasks = self.n_tasks[adapter_name]
        pair, order = (rows.expert * n_tasks + task).sort()
        sizes = self.num_experts, skills.rank // self.num_experts
        A, B = skills.A.table().unflatten(2, sizes), skills.B.table().unflatten(1, sizes)
        A, B = A.permute(2, 0, 3, 1).flatten(0, 1), B.permute(1, 0, 3, 2).flatten(0, 1)
        pairs = GroupedRows(pair, order, x, self.num_experts * n_tasks)
        delta = pairs.low_rank(x[order], A, B, self._task_skill_scale(adapter_name, skills))
        return torch.empty_like(delta).index_copy(0, order, delta)

    def adapter_cost(self, adapter_name: str, config: object) -> AdapterCost:
        """Return the cost for a row, which goes to one expert; that of mixing is left out."""
        return low_rank_cost(self.geometry, self.r[adapter_name] // self.num_experts)

    def _tasks(self, adapter_name: str, x: Tensor) -> TaskRows:
        """Return the tasks of samples. Those of samples with other adapters may be unknown here,
        and do not count.
        """
        n_tasks = self.n_tasks[adapter_name]
        ids, owners = self.routing.tasks(x, self, n_tasks)
        return TaskRows(ids.clamp(max=n_tasks - 1), owners)

    def _task_router(self, adapter_name: str) -> TaskRouter:
        router = self.router(adapter_name)
        assert isinstance(router, TaskRouter)  # the plan refuses others
        return router

    def _mixed(self, adapter_name: str, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of one task, `A […, r, in]` and `B […, out, r]`."""
        A, B = self.poly_lora_A(adapter_name), self.poly_lora_B(adapter_name)
        A_w, B_w = mix(weights.to(A.dtype), A, B, self.scaling[adapter_name])
        return self._stacks(A_w[0].T, B_w[0].T, A_w.shape[2])

    def _stacks(self, A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return `A [rank, in]` and `B [out, rank]` of all experts as factors of each expert."""
        if not self.is_stacked:
            return A, B
        sizes = self.num_experts, rank // self.num_experts
        return A.unflatten(0, sizes), B.unflatten(1, sizes).transpose(0, 1)
