# SPDX-License-Identifier: Apache-2.0
"""`PolyModel`: a model with Poly adapters, and its methods for tasks and skills."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from ...base.calls.running import changing
from ...base.errors import PeftNotSupportedError, PeftTypeError
from ...checkpoint.format import CheckpointFormat, ModuleShape, Shapes
from ...core.base_layer import geometry
from ...core.combining import Combination, Combined
from ...core.fitting import Loss
from ...core.injection import Build
from ...core.layer import BaseTunerLayer
from ...core.method_info import Role
from ...core.parameter_targets import ParameterTarget
from ...core.routing.task_ids import Shares, one_task, some_tasks, task_shares
from ...core.routing.tuner import RoutingTuner
from . import combining, extraction, fewshot, inventory, regimes
from .adapter import PolyAdapter, Task, Tasks
from .config import PolyConfig
from .fewshot import TaskFit
from .inventory import WeightTable
from .layer import Linear, PolyLayer
from .param_wrapper import ParamWrapper
from .regimes import Regime


class PolyFormat(CheckpointFormat[PolyConfig]):
    """Poly's tensors in a checkpoint, which are those in a model."""

    def module_shape(self, shapes: Shapes) -> ModuleShape | None:
        """Return the size from the skills `A [q, s, in / q, r]` and `B [q, s, r, out / q]`."""
        A, B = shapes.get("poly_lora_A", ()), shapes.get("poly_lora_B", ())
        if len(A) != 4 or len(B) != 4:
            return None
        return ModuleShape(B[0] * B[3], A[0] * A[2], A[3])


