# SPDX-License-Identifier: Apache-2.0
"""Poly on a model: routing by task or input, merging one task, and growing the inventory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...utils.error import PeftNotSupportedError, PeftTypeError, PeftValueError
from ...utils.offload import at_hand
from .._build import Build
from .._combining import Combination, Combined
from .._entry import put_entry, remove_entries
from .._geometry import geometry
from .._layer import BaseTunerLayer
from .._roles import Role
from .._tuner import BaseTuner
from . import combining
from .layer import Linear, PolyLayer
from .mixing import grow_skills
from .routing import CALL_ARGUMENTS, Routing, as_task_ids, conduct_forward, conduct_generate


class PolyModel(BaseTuner):
    """A model with Poly adapters. Its calls take `task_ids`, one for each sample (unless there is one task, or input decides).

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
        "router": Role(("poly_router.module_logits",), lr=0.1),
        "input_router": Role(("poly_router.weight",)),
        "skills": Role(("poly_lora_A", "poly_lora_B"), lr=1e-3),
    }
    supported_modules: ClassVar[str] = "nn.Linear (also quantised) and Conv1D"
    combination_types: ClassVar[tuple[str, ...]] = ("cat",)
    merge_options: ClassVar[tuple[str, ...]] = ("task_id",)

    def tuner_layer_class(self, config: Any, module: nn.Module) -> type[BaseTunerLayer] | None:  # noqa: D102
        size = geometry(module)
        return None if size is None or size.is_conv else Linear

    def tuner_layer_options(self, config: Any, path: str, build: Build) -> dict[str, Any]:  # noqa: D102
        return {"routing": self.poly_routing, "stream": self.poly_routing.stream_of(path)}

    def target_problems(self, config: Any, path: str, module: nn.Module) -> Iterator[str]:
        """Both sizes must be whole numbers of splits."""
        size = geometry(module)
        assert size is not None
        for name in ("in_features", "out_features"):
            features = getattr(size, name)
            if features % config.n_splits:
                fitting = [str(d) for d in range(1, features + 1) if features % d == 0]
                choice = " or ".join([", ".join(fitting[:-1]), fitting[-1]] if len(fitting) > 1 else fitting)
                yield f"`{name}`={features} is not divisible by `n_splits`={config.n_splits}; choose {choice}."

    # --- routing ------------------------------------------------------------------------------------------------------

    @property
    def poly_routing(self) -> Routing:
        """The calls in progress; one object for all of a model's Poly adapters, found through the layers that are there."""
        if "_poly_routing" not in vars(self):
            layer = next((m for m in self.model.modules() if isinstance(m, PolyLayer)), None)
            self._poly_routing: Routing = layer.routing if layer is not None else Routing(self.model)
        return self._poly_routing

    def attach_adapter(self, build: Build) -> None:
        """Have the model's root (and its encoder, which `generate` calls by itself) report calls to the routing, and name the
        routing's arguments in its signatures.
        """
        config: Any = build.config
        if self.poly_routing.probe is None:
            self._release_model()
            encoder = self.model.get_encoder() if self.poly_routing.is_encoder_decoder else None  # type: ignore[operator]
            for module in (self.model, encoder):
                if isinstance(module, nn.Module):
                    module.register_forward_pre_hook(self.poly_routing.before, with_kwargs=True)
                    module.register_forward_hook(self.poly_routing.after)
            self.model._poly_routing = self.poly_routing  # type: ignore[assignment]
            put_entry(self.model, "forward", CALL_ARGUMENTS, conduct_forward)
            put_entry(self.model, "generate", CALL_ARGUMENTS, conduct_generate)
        self.poly_routing.configs[build.adapter_name] = config
        self.poly_routing.probe = next(self.tuner_layers())
        self.poly_routing.is_causal |= config.task_type == "CAUSAL_LM"

    def detach_adapters(self) -> None:
        """Take hooks and signatures off again."""
        self._release_model()
        self.poly_routing.configs.clear()
        self.poly_routing.probe = None

    def _release_model(self) -> None:
        """Take off hooks and signatures, also those of layers that a client took out by itself."""
        remove_entries(self.model)
        vars(self.model).pop("_poly_routing", None)
        for module in self.model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if isinstance(getattr(hook, "__self__", None), Routing):
                        del hooks[key]
                        module._forward_pre_hooks_with_kwargs.pop(key, None)

    def adapter_call_context(self, args: tuple[Any, ...], arguments: dict[str, Any]) -> AbstractContextManager[None]:
        """A call of `generate`, in which every row keeps its sample's task or decision."""
        return self.poly_routing.generating(args, arguments)

    def detach_adapter(self, adapter_name: str) -> None:  # noqa: D102
        self.poly_routing.configs.pop(adapter_name, None)

    def get_router_weights(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """How each layer mixes its skills for each task in evaluation.

        Args:
            adapter_name: By default the active adapter.

        Returns:
            `[n_tasks, n_splits, n_skills]` by module path; sums to one over the skills.

        Raises:
            PeftValueError: There is no such adapter.
            PeftNotSupportedError: It routes by input.
        """
        name = self._task_routed(adapter_name)
        return {path: layer.poly_router[name].task_weights().detach() for path, layer in self._layers_of(name)}  # type: ignore[operator]

    def _task_routed(self, adapter_name: str | None) -> str:
        """The name of an adapter that routes by task, by default the active one."""
        if adapter_name is None:
            if len(self.active_adapters) != 1:
                raise PeftValueError(f"Name one adapter: the active ones are {self.active_adapters}.")
            adapter_name = self.active_adapters[0]
        self.check_names(adapter_name)
        config: Any = self.peft_config[adapter_name]
        if config.poly_type != "poly":
            raise PeftNotSupportedError(f"Adapter {adapter_name} routes by input; it has no tasks.")
        return adapter_name

    def _layers_of(self, adapter_name: str) -> Iterator[tuple[str, PolyLayer]]:
        for path, layer in self.named_tuner_layers():
            if isinstance(layer, PolyLayer) and adapter_name in layer.scaling:
                yield path, layer

    # --- merging ------------------------------------------------------------------------------------------------------

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
            PeftValueError: A name or the task is unknown or missing, or a weight would break; nothing is merged then.
            PeftNotSupportedError: The adapter routes by input, or a weight is quantised.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        if isinstance(names, str):
            return super().merge_adapter(adapter_names, safe_merge, **options)
        tasks: dict[str, Any] = {}
        for name in self.check_names(names):
            config: Any = self.peft_config[name]
            # A name may be another number in another adapter; an adapter that routes by input is refused by its layers.
            named = config.poly_type == "poly" and task_id is not None
            tasks[name] = int(as_task_ids(task_id, [config], 1, torch.device("cpu"))[0]) if named else None
            for _, layer in self._layers_of(name):
                layer.resolve_task(name, tasks[name])
                if safe_merge:
                    with at_hand(layer):
                        layer.check_merge([name], task_id=tasks[name])
        if len(set(tasks.values())) < 2:
            return super().merge_adapter(adapter_names, safe_merge, task_id=next(iter(tasks.values()), None), **options)
        for name, task in tasks.items():
            super().merge_adapter([name], task_id=task, **options)
        return None

    # --- converting and combining -------------------------------------------------------------------------------------

    @classmethod
    def conversion_options(cls, config: Any, *, task_id: Any = None, **options: Any) -> dict[str, Any]:
        """The task, or the share of each of several: {task: share}, each by id or name.

        Raises:
            PeftNotSupportedError: The adapter routes by input.
            PeftValueError: The task is unknown, or missing where there are several.
        """
        super().conversion_options(config, **options)
        if config.poly_type != "poly":
            raise PeftNotSupportedError("An adapter that routes by input can't be converted: its delta depends on the input.")
        if isinstance(task_id, Mapping):
            shares: dict[int, float] = {}
            for task, share in task_id.items():
                number = cls._task_number(config, task)
                shares[number] = shares.get(number, 0.0) + float(share)
            return {"task_id": shares}
        return {"task_id": cls._task_number(config, task_id)}

    @classmethod
    def conversion_tasks(cls, config: Any, tasks: Any) -> dict[str, Any]:
        """The tasks by name, or as "task_0", "task_1", … where they have none.

        Raises:
            PeftNotSupportedError: The adapter routes by input.
            PeftValueError: A task is unknown.
        """
        chosen = range(config.n_tasks) if tasks is None else [tasks] if isinstance(tasks, (int, str)) else tasks
        ids = [cls.conversion_options(config, task_id=task)["task_id"] for task in chosen]
        return {config.task_names[i] if config.task_names else f"task_{i}": i for i in ids}

    @staticmethod
    def _task_number(config: Any, task: Any) -> int:
        ids = as_task_ids(task, [config], 1, torch.device("cpu"))
        return int(ids[0])

    def combine(self, request: Combination) -> Combined:  # noqa: D102
        return combining.combine(self, request)

    # --- growing ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add_tasks(self, tasks: int | Sequence[str], init: str | int = "mean", adapter_name: str | None = None) -> None:
        """Append tasks to an adapter. What existing tasks compute does not change by a bit.

        The router's parameters are replaced: make the optimiser afterwards.

        Args:
            tasks: How many, or their names (if the adapter has names, or has none yet and all get one).
            init: "mean": start from the mean of all tasks' logits. "uniform": from equal weights. A task's id or name: from
                that task.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError: `tasks` is neither a number nor names.
            PeftValueError: Nothing to add, names that are taken or missing, or an unknown `init`.
        """
        name = self._task_routed(adapter_name)
        config: Any = self.peft_config[name]
        extra, names = self._new_tasks(config, tasks)
        source = None if init in ("mean", "uniform") else int(as_task_ids(init, [config], 1, torch.device("cpu"))[0])
        for _, layer in self._layers_of(name):
            router: Any = layer.poly_router[name]
            logits = router.module_logits
            row = logits.mean(0) if init == "mean" else torch.zeros_like(logits[0]) if source is None else logits[source]
            rows = torch.cat([logits, row.expand(extra, -1)])
            router.module_logits = nn.Parameter(rows, requires_grad=logits.requires_grad)
            layer.n_tasks[name] = len(rows)
        config.n_tasks += extra
        config.task_names = names

    @staticmethod
    def _new_tasks(config: Any, tasks: Any) -> tuple[int, list[str] | None]:
        """How many tasks to add, and the names of all tasks then."""
        if isinstance(tasks, int) and not isinstance(tasks, bool):
            if tasks < 1:
                raise PeftValueError(f"`tasks`={tasks} must be at least 1.")
            if config.task_names is not None:
                raise PeftValueError(f"The adapter's tasks have names; pass {tasks} names in place of their number.")
            return tasks, None
        if isinstance(tasks, str) or not all(isinstance(task, str) for task in tasks):
            raise PeftTypeError(f"`tasks`={tasks!r} must be a number or a list of names.")
        old = config.task_names or [str(i) for i in range(config.n_tasks)]
        if not tasks or len({*old, *tasks}) != len(old) + len(tasks):
            raise PeftValueError(f"`tasks`={list(tasks)} must be new, different names; the adapter has {old}.")
        return len(tasks), [*old, *tasks]

    @torch.no_grad()
    def add_skills(self, n: int, adapter_name: str | None = None) -> None:
        """Add skills to every layer's inventory. What tasks compute in evaluation changes by rounding only.

        The most used skills are cloned, and each task shares its weight out between original and clone at random, so that gradients
        reach both and tell them apart. Parameters are replaced: make the optimiser afterwards.

        Args:
            n: How many.
            adapter_name: By default the active adapter.

        Raises:
            PeftValueError: `n` is below 1, or there is no such adapter.
        """
        name = self._task_routed(adapter_name)
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise PeftValueError(f"`n`={n!r} must be an integer of at least 1.")
        for _, layer in self._layers_of(name):
            router: Any = layer.poly_router[name]
            old = router.module_logits, layer.poly_lora_A[name], layer.poly_lora_B[name]
            logits, A, B = (
                nn.Parameter(new, requires_grad=o.requires_grad) for new, o in zip(grow_skills(*old, n), old, strict=True)
            )
            layer.poly_lora_A[name], layer.poly_lora_B[name] = A, B
            router.module_logits = logits
            router.n_skills += n
            layer.n_skills[name] += n
        self.peft_config[name].n_skills += n  # type: ignore[attr-defined]
