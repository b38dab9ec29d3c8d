# SPDX-License-Identifier: Apache-2.0
"""Poly on a model: routing by task or input, merging one task, and growing the inventory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...base.calls.arguments import bind_arguments, entry_modules, positional_names
from ...base.containers import walk
from ...base.errors import PeftNotSupportedError, PeftTypeError
from ...core.base_layer import geometry
from ...core.build import Build
from ...core.combining import Combination, Combined
from ...core.entry_points import Entry, put_entry, remove_entries
from ...core.layer import BaseTunerLayer
from ...core.parameter_roles import Role
from . import combining
from .adaptation import AdaptingTuner
from .layer import Linear, PolyLayer
from .routing import (
    CALL_ARGUMENTS,
    Routing,
    conduct_body,
    conduct_forward,
    conduct_generate,
    conduct_part,
)
from .task_ids import one_task, some_tasks, task_shares


class PolyModel(AdaptingTuner):
    """A model with Poly adapters. Its calls take `task_ids`, one for each sample (unless there is
    one task, or input decides).

    Args:
        As `BaseTuner`.

    Example:
        >>> import torch
        >>> from peft import PolyConfig
        >>> config = PolyConfig(r=2, n_tasks=3, n_skills=2, target_modules=["0"])
        >>> model = PolyModel(torch.nn.Sequential(torch.nn.Linear(4, 6)), config, "default")
        >>> model(torch.zeros(2, 4), task_ids=[0, 2]).shape
        torch.Size([2, 6])

    Source: arXiv:2202.13914 (Polytropon), arXiv:2211.03831 (multi-head routing)
    """

    prefix: ClassVar[str] = "poly_"
    tuner_layer_cls = PolyLayer
    adapter_call_arguments: ClassVar[tuple[str, ...]] = CALL_ARGUMENTS
    parameter_roles: ClassVar[Mapping[str, Role]] = {
        "router": Role(
            ("poly_router.module_logits", "poly_router"), lr=0.1
        ),  # the table, and rows that train by themselves
        "input_router": Role(("poly_router.weight",)),
        "skills": Role(("poly_lora_A", "poly_lora_B", "poly_task_skills"), lr=1e-3),
    }
    supported_modules: ClassVar[str] = "nn.Linear (also quantised) and Conv1D"
    combination_types: ClassVar[tuple[str, ...]] = ("cat",)
    merge_options: ClassVar[tuple[str, ...]] = ("task_id",)

    def tuner_layer_class(self, config: Any, module: nn.Module) -> type[BaseTunerLayer] | None:  # noqa: D102
        size = geometry(module)
        return None if size is None or size.is_conv else Linear

    def tuner_layer_options(self, config: Any, path: str, build: Build) -> dict[str, Any]:  # noqa: D102
        options = {"routing": self.poly_routing, "at": config.at(path)}
        if config.router_granularity != "linear":
            group = config.router_group(path)
            others: Any = (
                layer
                for other, layer in build.layers.items()
                if config.router_group(other) == group
            )
            options["router"] = next((layer.router(build.adapter_name) for layer in others), None)
        return options

    def target_problems(self, config: Any, path: str, module: nn.Module) -> Iterator[str]:
        """Both sizes must be whole numbers of splits."""
        size, config = geometry(module), config.at(path)
        assert size is not None
        for name in ("in_features", "out_features"):
            features = getattr(size, name)
            if features % config.n_splits:
                fitting = [str(d) for d in range(1, features + 1) if features % d == 0]
                choice = " or ".join(
                    [", ".join(fitting[:-1]), fitting[-1]] if len(fitting) > 1 else fitting
                )
                yield f"`{name}`={features} is not divisible by `n_splits`={config.n_splits}; choose {choice}."

    @property
    def poly_routing(self) -> Routing:
        """The calls in progress; one object for all of a model's Poly adapters, found through the
        layers that are there.
        """
        if "_poly_routing" not in vars(self):
            layer = next((m for _, m in walk(self.model) if isinstance(m, PolyLayer)), None)
            self._poly_routing: Routing = (
                layer.routing if layer is not None else Routing(self.model)
            )
        return self._poly_routing

    def attach_adapter(self, build: Build) -> None:
        """Have the calls of the model (and of parts of it that `generate` calls by themselves) go
        through the routing, and name the routing's arguments in its signatures.
        """
        config: Any = build.config
        if self.poly_routing.probe is None:
            self._release_model()
            for module in entry_modules(self.model):
                module._poly_routing = self.poly_routing  # type: ignore[assignment]
                if module is not self.model:
                    put_entry(module, "forward", (), conduct_part)
            body = getattr(self.model, "base_model", None)
            if isinstance(body, nn.Module) and not any(
                body is module for module in entry_modules(self.model)
            ):
                body._poly_routing = self.poly_routing  # type: ignore[assignment]
                put_entry(body, "forward", (), conduct_body)
            put_entry(self.model, "forward", CALL_ARGUMENTS, conduct_forward)
            put_entry(self.model, "generate", CALL_ARGUMENTS, conduct_generate)
        self.poly_routing.configs[build.adapter_name] = config
        self.poly_routing.probe = next(self.tuner_layers())
        self.poly_routing.is_causal |= config.task_type == "CAUSAL_LM"

    def detach_adapters(self) -> None:
        """Give the model its own methods back."""
        self._release_model()
        self.poly_routing.configs.clear()
        self.poly_routing.probe = None

    def _release_model(self) -> None:
        """Take the routing out of the calls, also of one whose layers a client took out by itself."""
        for _, module in walk(self.model):
            remove_entries(module, conduct_forward, conduct_part, conduct_body, conduct_generate)
            vars(module).pop("_poly_routing", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with the active adapters. Where a client has put a forward of its own in
        the place of the model's since, as TRL does, that one's calls take `task_ids` too.
        """
        replaced = not torch.compiler.is_compiling() and not isinstance(
            vars(self.model).get("forward"), Entry
        )
        if replaced and self.poly_routing.probe is not None:
            put_entry(self.model, "forward", CALL_ARGUMENTS, conduct_forward)
        return super().forward(*args, **kwargs)

    def adapter_call_context(
        self, args: tuple[Any, ...], arguments: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """A call of `generate`, in which every row keeps its sample's task or decision."""
        bound = bind_arguments(positional_names(self.model.generate), args, arguments)  # type: ignore[arg-type]
        for name in CALL_ARGUMENTS:
            arguments.pop(name, None)
        return self.poly_routing.generating(self.model, bound)

    def detach_adapter(self, adapter_name: str) -> None:  # noqa: D102
        self.poly_routing.configs.pop(adapter_name, None)

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        task_id: int | str | None = None,
        **options: Any,
    ) -> None:
        """Add one task's delta to the base weights, exactly; `unmerge_adapter` takes it off again.

        Args:
            adapter_names: Which adapters, by default the active ones.
            safe_merge: Check first that every resulting weight is finite.
            task_id: The task, by id or name; not needed where there is one.

        Raises:
            PeftValueError: A name or the task is unknown or missing, or a weight would break;
                nothing is merged then.
            PeftNotSupportedError: The adapter routes by input, or a weight is quantised.
        """
        super().merge_adapter(
            adapter_names,
            safe_merge,
            **options,
            **({} if task_id is None else {"task_id": task_id}),
        )

    def merge_options_of(self, adapter_name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The task as a number, which a name may be another of in another adapter; none for one
        that routes by input, which its layers refuse.
        """
        config: Any = self.peft_config[adapter_name]
        task = options.get("task_id")
        if task is not None and config.routes_by_task:
            if isinstance(task, Mapping):
                raise PeftTypeError(
                    f"`task_id`={task!r} must be one task, by id or name; make an adapter of a "
                    "blend with `extract_tasks`, "
                    "and merge that."
                )
            task = one_task(task, config)
        for _, layer in self.poly_layers(adapter_name):
            layer.resolve_task(adapter_name, task)
        return {} if task is None else {"task_id": task}

    @classmethod
    def conversion_options(
        cls, config: Any, *, task_id: Any = None, **options: Any
    ) -> dict[str, Any]:
        """The task, or the share of each of several: {task: share}, each by id or name.

        Raises:
            PeftNotSupportedError: The adapter routes by input.
            PeftValueError: The task is unknown, or missing where there are several, or a share is
                not a finite number.
        """
        super().conversion_options(config, **options)
        if config.routes_by_input:
            raise PeftNotSupportedError(
                "An adapter that routes by input can't be converted: its delta depends on the "
                "input."
            )
        if isinstance(task_id, Mapping):
            return {"task_id": task_shares(task_id, config, "task_id")}
        return {"task_id": one_task(task_id, config)}

    @classmethod
    def conversion_tasks(cls, config: Any, tasks: Any) -> dict[str, Any]:
        """The tasks by name, or as "task_0", "task_1", … where they have none.

        Raises:
            PeftNotSupportedError: The adapter routes by input.
            PeftValueError: A task is unknown, or none is named.
        """
        cls.conversion_options(config, task_id=0)
        if isinstance(tasks, Iterable) and not isinstance(tasks, (str, Tensor)):
            tasks = list(tasks)
        ids = range(config.n_tasks) if tasks is None else some_tasks(tasks, config)
        return {config.task_names[i] if config.task_names else f"task_{i}": i for i in ids}

    def combine(self, request: Combination) -> Combined:  # noqa: D102
        return combining.combine(self, request)
