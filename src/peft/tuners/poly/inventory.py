# SPDX-License-Identifier: Apache-2.0
"""The tasks and skills of Poly adapters on a model: adding, removing, reordering, and the weights
between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import (
    PeftNotSupportedError,
    PeftRuntimeError,
    PeftTypeError,
    PeftValueError,
    warn,
)
from ...base.plain_values import plain
from ...base.suggestions import did_you_mean
from ...base.tensors import ordinary_tensors
from ...config import is_int
from ...core.tuner import BaseTuner
from ...integrations.distributed import is_managed
from .layer import PolyLayer
from .mixing import grow_skills
from .router import TaskRouter
from .task_ids import name_offences, names_shown, one_task, some_tasks

# Starts of a new task's routing that are no task's.
_STARTS = ("mean", "uniform")


class InventoryTuner(BaseTuner):
    """A tuner whose adapters have tasks and skills."""

    def get_router_weights(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """How each layer mixes its skills for each task in evaluation.

        Args:
            adapter_name: By default the active adapter.

        Returns:
            `[n_tasks, n_splits, n_skills]` by module path; sums to one over the skills. Layers that
            route by input are left out.

        Raises:
            PeftValueError: There is no such adapter.
            PeftNotSupportedError: It routes by input.
        """
        return {
            path: router.task_weights().detach()
            for path, router in self.task_routers(self.task_routed(adapter_name)).items()
        }

    def one_adapter(self, adapter_name: str | None) -> str:
        """The name of an adapter that there is, by default the active one."""
        if adapter_name is None:
            if len(self.active_adapters) != 1:
                raise PeftValueError(
                    f"Name one adapter: the active ones are {self.active_adapters}."
                )
            adapter_name = self.active_adapters[0]
        self.check_names(adapter_name)
        return adapter_name

    def task_routed(self, adapter_name: str | None) -> str:
        """The name of an adapter that routes by task, by default the active one."""
        adapter_name = self.one_adapter(adapter_name)
        config: Any = self.peft_config[adapter_name]
        if not config.routes_by_task:
            raise PeftNotSupportedError(f"Adapter {adapter_name} routes by input; it has no tasks.")
        return adapter_name

    def task_routers(self, adapter_name: str) -> dict[str, TaskRouter]:
        """The routers of an adapter that route by task, by module path; one that layers share comes
        with each of them.
        """
        routers = {
            path: layer.router(adapter_name) for path, layer in self.poly_layers(adapter_name)
        }
        return {path: router for path, router in routers.items() if isinstance(router, TaskRouter)}

    def poly_layers(self, adapter_name: str) -> Iterator[tuple[str, PolyLayer]]:
        """The layers that have an adapter, by module path."""
        for path, layer in self.named_tuner_layers():
            if isinstance(layer, PolyLayer) and adapter_name in layer.scaling:
                yield path, layer

    def task_numbers(self, adapter_name: str, tasks: Any, argument: str = "tasks") -> list[int]:
        """Return the ids of tasks given by id or name, one or several; messages use the argument's
        name.

        Raises:
            PeftTypeError: A task is neither a number nor a name.
            PeftValueError: There is no such task, or none is named.
        """
        return some_tasks(tasks, self.peft_config[adapter_name], argument)

    def is_word(self, value: Any, words: Sequence[str], adapter_name: str, argument: str) -> bool:
        """Tell if a value is one of the words that an argument knows beside tasks. A word goes
        before a task that is called so, of which we warn; the task is meant by a list with its
        name, or by its id.
        """
        if not isinstance(value, str) or value not in words:
            return False
        if value in (getattr(self.peft_config[adapter_name], "task_names", None) or ()):
            warn(
                f"`{argument}`={value!r} is not the task of that name: pass [{value!r}] for the "
                "task."
            )
        return True

    def check_unsharded(self, adapter_name: str, what: str) -> None:
        """Check that no engine holds the memory of an adapter's tables and skills: it would not see
        what takes their place.

        Raises:
            PeftRuntimeError: One does; the message says what to do before.
        """
        for path, layer in self.poly_layers(adapter_name):
            tables = (table.closed_table for table in layer.task_tables(adapter_name))
            if any(
                is_managed(p)
                for p in (layer.poly_lora_A[adapter_name], layer.poly_lora_B[adapter_name], *tables)
            ):
                raise PeftRuntimeError(
                    f"`{path}`: an engine has sharded adapter {adapter_name}; {what} before that."
                )

    def warn_if_frozen(self, adapter_name: str) -> None:
        """Warn if no parameter of the model trains."""
        if not any(p.requires_grad for p in self.parameters()):
            warn(
                f"No parameter of the model trains now. Say what of adapter {adapter_name} does "
                "with `train_only` (its `skills`, "
                "or the routing of `tasks`), or train all of it with `set_adapter`."
            )

    @ordinary_tensors()
    def add_tasks(
        self, tasks: int | Sequence[str], init: Any = "mean", adapter_name: str | None = None
    ) -> None:
        """Append tasks to an adapter. What existing tasks compute does not change by a bit.

        The router's parameters are replaced: make the optimiser afterwards.

        Args:
            tasks: How many, or their names (if the adapter has names, or has none yet and all get
                one).
            init: "mean": start from the mean of all tasks' gates. "uniform": from equal weights. A
                task's id or name: from that task. Where tasks have skills of their own, only the last gives a new one that has an effect. A task that
                is called "mean" or "uniform" is meant by `["mean"]` or `["uniform"]`.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError: `tasks` is neither a number nor names.
            PeftValueError: Nothing to add, names that are taken or missing, or an unknown `init`.
            PeftRuntimeError: The model is sharded already.
        """
        name = self.task_routed(adapter_name)
        config: Any = self.peft_config[name]
        extra, names = _new_tasks(config, tasks)
        source = None if self.is_word(init, _STARTS, name, "init") else _source(config, init)
        old = list(range(config.n_tasks))

        def grown(logits: Tensor) -> Tensor:
            mean = logits.double().sigmoid().mean(0).clamp(1e-30, 1 - 1e-15).logit().to(logits)
            row = (
                logits[source]
                if source is not None
                else mean
                if init == "mean"
                else torch.zeros_like(logits[0])
            )
            return torch.cat([logits, row.expand(extra, -1)])

        self._replace_tasks(name, grown, [*old, *[None] * extra], names, source)

    @ordinary_tensors()
    def remove_tasks(
        self, tasks: int | str | Sequence[int | str], adapter_name: str | None = None
    ) -> None:
        """Take tasks out of an adapter. Those that stay move up; what they compute does not change
        by a bit.

        The router's parameters are replaced: make the optimiser afterwards. Warns where the only
        ones go that train.

        Args:
            tasks: Ids or names.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError: A task is neither a number nor a name.
            PeftValueError: A task is unknown, or none is named or would be left; nothing is
                changed.
            PeftRuntimeError: The model is sharded already.

        Example:
            >>> from peft import PolyConfig, get_peft_model
            >>> config = PolyConfig(n_tasks=3, task_names=["sum", "max", "sort"], target_modules=["0"])
            >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), config)
            >>> model.remove_tasks("max")
            >>> config.task_names
            ['sum', 'sort']
        """
        name = self.task_routed(adapter_name)
        gone = set(self.task_numbers(name, tasks))
        stay = [task for task in range(self.peft_config[name].n_tasks) if task not in gone]  # type: ignore[attr-defined]
        if not stay:
            raise PeftValueError(
                "An adapter needs a task; to remove all of them use `delete_adapter`."
            )
        self._select_tasks(name, stay)

    @ordinary_tensors()
    def reorder_tasks(self, order: Sequence[int | str], adapter_name: str | None = None) -> None:
        """Give the tasks other ids. What each computes does not change by a bit.

        The router's parameters are replaced: make the optimiser afterwards.

        Args:
            order: All tasks by present id or name, in the order that they shall have.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError: A task is neither a number nor a name.
            PeftValueError: It is not an order of all tasks; nothing is changed.
            PeftRuntimeError: The model is sharded already.
        """
        name = self.task_routed(adapter_name)
        numbers, n_tasks = self.task_numbers(name, order, "order"), self.peft_config[name].n_tasks  # type: ignore[attr-defined]
        if sorted(numbers) != list(range(n_tasks)):
            raise PeftValueError(
                f"`order`={list(order)} must have each of the adapter's {n_tasks} tasks once."
            )
        self._select_tasks(name, numbers)

    def _select_tasks(self, name: str, chosen: list[int]) -> None:
        """Keep some tasks, in an order."""
        if name in self.merged_adapters:
            raise PeftValueError(
                f"Adapter {name} is merged for one of its tasks; call `unmerge_adapter` before "
                "changing their ids."
            )
        names = self.peft_config[name].task_names  # type: ignore[attr-defined]
        trained = any(p.requires_grad for p in self.parameters())
        self._replace_tasks(
            name, lambda logits: logits[chosen], chosen, names and [names[task] for task in chosen]
        )
        if trained:
            self.warn_if_frozen(name)

    def _replace_tasks(
        self,
        name: str,
        change: Any,
        origin: Sequence[int | None],
        names: list[str] | None,
        source: int | None = None,
    ) -> None:
        """Put other tables of tasks in place: of logits those that `change` makes, of tasks' own
        skills the present ones, and for new tasks that of `source`; `origin` says which task each
        row was.
        """
        self.check_unsharded(name, "change its tasks")
        config: Any = self.peft_config[name]
        for router in dict.fromkeys(self.task_routers(name).values()):
            router.replace(change(router.module_logits), origin)
        for _, layer in self.poly_layers(name):
            layer.n_tasks[name] = len(origin)
            if name in layer.poly_task_skills:
                layer.poly_task_skills[name].select(origin, source)  # type: ignore[operator]
        config.n_tasks, config.task_names = len(origin), names

    @torch.no_grad()
    def set_router_weights(
        self, weights: Tensor | Mapping[str, Any] | Sequence[Any], adapter_name: str | None = None
    ) -> None:
        """Say how each task mixes the skills: what `get_router_weights` tells then. With
        `routing="fixed"` it stays so; learned routing starts from there.

        Args:
            weights: `[n_tasks, n_skills]`, the same for every split, or
                `[n_tasks, n_splits, n_skills]`; not negative, and not all zero in a row. Rows are divided by their sums; where gates are 0 or 1 (`straight_through`), skills with a weight
                share it equally. A dictionary has such a table for each module path, or for some.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError: A table is not one of real numbers; nothing is changed.
            PeftValueError: A path is unknown, or a table has another shape or values that are not
                allowed; nothing is changed.

        Example:
            >>> from peft import PolyConfig, get_peft_model
            >>> config = PolyConfig(n_tasks=2, n_skills=2, routing="fixed", target_modules=["0"])
            >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), config)
            >>> model.set_router_weights([[1.0, 0.0], [0.25, 0.75]])
            >>> model.get_router_weights()["0"].squeeze(1).round(decimals=4)
            tensor([[1.0000, 0.0000],
                    [0.2500, 0.7500]])
        """
        routers = self.task_routers(self.task_routed(adapter_name))
        tables = weights if isinstance(weights, Mapping) else dict.fromkeys(routers, weights)
        if unknown := sorted(set(tables) - set(routers)):
            raise PeftValueError(
                f"{unknown} are no paths of layers that route by task; those are "
                f"{names_shown(list(routers))}."
                f"{did_you_mean(str(unknown[0]), routers)}"
            )
        logits = {path: _logits_of(table, routers[path], path) for path, table in tables.items()}
        for path, values in logits.items():
            routers[path].module_logits.copy_(values)

    @ordinary_tensors()
    def add_skills(self, n: int, adapter_name: str | None = None) -> None:
        """Add skills to every layer's inventory. What tasks compute in evaluation changes by
        rounding only.

        The most used skills are cloned, and each task shares its weight out between original and
        clone at random, so that gradients reach both and tell them apart. Parameters are replaced:
        make the optimiser afterwards.

        Args:
            n: How many.
            adapter_name: By default the active adapter.

        Raises:
            PeftValueError: `n` is below 1, or there is no such adapter.
            PeftRuntimeError: The model is sharded already.
            PeftNotSupportedError: Weights of tasks can't be shared out: gates are 0 or 1, some are
                always on or cut off, or layers share a router or route by input.
        """
        name = self.task_routed(adapter_name)
        config: Any = self.peft_config[name]
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise PeftValueError(f"`n`={n!r} must be an integer of at least 1.")
        plain = {
            "straight_through": False,
            "n_shared_skills": 0,
            "eval_top_k": None,
            "router_granularity": "linear",
        }
        other = [field for field, value in plain.items() if getattr(config, field) != value]
        if other or config.routes_by_input:
            cause = f"`{other[0]}`={getattr(config, other[0])!r}" if other else "routing by input"
            raise PeftNotSupportedError(
                f"Skills can't be added to adapter {name} without a change of what it computes: "
                f"{cause}."
            )
        self.check_unsharded(name, "add skills")
        for _, layer in self.poly_layers(name):
            router = layer.router(name)
            router.close_rows()
            old = router.module_logits, layer.poly_lora_A[name], layer.poly_lora_B[name]
            logits, A, B = (
                nn.Parameter(new, requires_grad=o.requires_grad)
                for new, o in zip(grow_skills(*old, n), old, strict=True)
            )
            layer.poly_lora_A[name], layer.poly_lora_B[name] = A, B
            router.module_logits = logits
            router.n_skills += n
            layer.n_skills[name] += n
        config.n_skills += n
        config.n_skills_pattern = {key: count + n for key, count in config.n_skills_pattern.items()}


def _new_tasks(config: Any, tasks: Any) -> tuple[int, list[str] | None]:
    """How many tasks to add, and the names of all tasks then."""
    tasks = plain(tasks)
    if is_int(tasks):
        if tasks < 1:
            raise PeftValueError(f"`tasks`={tasks} must be at least 1.")
        if config.task_names is not None:
            raise PeftValueError(
                f"The adapter's tasks have names; pass {tasks} names in place of their number."
            )
        return tasks, None
    new: list[Any] = (
        list(tasks)
        if isinstance(tasks, Iterable) and not isinstance(tasks, (str, bytes))
        else [None]
    )
    if not all(isinstance(task, str) for task in new):
        meant = f" Did you mean [{tasks!r}]?" if isinstance(tasks, str) else ""
        raise PeftTypeError(f"`tasks`={tasks!r} must be a number or a list of names.{meant}")
    old = config.task_names or [str(i) for i in range(config.n_tasks)]
    if offence := next(chain(() if new else ["it names none"], name_offences([*old, *new])), None):
        raise PeftValueError(
            f"`tasks`={new} must be new, different names; {offence}. The adapter has "
            f"{names_shown(old)}."
        )
    return len(new), [*old, *new]


def _source(config: Any, init: Any) -> int:
    """Return the task that new ones start from.

    Raises:
        PeftTypeError: `init` is neither a task nor a word.
        PeftValueError: There is no such task, or several are named.
    """
    names = config.task_names or ()
    if init is None or (isinstance(init, str) and init not in names):
        near = did_you_mean(str(init), [*_STARTS, *names])
        raise PeftValueError(
            f"`init`={init!r} must be 'mean', 'uniform', or the id or name of a task; the "
            "adapter's are "
            f"{names_shown(names) if names else f'0 to {config.n_tasks - 1}'}.{near}"
        )
    return one_task(init, config, "init")


def _logits_of(weights: Any, router: TaskRouter, path: str) -> Tensor:
    """The logits, `[n_tasks, n_splits·n_skills]`, whose mixing weights a table has."""
    logits = router.module_logits
    n_tasks, shape = logits.shape[0], (logits.shape[0], router.n_splits, router.n_skills)
    try:
        is_complex = torch.as_tensor(weights).is_complex()
        w = torch.as_tensor(weights, dtype=None if is_complex else torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise PeftTypeError(
            f"`{path}`: weights must be a table of numbers, not {type(weights).__name__}: {error}."
        ) from None
    if is_complex:
        raise PeftTypeError(f"`{path}`: weights must be real numbers, not {w.dtype}.")
    if w.shape == (n_tasks, router.n_skills):
        w = w.unsqueeze(1).expand(shape)
    if w.shape != shape:
        raise PeftValueError(
            f"`{path}`: weights of shape {list(w.shape)} must be {[n_tasks, router.n_skills]} or "
            f"{list(shape)}."
        )
    if not torch.isfinite(w).all() or (w < 0).any() or (w.sum(-1) == 0).any():
        raise PeftValueError(
            f"`{path}`: weights must be finite, not negative, and not all zero for a task."
        )
    if router.how.always_on:
        raise PeftValueError(
            f"`{path}`: a task's weights can't be set where "
            f"`n_shared_skills`={router.how.always_on} are always on."
        )
    if router.how.hard:  # gates that are rounded: which skills a task has is all that can be said
        return torch.where(w > 0, 1.0, -1.0).flatten(1).to(logits)
    gates = w / (2 * w.sum(-1, keepdim=True))
    return gates.clamp(min=torch.finfo(torch.float32).tiny).logit().flatten(1).to(logits)
