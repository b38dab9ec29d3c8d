# SPDX-License-Identifier: Apache-2.0
"""Layers with Poly adapters. They hold skills and routers; the math is in `mixing.py` and
`gating.py`, and `core/routing` tells the task of each row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ...base.calls.rows import IN_ORDER
from ...base.containers import AdapterModuleDict
from ...base.errors import PeftNotSupportedError, PeftTypeError, PeftValueError
from ...base.geometry import Placement
from ...base.plain_values import plain
from ...base.tracing import numel, shapes
from ...base.validation import is_int
from ...core.adapters import AdapterParameterDict, read
from ...core.layer import BaseTunerLayer
from ...core.method_info import AdapterCost, low_rank_cost
from ...core.routing.calls import Routing, TaskRows
from ...core.routing.layer import RoutingLayer
from ...ops.exact_merge import Recipe, sum_of_products
from ...ops.fused_linear import Chain
from ...ops.inference_cache import cached, is_running_often
from ...ops.low_rank import LowRank, approximate
from .mixing import (
    compact_skills,
    decoding_chain,
    mixing_matrix,
    poly_chain,
    poly_delta,
    rank_space_sizes,
    skill_columns,
    task_factors,
)
from .router import InputRouter, Router, SharedRouter, TaskRouter, make_router
from .task_skills import TaskSkills, draw_skills
from .task_table import TaskTable

if TYPE_CHECKING:
    from .config import PolyConfig

# Largest table, in elements, of which evaluation caches the weights of all tasks.
_SMALL_TABLE = 4096


class PolyLayer(RoutingLayer):
    """A layer with Poly adapters, `Δ(x) = (alpha / r) · x·A_w·B_w`, where `A_w` and `B_w` are the
    skills mixed with the weights `w` of a row's task or input.

    Args:
        base_layer: The layer to adapt.
        routing: The routing of the model, shared by its layers; None for a layer without a model.

    Attributes:
        poly_lora_A: `[n_splits, n_skills, in // n_splits, r]` by adapter name.
        poly_lora_B: `[n_splits, n_skills, r, out // n_splits]` by adapter name.
        poly_router: Routers by adapter name; `router` returns shared ones too.
        poly_task_skills: Task-specific skills, by the name of adapters with a `task_rank`.
        r, alpha, n_tasks, n_skills, n_splits: As in the config, by adapter name.

    Source: arXiv:2202.13914, section 3; with several splits arXiv:2211.03831, section 3
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("poly_lora_A", "poly_lora_B", "poly_router")
    other_param_names: ClassVar[tuple[str, ...]] = ("r", "n_tasks", "n_skills", "n_splits")
    container_names: ClassVar[tuple[str, ...]] = (*adapter_layer_names, "poly_task_skills")
    value_names: ClassVar[tuple[str, ...]] = (*other_param_names, "alpha", "token_level")

    def __init__(self, base_layer: nn.Module, routing: Routing | None = None) -> None:
        super().__init__(base_layer, routing)
        self.poly_lora_A = AdapterParameterDict()
        self.poly_lora_B = AdapterParameterDict()
        self.poly_router: AdapterModuleDict[Router | SharedRouter] = AdapterModuleDict()
        self.poly_task_skills: AdapterModuleDict[TaskSkills] = AdapterModuleDict()
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.n_tasks: dict[str, int] = {}
        self.n_skills: dict[str, int] = {}
        self.n_splits: dict[str, int] = {}
        self.token_level: dict[str, bool] = {}

    def update_layer(
        self,
        adapter_name: str,
        poly_config: PolyConfig,
        inference_mode: bool = False,
        placement: Placement | None = None,
        initialize: bool = True,
        router: Router | None = None,
        **kwargs: object,
    ) -> None:
        """Make an adapter's skills and router.

        Args:
            poly_config: Its config, with the patterns resolved for this layer.
            inference_mode: Freeze the adapter.
            placement: Device and dtype, by default the base layer's.
            initialize: Initialize the parameters; False leaves their memory as it is.
            router: The router of another layer, to share.
        """
        size, q, s, r = self.geometry, poly_config.n_splits, poly_config.n_skills, poly_config.r
        place = self._placement(placement)
        for container, shape in (
            (self.poly_lora_A, (q, s, size.in_features // q, r)),
            (self.poly_lora_B, (q, s, r, size.out_features // q)),
        ):
            values = torch.empty(shape, device=place.device, dtype=place.dtype)
            container[adapter_name] = nn.Parameter(values, requires_grad=not inference_mode)
        self.r[adapter_name], self.n_skills[adapter_name], self.n_splits[adapter_name] = r, s, q
        self.n_tasks[adapter_name] = poly_config.n_tasks
        self.alpha[adapter_name] = poly_config.alpha
        self.token_level[adapter_name] = poly_config.routing_level == "token"
        self.scaling[adapter_name] = self.base_scaling(adapter_name)
        new = SharedRouter(router) if router else make_router(poly_config, size.in_features, place)
        self.poly_router[adapter_name] = new.train(self.training).requires_grad_(
            not inference_mode and not is_fixed(new)
        )
        if poly_config.task_rank:
            sizes = poly_config.n_tasks, size.in_features, size.out_features, poly_config.task_rank
            skills = TaskSkills(*sizes, place).train(self.training)
            self.poly_task_skills[adapter_name] = skills.requires_grad_(not inference_mode)
        if initialize:
            self.reset_poly_parameters(adapter_name, poly_config.init_weights)

    @torch.no_grad()
    def reset_poly_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """Initialize the skills, and the router unless it is another layer's."""
        draw_skills(self.poly_lora_A[adapter_name], self.poly_lora_B[adapter_name], init_weights)
        router = self.poly_router[adapter_name]
        if isinstance(router, Router):
            router.reset_parameters()
        task_skills = self.task_skills(adapter_name)
        if task_skills is not None:
            task_skills.reset_parameters(init_weights)

    def base_scaling(self, adapter_name: str) -> float:
        """Return `alpha / r`."""
        return self.alpha[adapter_name] / self.r[adapter_name]

    def delta_activations(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return `(alpha / r) · x·A_w·B_w` with the weights of each row's task or input, plus the
        task-specific skills of an adapter that has them.
        """
        if x.dim() == 1:
            return self.delta_activations(adapter_name, x.unsqueeze(0)).squeeze(0)
        task_skills = self.task_skills(adapter_name)
        if task_skills is None:
            return poly_delta(*self._operands(adapter_name, x))
        tasks = self.routing.tasks(x, self, self.n_tasks[adapter_name])
        delta = poly_delta(*self._operands(adapter_name, x, tasks))
        x = self._cast_input_dtype(x, delta.dtype)
        return delta + task_skills(x, tasks, self._task_skill_scale(adapter_name, task_skills))

    def delta_chain(self, adapter_name: str, x: Tensor) -> Chain | None:
        """Return `(alpha / r) · x·A_w·B_w` as a chain; None with task-specific skills."""
        if self.task_skills(adapter_name) is not None:
            return None
        router = self.router(adapter_name)
        tasks = None
        if isinstance(router, TaskRouter):
            tasks = self.routing.tasks(x, self, self.n_tasks[adapter_name])
            if not torch.is_grad_enabled() and tasks.owners is IN_ORDER:
                chain = self._decoding_chain(adapter_name, router, x, tasks.ids)
                if chain is not None:
                    return chain
        return poly_chain(*self._operands(adapter_name, x, tasks))

    def _decoding_chain(
        self, adapter_name: str, router: TaskRouter, x: Tensor, ids: Tensor
    ) -> Chain | None:
        """Return the delta for a few rows of each sample as a chain, from cached tables; None
        without these.
        """
        scale, table, samples = self.scaling[adapter_name], router.module_logits, shapes(ids)[0]
        if (
            samples[0] == 1  # one sample's factors are mixed
            or router.training
            or router.gating.top_k is not None
            or isinstance(scale, Tensor)
            or numel(table) > _SMALL_TABLE
            or not (table.device.type == "cpu" or is_running_often())  # is not cached
        ):
            return None
        A, B = self._skills(adapter_name)
        tokens, pays = rank_space_sizes(x, samples, A, B)
        ((n_splits, n_skills, _, r),) = shapes(A)
        if not pays or n_splits * n_skills > 2 * r:  # the matrix is larger than what it mixes
            return None
        matrices = cached(
            router,
            adapter_name,
            "mixing",
            router.tensors(),
            lambda: mixing_matrix(router.task_weights(), scale).to(A.dtype),
            (router.gating, scale, A.dtype),
        )
        if matrices is None:
            return None
        mixing = matrices.index_select(0, ids)
        columns, held = None, self._modules["poly_lora_A"]._parameters.get(adapter_name)
        if is_running_often() and A is held:  # offloaded skills exist for this call only
            columns = cached(self, adapter_name, "columns", (A,), lambda: skill_columns(A))
        x = x if x.dtype == A.dtype else self._chain_input(x, A.dtype)
        return decoding_chain(x, mixing, A, B, tokens, columns)

    def _operands(
        self, adapter_name: str, x: Tensor, tasks: TaskRows | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """Return the arguments of `poly_delta`: input, mixing weights, `A`, `B` and scale."""
        A, B = self._skills(adapter_name)
        router = self.router(adapter_name)
        if x.dtype != A.dtype:  # an `InputRouter` reads the input too
            cast = self._chain_input if isinstance(router, TaskRouter) else self._cast_input_dtype
            x = cast(x, A.dtype)
        weights = self._weights(adapter_name, router, x, tasks)
        top_k = None if router.training else router.gating.top_k
        if top_k is not None:
            weights, A, B = compact_skills(weights, A, B, top_k)
        weights = weights if weights.dtype == A.dtype else weights.to(A.dtype)
        return x, weights, A, B, self.scaling[adapter_name]

    def _weights(
        self, adapter_name: str, router: Router, x: Tensor, tasks: TaskRows | None
    ) -> Tensor:
        """Return the mixing weights for an input `[rows, *leading, in]`:
        `[samples, n_splits, n_skills]`, with as many consecutive rows for each sample, or
        `[rows, *leading, n_splits, n_skills]` with routing by token.
        """
        if isinstance(router, TaskRouter):
            ids, rows = tasks or self.routing.tasks(x, self, self.n_tasks[adapter_name])
            weights = self._weights_of_tasks(adapter_name, router, ids)
            return weights if rows is IN_ORDER else rows.expand(weights, x)
        if self.token_level[adapter_name]:
            return router(input_ids=x, pooled=True)
        (weights,) = self.routing.chosen_by_input(
            x, self, adapter_name, lambda pooled: (router(input_ids=pooled, pooled=True),)
        )
        return weights

    def _weights_of_tasks(self, adapter_name: str, router: TaskRouter, ids: Tensor) -> Tensor:
        """Return the mixing weights of tasks, looked up in evaluation if the table is small."""
        table, weights = router.module_logits, None
        if not router.training and numel(table) <= _SMALL_TABLE:
            sources, make = router.tensors(), router.task_weights
            weights = cached(router, adapter_name, "weights", sources, make, router.gating)
        return router(ids, checked=True) if weights is None else weights.index_select(0, ids)

    def _skills(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return an adapter's `A` and `B`."""
        modules = self._modules
        A, B = read(adapter_name, (modules["poly_lora_A"], modules["poly_lora_B"]))
        return A, B

    def _task_skill_scale(self, adapter_name: str, task_skills: TaskSkills) -> float:
        """Return the factor on task-specific skills: `alpha / r_t`, times the user's scale."""
        return self.scaling[adapter_name] * self.r[adapter_name] / task_skills.rank

    def router(self, adapter_name: str) -> Router:
        """Return an adapter's router, which may be another layer's."""
        entry = self._modules["poly_router"]._modules[adapter_name]
        return entry.router if isinstance(entry, SharedRouter) else entry

    def task_skills(self, adapter_name: str) -> TaskSkills | None:
        """Return an adapter's task-specific skills; None if it has none."""
        return self._modules["poly_task_skills"]._modules.get(adapter_name)

    def task_weights(self, adapter_name: str) -> Tensor:
        """Return the mixing weights of all tasks in evaluation, `[n_tasks, n_splits, n_skills]`."""
        router = self.router(adapter_name)
        assert isinstance(router, TaskRouter)
        return router.task_weights()

    def blended_weights(self, adapter_name: str, shares: Mapping[int, float]) -> Tensor:
        """Return the sum of some tasks' mixing weights in evaluation, each times its share,
        `[n_splits, n_skills]`.
        """
        weights = self.task_weights(adapter_name)
        return torch.stack([weights[task] * share for task, share in shares.items()]).sum(0)

    def task_tables(self, adapter_name: str) -> Iterator[TaskTable]:
        """Yield an adapter's tables with a row for each task, except another layer's router."""
        for container in (self.poly_router, self.poly_task_skills):
            if adapter_name in container:
                yield from (
                    module
                    for module in container[adapter_name].modules()
                    if isinstance(module, TaskTable)
                )

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Unfreeze or freeze all of an adapter, except fixed routing. Tables with rows that train
        alone are closed first.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            for table in self.task_tables(name):
                if table.runs:
                    table.close_rows()
        super().set_requires_grad(names, requires_grad)
        for name in names:
            if name in self.poly_router and is_fixed(self.poly_router[name]):
                self.poly_router[name].requires_grad_(False)

    def adopt_settings(self, adapter_name: str, fresh: BaseTunerLayer, fresh_name: str) -> None:
        """Copy the options of routing: those of the mixing weights, and `routing="fixed"`."""
        assert isinstance(fresh, PolyLayer)
        router, settings = self.router(adapter_name), fresh.router(fresh_name)
        router.gating = settings.gating
        if isinstance(router, TaskRouter) and router.fixed != is_fixed(settings):
            router.close_rows()
            router.fixed = is_fixed(settings)
            router.requires_grad_(not router.fixed and self.poly_lora_A[adapter_name].requires_grad)

    def resolve_task(self, adapter_name: str, task_id: object) -> int:
        """Return a task id, checked; None stands for the only task."""
        task_id = plain(task_id)
        if task_id is not None and not is_int(task_id):
            raise PeftTypeError(
                f"`task_id`={task_id!r} must be an integer; names of tasks are for the model's "
                "methods."
            )
        if isinstance(self.router(adapter_name), InputRouter):
            raise PeftNotSupportedError(
                "An adapter that routes by input can't be merged: its delta depends on the input."
            )
        n_tasks = self.n_tasks[adapter_name]
        if task_id is None and n_tasks > 1:
            raise PeftValueError(
                f"Pass `task_id`: the adapter has {n_tasks} tasks, each with a delta of its own."
            )
        if not 0 <= (task_id or 0) < n_tasks:
            raise PeftValueError(
                f"Only {n_tasks} tasks available. Found task id = {task_id}; ids count from 0."
            )
        return task_id or 0

    def delta_recipe(
        self, adapter_name: str, task_id: int | None = None, **options: object
    ) -> Recipe:
        """Return one task's delta as pairs of factors."""
        task = self.resolve_task(adapter_name, task_id)
        return Recipe(sum_of_products, (self.geometry, *self._factors(adapter_name, {task: 1.0})))

    def _factors(
        self, adapter_name: str, shares: Mapping[int, float]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pairs `A [k, in]` and `B [out, k]` whose products sum to the delta of a blend of
        tasks, each times its share: the mixed skills of rank `r`, then task-specific skills.
        """
        A, B = self.poly_lora_A(adapter_name), self.poly_lora_B(adapter_name)
        weights = self.blended_weights(adapter_name, shares).to(A.dtype)
        yield task_factors(weights, A, B, self.scaling[adapter_name])
        if self.task_skills(adapter_name) is not None:
            yield self.task_skill_factors(adapter_name, shares)

    def task_skill_factors(
        self, adapter_name: str, shares: Mapping[int, float]
    ) -> tuple[Tensor, Tensor]:
        """Return the scaled sum of task-specific skills, each times its share, as factors
        `A [k·r_t, in]` and `B [out, k·r_t]`.
        """
        task_skills = self.task_skills(adapter_name)
        assert task_skills is not None
        left, right = task_skills.factors(shares)
        return left, right * self._task_skill_scale(adapter_name, task_skills)

    def adapter_cost(self, adapter_name: str, config: object) -> AdapterCost:
        """Return the cost of applying factors of rank `r`; the cost of mixing is left out."""
        return low_rank_cost(self.geometry, self.r[adapter_name])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether an adapter routes by task, so that its delta is a matrix for each task."""
        return isinstance(self.router(adapter_name), TaskRouter)

    def low_rank_factors(
        self,
        adapter_name: str,
        rank: int | float | None = None,
        task_id: int | Mapping[int, float] | None = None,
        **options: object,
    ) -> LowRank:
        """Return the delta of one task, or of a blend of tasks with shares, as `B·A`.

        It is exact at rank `r`, plus `r_t` for each task-specific skill.
        """
        shares = task_id if isinstance(task_id, Mapping) else {task_id: 1.0}
        if not shares:
            raise PeftValueError("`task_id`={} names no task; pass a share for each task.")
        tasks = {self.resolve_task(adapter_name, task): share for task, share in shares.items()}
        A, B = zip(*self._factors(adapter_name, tasks), strict=True)
        return approximate(torch.cat(B, dim=1).detach(), torch.cat(A).detach(), rank)


class Linear(PolyLayer):
    """A linear layer (`nn.Linear`, `Conv1D`, quantized) with Poly adapters.

    Args:
        at: The config with the patterns resolved for this layer; None for `poly_config` itself.
        **options: As for `update_layer`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        poly_config: PolyConfig,
        routing: Routing | None = None,
        at: PolyConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__(base_layer, routing)
        self.update_layer(adapter_name, at or poly_config, **options)
        self.set_adapter(adapter_name)
        if routing is None:
            self.routing.configs[adapter_name] = poly_config
            self.routing.layer = self


def is_fixed(router: nn.Module) -> bool:
    """Return whether a router is never trained."""
    return isinstance(router, TaskRouter) and router.fixed
