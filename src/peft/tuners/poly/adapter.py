# SPDX-License-Identifier: Apache-2.0
"""One Poly adapter on a model: its config, its layers, and their routers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from ...base.calls.running import changing
from ...base.errors import PeftNotSupportedError, PeftValueError, warn
from ...base.registry import PeftType
from ...core.adapter_choice import named_or_active
from ...core.adapters import check_unsharded
from ...core.routing.task_ids import some_tasks
from ...integrations.distributed import check_whole, take_back
from .layer import PolyLayer
from .router import TaskRouter
from .task_skills import TaskSkills
from .task_table import TaskTable

if TYPE_CHECKING:
    from ...core.tuner import BaseTuner
    from .config import PolyConfig

Task: TypeAlias = int | str
Tasks: TypeAlias = int | str | Sequence[int | str] | Tensor


@dataclass(frozen=True, eq=False)
class PolyAdapter:
    """One Poly adapter of a tuner: its name, its config, and its layers by module path."""

    tuner: BaseTuner[PolyConfig]
    name: str
    config: PolyConfig
    layers: dict[str, PolyLayer]

    @classmethod
    def of(cls, tuner: BaseTuner[PolyConfig], adapter_name: str | None) -> PolyAdapter:
        """Return an adapter of a tuner, by default the active one."""
        adapter_name = named_or_active(adapter_name, tuner.active_adapters, tuner.peft_config)
        config = tuner.peft_config[adapter_name]
        if config.peft_type != PeftType.POLY:
            raise PeftValueError(
                f"Adapter {adapter_name} is not a Poly adapter: its config is a "
                f"{type(config).__name__}."
            )
        return cls(tuner, adapter_name, config, tuner.adapter_layers(adapter_name, PolyLayer))

    @classmethod
    def with_tasks(cls, tuner: BaseTuner[PolyConfig], adapter_name: str | None) -> PolyAdapter:
        """Return an adapter that routes by task, by default the active one."""
        adapter = cls.of(tuner, adapter_name)
        adapter.check_has_tasks()
        return adapter

    @classmethod
    @contextmanager
    def to_change(
        cls, tuner: BaseTuner[PolyConfig], adapter_name: str | None, needs_tasks: bool = True
    ) -> Iterator[PolyAdapter]:
        """Context for a change of an adapter, by default the active one."""
        with changing(tuner):
            take_back(tuner)
            adapter = (cls.with_tasks if needs_tasks else cls.of)(tuner, adapter_name)
            with changing(tuner, [adapter.name]):
                yield adapter

    def check_has_tasks(self) -> None:
        """Check that a layer routes by task."""
        if not self.config.routes_by_task:
            raise PeftNotSupportedError(f"Adapter {self.name} routes by input; it has no tasks.")

    def task_routers(self) -> dict[str, TaskRouter]:
        """Return the routers by task, by the path of each layer that uses them."""
        routers = {path: layer.router(self.name) for path, layer in self.layers.items()}
        return {path: router for path, router in routers.items() if isinstance(router, TaskRouter)}

    def task_skills(self) -> dict[str, TaskSkills]:
        """Return the layers' task-specific skills by module path; empty if `task_rank` is 0."""
        by_path = {path: layer.task_skills(self.name) for path, layer in self.layers.items()}
        return {path: skills for path, skills in by_path.items() if skills is not None}

    def task_tables(self) -> list[TaskTable]:
        """Return every tensor that has a row for each task: routers and task-specific skills."""
        return [table for layer in self.layers.values() for table in layer.task_tables(self.name)]

    def task_numbers(self, tasks: object, argument: str = "tasks") -> list[int]:
        """Return the ids of one task or several, given by id or name."""
        return some_tasks(tasks, self.config, argument)

    def is_keyword(self, value: object, keywords: Collection[str], argument: str) -> bool:
        """Return whether a value is a keyword of an argument that also takes tasks.

        A keyword takes precedence over a task of the same name, and we warn of that.
        """
        if not isinstance(value, str) or value not in keywords:
            return False
        if value in (self.config.task_names or ()):
            warn(
                f"`{argument}`={value!r} is not the task of that name: pass [{value!r}] for the "
                "task."
            )
        return True

    def check_readable(self, written: bool = False) -> None:
        """Check that no engine holds the adapter's tensors elsewhere, to read or to write them."""
        for layer in self.layers.values():
            check_whole(layer.adapter_tensors(self.name), written)

    def check_unsharded(self, action: str) -> None:
        """Check that no engine has sharded the tensors that an action, "add skills", replaces."""
        check_unsharded(self.layers, self.name, action)

    def warn_if_frozen(self) -> None:
        """Warn if no parameter of the model trains."""
        if not any(p.requires_grad for p in self.tuner.parameters()):
            warn(
                "No parameter of the model trains now. Choose parameters of adapter "
                f"{self.name} with `train_only` (its `skills`, or the routing of `tasks`), or "
                "train all of them with `set_adapter`."
            )
