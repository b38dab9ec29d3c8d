# SPDX-License-Identifier: Apache-2.0
"""Smaller adapters from one Poly adapter: some tasks, a blend of tasks, or the mean skill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...base.errors import PeftNotSupportedError, PeftValueError
from ...core.combining import Combined, derive, file_paths
from ...core.parameter_layer import ParameterLayer
from ...core.routing.task_ids import Shares, task_shares
from .adapter import PolyAdapter, Tasks
from .config import single_skill
from .layer import PolyLayer
from .mixing import task_factors
from .router import InputRouter, TaskRouter


def average_skills(adapter: PolyAdapter, new_adapter: str) -> None:
    """Make an adapter with one task and one skill, the mean of an adapter's skills."""
    adapter.check_readable()
    weights = {}
    for path, layer in adapter.layers.items():
        A = layer.poly_lora_A[adapter.name]
        weights[path] = A.new_full(A.shape[:2], 1 / A.shape[1])
    _extract_skill(adapter, new_adapter, weights, {})


def extract_tasks(adapter: PolyAdapter, new_adapter: str, tasks: Tasks | Shares) -> None:
    """Make an adapter of some tasks with all skills, or, from shares by task, of their blend."""
    adapter.check_readable()
    if isinstance(tasks, Mapping):
        shares, routers = task_shares(tasks, adapter.config, "tasks"), adapter.task_routers()
        weights = {}
        for path, layer in adapter.layers.items():
            if path not in routers:
                raise PeftValueError(
                    f"`{path}` routes by input; there are no weights to make one skill with."
                )
            weights[path] = layer.blended_weights(adapter.name, shares)
        _extract_skill(adapter, new_adapter, weights, shares)
        return
    numbers = adapter.task_numbers(tasks)
    if len(set(numbers)) != len(numbers):
        raise PeftValueError(f"`tasks`={tasks!r} has a task twice.")
    tensors: dict[str, Tensor] = {}
    name, keys = adapter.name, file_paths(adapter.layers, adapter.name)
    for path, layer in adapter.layers.items():
        key, scale = keys[path], _own_scale(layer, name)
        tensors[f"{key}.poly_lora_A"] = layer.poly_lora_A[name].detach().clone()
        tensors[f"{key}.poly_lora_B"] = layer.poly_lora_B[name].detach() * scale
        router, skills = layer.poly_router[name], layer.task_skills(name)
        if isinstance(router, TaskRouter):
            tensors[f"{key}.poly_router.module_logits"] = router.module_logits.detach()[numbers]
        elif isinstance(router, InputRouter):
            tensors[f"{key}.poly_router.weight"] = router.weight.detach().clone()
        if skills is not None:
            A, B = skills.A.table().detach(), skills.B.table().detach()
            tensors[f"{key}.poly_task_skills.A.values"] = A[numbers]
            tensors[f"{key}.poly_task_skills.B.values"] = B[numbers] * scale
    names = adapter.config.task_names
    config = replace(
        adapter.config, n_tasks=len(numbers), task_names=names and [names[task] for task in numbers]
    )
    derive(adapter.tuner, new_adapter, name, Combined(config, tensors))


def _own_scale(layer: PolyLayer, name: str) -> float:
    """Return the scale that was set for an adapter (`set_scale`), relative to its config's."""
    return float(layer.scaling[name]) / layer.base_scaling(name)


def _extract_skill(
    adapter: PolyAdapter,
    new_adapter: str,
    weights: Mapping[str, Tensor],
    shares: Mapping[int, float],
) -> None:
    """Make an adapter with one task and one skill: a mixture of an adapter's skills, with weights
    `[n_splits, n_skills]` by module path, plus task-specific skills times their shares.
    """
    name, config = adapter.name, adapter.config
    task_skills = adapter.task_skills() if shares else {}
    tensors: dict[str, Tensor] = {}
    keys = file_paths(adapter.layers, name)
    for path, layer in adapter.layers.items():
        A, B = layer.poly_lora_A[name].detach(), layer.poly_lora_B[name].detach()
        left, right = task_factors(weights[path].to(A.dtype), A, B, _own_scale(layer, name))
        if path in task_skills:
            if isinstance(layer, ParameterLayer):
                raise PeftNotSupportedError(
                    f"`{path}`: the skills that tasks have for themselves can't be taken out of a "
                    "stack of experts; extract tasks by a list."
                )
            task_left, task_right = layer.task_skill_factors(name, shares)
            r, r_new = left.shape[0], left.shape[0] + task_left.shape[0]
            left = torch.cat([left, task_left])
            # The new adapter's scale is `alpha / r_new`; task-specific factors have theirs already.
            right = torch.cat([right / r, task_right / config.alpha], dim=1) * r_new
        key = keys[path]
        tensors[f"{key}.poly_lora_A"] = left.T[None, None]
        tensors[f"{key}.poly_lora_B"] = right.T[None, None]
        tensors[f"{key}.poly_router.module_logits"] = A.new_zeros(1, 1)
    small = single_skill(config, lambda r: r + config.task_rank * len(shares))
    derive(adapter.tuner, new_adapter, name, Combined(small, tensors))
