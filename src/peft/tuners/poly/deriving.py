# SPDX-License-Identifier: Apache-2.0
"""Adapters made of one Poly adapter: some of its tasks, a blend of them, or the mean of its skills."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...base.errors import PeftValueError
from ...core import combining as _combining
from ...core.combining import Combined
from .inventory import InventoryTuner
from .mixing import task_factors
from .router import InputRouter, TaskRouter
from .task_ids import task_shares

# Additions of the config that say something else than how skills are mixed.
_KEPT = ("trainable_token_indices", "alpha", "rank_pattern")


class DerivingTuner(InventoryTuner):
    """A tuner that makes adapters of one."""

    def average_skills(self, new_adapter: str, adapter_name: str | None = None) -> None:
        """Make an adapter of one task whose only skill is the mean of an adapter's skills. It
        waits, frozen, until `set_adapter`.

        Args:
            new_adapter: Its name.
            adapter_name: By default the active adapter.

        Raises:
            PeftValueError: There is no such adapter, or the new name can't be used.

        Source: arXiv:2211.03831, section 3.3 (MHR-μ)
        """
        adapter_name = self.one_adapter(adapter_name)
        layers = dict(self.poly_layers(adapter_name))
        equal = {
            path: layer.poly_lora_A[adapter_name].new_ones(
                layer.poly_lora_A[adapter_name].shape[:2]
            )
            for path, layer in layers.items()
        }
        self._one_skill(
            new_adapter, adapter_name, {path: w / w.shape[1] for path, w in equal.items()}
        )

    def extract_tasks(self, new_adapter: str, tasks: Any, adapter_name: str | None = None) -> None:
        """Make a smaller adapter of some tasks, which compute what they did. It waits, frozen,
        until `set_adapter`.

        Args:
            new_adapter: Its name.
            tasks: Ids or names: the new adapter has these, in this order, and all skills. A
                dictionary with a share for each: the new adapter has one task and one skill, the blend whose skills are mixed by the sum of the tasks' weights, each
                times its share; `{task: 1.0}` is one task as it was.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError: A task is neither a number nor a name.
            PeftValueError: A task is unknown, or none is named, a list has one twice, a share is
                not a finite number, or the new name can't be used; nothing is changed.
        """
        name = self.task_routed(adapter_name)
        if isinstance(tasks, Mapping):
            shares = task_shares(tasks, self.peft_config[name], "tasks")
            weights = {
                path: sum(
                    (router.task_weights()[task] * share for task, share in shares.items()),
                    torch.zeros(()),
                )
                for path, router in self._all_task_routers(name).items()
            }
            self._one_skill(new_adapter, name, weights, shares)
            return
        numbers = self.task_numbers(name, tasks)
        if len(set(numbers)) != len(numbers):
            raise PeftValueError(f"`tasks`={tasks!r} has a task twice.")
        config: Any = self.peft_config[name]
        tensors: dict[str, Tensor] = {}
        for path, layer in self.poly_layers(name):
            path = _combining.outer_path(path)
            for holder in ("poly_lora_A", "poly_lora_B"):
                tensors[f"{path}.{holder}"] = getattr(layer, holder)[name].detach().clone()
            skills: Any = layer.poly_task_skills
            parts = skills[name].named_children() if name in skills else ()
            for part, factor in parts:
                values = factor.table().detach()[numbers].clone()
                tensors[f"{path}.poly_task_skills.{part}.values"] = values
        for path, router in self._firsts(name):
            key = "module_logits" if isinstance(router, TaskRouter) else "weight"
            table = getattr(router, key).detach()
            tensors[f"{path}.poly_router.{key}"] = (
                table[numbers] if isinstance(router, TaskRouter) else table
            ).clone()
        names = config.task_names and [config.task_names[task] for task in numbers]
        _combining.derive(
            self,
            new_adapter,
            name,
            Combined(replace(config, n_tasks=len(numbers), task_names=names), tensors),
        )

    def _firsts(self, name: str) -> Iterator[tuple[str, Any]]:
        """An adapter's routers, each once, with the path of the first layer that has it."""
        seen: set[int] = set()
        for path, layer in self.poly_layers(name):
            router = layer.router(name)
            if id(router) not in seen:
                seen.add(id(router))
                yield _combining.outer_path(path), router

    def _all_task_routers(self, name: str) -> dict[str, TaskRouter]:
        """The routers by path, all of which have to route by task.

        Raises:
            PeftValueError: Some layer routes by input.
        """
        routers = self.task_routers(name)
        by_input = [
            path
            for path, layer in self.poly_layers(name)
            if isinstance(layer.router(name), InputRouter)
        ]
        if by_input:
            raise PeftValueError(
                f"`{by_input[0]}` routes by input; there are no weights to make one skill with."
            )
        return routers

    def _one_skill(
        self,
        new_adapter: str,
        name: str,
        weights: Mapping[str, Tensor],
        shares: Mapping[int, float] | None = None,
    ) -> None:
        """Make an adapter of one task and one skill, which is a mixture: weights
        `[n_splits, n_skills]` by path, and shares of tasks' own skills.
        """
        config: Any = self.peft_config[name]
        tensors: dict[str, Tensor] = {}
        for path, layer in self.poly_layers(name):
            A, B = layer.poly_lora_A[name].detach(), layer.poly_lora_B[name].detach()
            left, right = task_factors(weights[path].to(A.dtype), A, B)
            if shares and name in layer.poly_task_skills:
                own = layer.own_factors(name, shares)
                r, r_all = left.shape[0], left.shape[0] + own[0].shape[0]
                left = torch.cat([left, own[0]])
                # Factors of the new adapter are scaled by `alpha / r_all`, those of the old skills
                # by `alpha / r`.
                right = torch.cat([right / r, own[1] / config.alpha], dim=1) * r_all
            key = _combining.outer_path(path)
            tensors[f"{key}.poly_lora_A"], tensors[f"{key}.poly_lora_B"] = (
                left.T[None, None],
                right.T[None, None],
            )
            tensors[f"{key}.poly_router.module_logits"] = A.new_zeros(1, 1)
        plain = {
            field: value
            for field, value in type(config).absent_values.items()
            if field not in _KEPT
        }
        more = config.task_rank * len(shares or ())
        ranks = {
            "r": config.r + more,
            "rank_pattern": {key: r + more for key, r in config.rank_pattern.items()},
        }
        small = replace(
            config,
            **{**plain, **ranks, "poly_type": "poly", "n_tasks": 1, "n_skills": 1, "n_splits": 1},
        )
        _combining.derive(self, new_adapter, name, Combined(small, tensors))

    def _redraw(self, new_adapter: str, adapter_name: str, shared: bool) -> None:
        """Add an adapter like another with values of its own; `shared`: with one task and one skill
        of as many parameters.
        """
        config: Any = self.peft_config[adapter_name]
        fields: dict[str, Any] = {}
        if shared:
            plain = {
                field: value
                for field, value in type(config).absent_values.items()
                if field not in _KEPT
            }
            ranks = {key: r * config.n_skills for key, r in config.rank_pattern.items()}
            fields = {
                **plain,
                "rank_pattern": ranks,
                "r": config.r * config.n_skills,
                "poly_type": "poly",
            }
            fields |= {"n_tasks": 1, "n_skills": 1, "n_splits": 1}
        self.add_adapter(new_adapter, replace(config, inference_mode=False, **fields))