class PolyModel(RoutingTuner[PolyConfig]):
    """A model with Poly adapters. Its calls take `task_ids`, one for each sample, unless there is
    one task only or all routing is by input.

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
    parameter_layer_cls = ParamWrapper
    checkpoint_format = PolyFormat()
    parameter_roles: ClassVar[Mapping[str, Role]] = {
        # The table of logits, and rows of it that train alone.
        "router": Role(("poly_router.module_logits", "poly_router"), lr=0.1),
        "input_router": Role(("poly_router.weight",)),
        "skills": Role(("poly_lora_A", "poly_lora_B", "poly_task_skills"), lr=1e-3),
    }
    supported_modules: ClassVar[str] = (
        "nn.Linear (also quantized), Conv1D and nn.MultiheadAttention"
    )
    combination_types: ClassVar[tuple[str, ...]] = ("cat",)

    def tuner_layer_class(  # noqa: D102
        self, config: PolyConfig, module: nn.Module
    ) -> type[BaseTunerLayer] | None:
        size = geometry(module)
        return None if size is None or size.is_conv else Linear

    def tuner_layer_options(
        self, config: PolyConfig, path: str, build: Build[PolyConfig]
    ) -> dict[str, object]:
        """Return the routing, the layer's own config, and the router that it shares, if any."""
        options: dict[str, object] = {"routing": self.routing, "at": config.at(path)}
        if config.router_granularity != "linear":
            group = config.router_group(path)
            routers = (
                layer.router(build.adapter_name)
                for other, layer in build.named_layers()
                if isinstance(layer, PolyLayer) and config.router_group(other) == group
            )
            options["router"] = next(routers, None)
        return options

    def target_problems(self, config: PolyConfig, path: str, module: nn.Module) -> Iterator[str]:
        """Yield a sentence for each size that `n_splits` does not divide."""
        size, n_splits = geometry(module), config.at(path).n_splits
        for name in ("in_features", "out_features"):
            features = getattr(size, name)
            if features % n_splits:
                *others, last = (str(d) for d in range(1, features + 1) if features % d == 0)
                choice = f"{', '.join(others)} or {last}" if others else last
                yield (
                    f"`{name}`={features} is not divisible by `n_splits`={n_splits}; choose "
                    f"{choice}."
                )

    def parameter_problems(self, config: PolyConfig, target: ParameterTarget) -> Iterator[str]:
        """Yield sizes that `n_splits` does not divide, and routing by an input."""
        resolved = config.at(target.key)
        for features in (target.size.in_features, target.size.out_features):
            if features % resolved.n_splits:
                yield f"its size {features} is not divisible by `n_splits`={resolved.n_splits}."
        if resolved.routes_by_input:
            yield "an adapter of a parameter sees no input to route by; route by task."

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        task_id: Task | None = None,
        **options: object,
    ) -> None:
        """Add one task's delta to the base weights; `unmerge_adapter` restores them exactly.

        Args:
            adapter_names: Which adapters, by default the active ones.
            safe_merge: Check first that every resulting weight is finite.
            task_id: The task, by id or name; not needed if there is only one.

        Raises:
            PeftValueError: A name or the task is unknown or missing, or a weight would not be
                finite; nothing is merged then.
            PeftNotSupportedError: The adapter routes by input, or a weight is quantized.
        """
        if task_id is not None:
            options["task_id"] = task_id
        super().merge_adapter(adapter_names, safe_merge, **options)

    def merge_options_of(self, adapter_name: str, options: Mapping[str, object]) -> dict[str, int]:
        """Return the id of the task to merge; a name is looked up in each adapter."""
        config, task = self.peft_config[adapter_name], options.get("task_id")
        number: int | None = None
        if task is not None and config.routes_by_task:
            if isinstance(task, Mapping):
                raise PeftTypeError(
                    f"`task_id`={task!r} must be one task, by id or name; make an adapter of a "
                    "blend with `extract_tasks`, and merge that."
                )
            number = one_task(task, config)
        for layer in PolyAdapter.of(self, adapter_name).layers.values():
            layer.resolve_task(adapter_name, number)
        return {} if number is None else {"task_id": number}

    @classmethod
    def conversion_options(
        cls, config: PolyConfig, *, task_id: Task | Shares | None = None, **options: object
    ) -> dict[str, int | dict[int, float]]:
        """Return the task, or the shares of several, by id."""
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
    def delta_views(cls, config: PolyConfig) -> dict[str, Mapping[str, object]]:
        """Return the options of each task, by its name; of an only task without a name under ""."""
        if config.n_tasks == 1 and not config.task_names:
            return {"": cls.conversion_options(config, task_id=0)}
        tasks = cls.conversion_tasks(config, None)
        return {name: {"task_id": task} for name, task in tasks.items()}

    @classmethod
    def conversion_tasks(cls, config: PolyConfig, tasks: Tasks | None) -> dict[str, int]:
        """Return ids of tasks by folder name: the task's name, or "task_0", "task_1", …."""
        cls.conversion_options(config, task_id=0)
        if isinstance(tasks, Iterable) and not isinstance(tasks, (str, Tensor)):
            tasks = list(tasks)
        ids = range(config.n_tasks) if tasks is None else some_tasks(tasks, config)
        return {config.task_names[i] if config.task_names else f"task_{i}": i for i in ids}

    def combine(self, request: Combination, layers: Mapping[str, PolyLayer]) -> Combined:
        """Combine adapters into a new one."""
        return combining.combine(self.peft_config, layers, request)

    def get_router_weights(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """Return the weights with which each task mixes the skills in evaluation.

        Args:
            adapter_name: By default the active adapter.

        Returns:
            `[n_tasks, n_splits, n_skills]` by module path, with sum one over the skills. Layers
            that route by input are left out.

        Raises:
            PeftValueError: There is no such adapter.
            PeftNotSupportedError: It routes by input.
        """
        adapter = PolyAdapter.with_tasks(self, adapter_name)
        adapter.check_readable()
        routers = adapter.task_routers()
        return {path: router.task_weights().detach() for path, router in routers.items()}

    def set_router_weights(
        self, weights: WeightTable | Mapping[str, WeightTable], adapter_name: str | None = None
    ) -> None:
        """Set the weights with which each task mixes the skills, as `get_router_weights` returns
        them. They stay so with `routing="fixed"`; learned routing starts from them.

        Args:
            weights: `[n_tasks, n_skills]` for all splits, or `[n_tasks, n_splits, n_skills]`; not
                negative, and not all zero in a row. Rows are divided by their sums; with
                `straight_through` the skills with a weight share it equally. A dictionary has
                such a table for some module paths.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError: A table does not hold real numbers; nothing is changed.
            PeftValueError: A path is unknown, or a table has a wrong shape or values that are not
                allowed; nothing is changed.

        Example:
            >>> from peft import PolyConfig, get_peft_model
            >>> config = PolyConfig(
            ...     n_tasks=2, n_skills=2, routing="fixed", target_modules=["0"])
            >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), config)
            >>> model.set_router_weights([[1.0, 0.0], [0.25, 0.75]])
            >>> model.get_router_weights()["0"].squeeze(1).round(decimals=4)
            tensor([[1.0000, 0.0000],
                    [0.2500, 0.7500]])
        """
        with PolyAdapter.to_change(self, adapter_name) as adapter:
            inventory.set_router_weights(adapter, weights)

    def add_tasks(
        self, tasks: int | Sequence[str], init: Task = "mean", adapter_name: str | None = None
    ) -> None:
        """Append tasks to an adapter. Outputs for the others do not change by a bit.

        The router's parameters are replaced: make the optimizer afterwards.

        Args:
            tasks: How many, or a list of their names. Where the other tasks have no names, they
                then get "0", "1", ….
            init: Start of their routing. "mean": the mean of all tasks' gates; "uniform": equal
                weights; a task's id or name: that task's, with a copy of its task-specific
                skill. A task named "mean" or "uniform" is passed as `["mean"]`.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError: `tasks` is neither a number nor names.
            PeftValueError: There is nothing to add, names are taken or missing, or `init` is
                unknown.
            PeftRuntimeError: The model is sharded already.
        """
        with PolyAdapter.to_change(self, adapter_name) as adapter:
            inventory.add_tasks(adapter, tasks, init)

    def remove_tasks(self, tasks: Tasks, adapter_name: str | None = None) -> None:
        """Remove tasks from an adapter. Later ones move up; outputs for the others do not change by
        a bit.

        The router's parameters are replaced: make the optimizer afterwards. Warns if no
        parameter of the model trains any more.

        Args:
            tasks: Ids or names.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError: A task is neither an integer nor a name.
            PeftValueError: A task is unknown, or none is given, or none would be left; nothing is
                changed.
            PeftRuntimeError: The model is sharded already.

        Example:
            >>> from peft import PolyConfig, get_peft_model
            >>> config = PolyConfig(
            ...     n_tasks=3, task_names=["sum", "max", "sort"], target_modules=["0"])
            >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), config)
            >>> model.remove_tasks("max")
            >>> model.peft_config["default"].task_names
            ['sum', 'sort']
        """
        with PolyAdapter.to_change(self, adapter_name) as adapter:
            inventory.remove_tasks(adapter, tasks)

    def reorder_tasks(self, order: Sequence[Task], adapter_name: str | None = None) -> None:
        """Give an adapter's tasks other ids. The outputs for a task do not change by a bit.

        The router's parameters are replaced: make the optimizer afterwards.

        Args:
            order: All tasks by present id or name, in the new order.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError: A task is neither an integer nor a name.
            PeftValueError: `order` does not have each task once; nothing is changed.
            PeftRuntimeError: The model is sharded already.
        """
        with PolyAdapter.to_change(self, adapter_name) as adapter:
            inventory.reorder_tasks(adapter, order)

    def add_skills(self, n: int, adapter_name: str | None = None) -> None:
        """Add skills to every layer. Outputs in evaluation change by rounding only.

        The most used skills are cloned. Each task splits its weight between original and clone at
        random, so that they get different gradients. Parameters are replaced: make the optimizer
        afterwards.

        Args:
            n: Number of skills to add.
            adapter_name: By default the active adapter.

        Raises:
            PeftValueError: `n` is below 1, or there is no such adapter.
            PeftRuntimeError: The model is sharded already.
            PeftNotSupportedError: A task's weight can't be split: gates are 0 or 1, some skills
                are always on or cut off, or layers share a router or route by input.
        """
        with PolyAdapter.to_change(self, adapter_name) as adapter:
            inventory.add_skills(adapter, n)

    def average_skills(self, new_adapter: str, adapter_name: str | None = None) -> None:
        """Make an adapter with one task and one skill, the mean of an adapter's skills. It is
        frozen until `set_adapter`.

        Args:
            new_adapter: The new adapter's name.
            adapter_name: By default the active adapter.

        Raises:
            PeftValueError: There is no such adapter, or the new name can't be used.

        Source: arXiv:2211.03831, section 3.3 (MHR-μ)
        """
        with changing(self):
            extraction.average_skills(PolyAdapter.of(self, adapter_name), new_adapter)

    def extract_tasks(
        self, new_adapter: str, tasks: Tasks | Shares, adapter_name: str | None = None
    ) -> None:
        """Make a smaller adapter of some tasks, which compute the same there. It is frozen until
        `set_adapter`.

        Args:
            new_adapter: The new adapter's name.
            tasks: Ids or names: the new adapter has these tasks in this order, and all skills. A
                dictionary of shares: it has one task and one skill, which mixes the skills by the
                sum of the tasks' weights, each times its share; `{task: 1.0}` is one task as it
                was.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError: A task is neither an integer nor a name.
            PeftValueError: A task is unknown or comes twice, or none is given, a share is not a
                finite number, or the new name can't be used; nothing is changed.
        """
        with changing(self):
            adapter = PolyAdapter.with_tasks(self, adapter_name)
            extraction.extract_tasks(adapter, new_adapter, tasks)

    def train_only(
        self,
        *,
        skills: bool = False,
        tasks: Tasks | None = None,
        companions: bool = False,
        adapter_name: str | None = None,
    ) -> None:
        """Train an adapter's skills, the routing of some tasks, or both; freeze everything else.

        The rows of the tasks become parameters of their own, in the memory of the router's table:
        rows of other tasks get no gradient, no weight decay and no optimizer state. Make the
        optimizer afterwards. `set_adapter` trains everything again. Warns if no parameter of the
        model trains any more.

        Args:
            skills: Train the skills.
            tasks: Tasks whose routing and task-specific skills train: ids or names, or "all",
                which also trains routing by input. A task named "all" is passed as `["all"]`.
            companions: Train modules and embedding rows that the adapter has beside its layers.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError, PeftValueError: A value is not allowed or a task is unknown; nothing is
                changed.
            PeftRuntimeError: The model is sharded already.

        Example:
            >>> from peft import PolyConfig, get_peft_model
            >>> config = PolyConfig(
            ...     r=2, n_tasks=2, n_skills=2, task_names=["sum", "max"], target_modules=["0"])
            >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), config)
            >>> model.add_tasks(["sort"])
            >>> model.train_only(tasks=["sort"])
            >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
            [('base_model.model.0.poly_router.default.rows.0', (1, 2))]

        Source: arXiv:2211.03831, section 3.3
        """
        with PolyAdapter.to_change(self, adapter_name, needs_tasks=False) as adapter:
            fewshot.train_only(adapter, skills=skills, tasks=tasks, companions=companions)

    def begin_regime(
        self,
        regime: str,
        tasks: Tasks | None = None,
        adapter_name: str | None = None,
        new_adapter: str | None = None,
    ) -> Regime:
        """Prepare an adapter to adapt to new tasks in a regime of the multi-head routing paper.
        `REGIMES` describes them.

        Args:
            regime: "Z", "full", "mu-Z", "mu", "random" or "shared"; "μ" may stand for "mu".
            tasks: The new tasks, by id or name, which the adapter has already (`add_tasks`). "mu"
                and "shared" make an adapter of one task and take none.
            adapter_name: By default the active adapter.
            new_adapter: Name of the adapter that "mu", "random" and "shared" make and activate,
                by default the old name with the regime's. The old adapter stays as it is.

        Returns:
            The regime, with the paper's learning rates.

        Raises:
            PeftValueError: The regime or a task is unknown, or an argument is missing or does not
                fit the regime.
            PeftRuntimeError: The model is sharded already.

        Source: arXiv:2211.03831, section 3.3 and 4
        """
        with PolyAdapter.to_change(self, adapter_name) as adapter:
            return regimes.begin_regime(adapter, regime, tasks, new_adapter)

    def fit_task(
        self,
        task: Task,
        loss: Loss,
        steps: int = 40,
        lr: float = 0.1,
        init: str | None = None,
        adapter_name: str | None = None,
    ) -> TaskFit:
        """Fit a task's routing to a few examples, in place.

        The model runs in evaluation mode (gates are not sampled, dropout is off) while Adam trains
        the task's rows only. The rows with the least loss are kept. Afterwards training mode and
        trainable parameters are as before.

        Args:
            task: Id or name of a task that the adapter has; see `add_tasks`.
            loss: A function without arguments that returns the loss of the model on the examples
                and passes `task_ids` itself; or batches, keyword arguments for a model whose
                output has a `loss`, which get `task_ids` here.
            steps: Number of steps, each with one batch or one call of the function. 0 only
                initializes and measures the loss.
            lr: Learning rate, by default the paper's for the router.
            init: None: start from the task's present weights. "best": from those of the task with
                the least loss on the examples, at one forward for each other task and batch, or
                from equal weights if no other has a finite loss. "equal": from equal weights.
            adapter_name: By default the active adapter.

        Returns:
            The losses and the time taken.

        Raises:
            PeftTypeError: `loss` is neither a function nor batches, or does not return a tensor
                of one number.
            PeftValueError: The task is unknown, a value is not allowed, adapters are merged, or
                the loss does not depend on the task's routing, runs only other tasks, or is not
                finite; nothing is changed.
            PeftRuntimeError: The model is sharded already.

        Source: arXiv:2211.03831, section 3.3 (MHR-z)
        """
        with PolyAdapter.to_change(self, adapter_name) as adapter:
            return fewshot.fit_task(adapter, task, loss, steps, lr, init)
