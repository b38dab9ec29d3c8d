# SPDX-License-Identifier: Apache-2.0
"""New tasks from few examples: train parts of a Poly adapter, or fit only a task's routing.

`PolyModel` has a method for each function, which documents the arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...base.errors import PeftTypeError, PeftValueError
from ...base.progress import track
from ...base.tables import table
from ...core.fitting import FewShotLoss, Loss, Subject, checked_options, descend, evaluating
from ...core.routing.task_ids import one_task, task_label
from .adapter import PolyAdapter, Task, Tasks
from .router import InputRouter, TaskRouter

if TYPE_CHECKING:
    from .config import PolyConfig


@dataclass
class TaskFit:
    """Result of fitting a task's routing. Print it for a summary.

    Attributes:
        task: The task's id.
        losses: The loss before each step, and last the one after all steps.
        seconds: Time it took.
        start: The task whose routing it started from; None if it started from its own or from
            equal weights.
    """

    task: int
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    start: int | None = None

    def __repr__(self) -> str:
        if not self.losses:
            return f"TaskFit(task={self.task}, no steps)"
        return (
            f"TaskFit(task={self.task}, {len(self.losses) - 1} steps, loss {self.losses[0]:.4g} to "
            f"{min(self.losses):.4g}, {self.seconds:.2f} s)"
        )

    def __str__(self) -> str:
        """Return the losses at some steps, and where the fit started."""
        last = len(self.losses) - 1
        steps = sorted({round(last * part / 8) for part in range(9)}) if self.losses else []
        rows = [("step", "loss"), *((str(step), f"{self.losses[step]:.4g}") for step in steps)]
        start = "" if self.start is None else f", started from task {self.start}"
        return f"{table(rows, right=[0, 1])}\ntask {self.task}, {self.seconds:.2f} s{start}"


def train_only(
    adapter: PolyAdapter,
    *,
    skills: bool = False,
    tasks: Tasks | None = None,
    companions: bool = False,
) -> None:
    """Train an adapter's skills, the routing of some tasks, or both; freeze everything else."""
    name = adapter.name
    trains_all = adapter.is_keyword(tasks, ("all",), "tasks")
    for option, value in (("skills", skills), ("companions", companions)):
        if not isinstance(value, bool):
            raise PeftTypeError(f"`{option}`={value!r} must be True or False.")
    numbers: list[int] = []
    if tasks is not None and not trains_all:
        adapter.check_has_tasks()
        numbers = adapter.task_numbers(tasks)
    tables = [table for table in adapter.task_tables() if not table.fixed]
    if numbers:
        for table in tables:
            table.check_can_open()
    for other in adapter.tuner.peft_config:
        adapter.tuner.set_requires_grad(other, False)
    for wrapper in adapter.tuner.auxiliary_wrappers():
        wrapper.set_requires_grad(name, companions)
    for layer in adapter.layers.values():
        for parameters in (layer.poly_lora_A, layer.poly_lora_B):
            parameters[name].requires_grad_(skills)
        if trains_all and isinstance(layer.poly_router[name], InputRouter):
            layer.poly_router[name].requires_grad_(True)
    for table in tables:
        if trains_all:
            table.requires_grad_(True)
        elif numbers:
            table.open_rows(numbers)
    adapter.warn_if_frozen()


def fit_task(
    adapter: PolyAdapter,
    task: Task,
    loss: Loss,
    steps: int = 40,
    lr: float = 0.1,
    init: str | None = None,
) -> TaskFit:
    """Fit a task's routing to a few examples with Adam; keep the rows that gave the least loss."""
    begin, number = perf_counter(), one_task(task, adapter.config, "task")
    _check_can_fit(adapter)
    steps, lr = checked_options(steps, lr, init, ("best", "equal"))
    subject = Subject(
        f"task {number}",
        f"the routing of task {number}",
        f"have it run the model with `task_ids={number}`",
    )
    # A task given by name is passed by name: with several active adapters it must be the same task
    # in each.
    checked = FewShotLoss(loss, lambda batch: adapter.tuner(**{**batch, "task_ids": task}), subject)
    fit = TaskFit(number)
    routers = list(dict.fromkeys(adapter.task_routers().values()))
    routing = next(iter(adapter.layers.values())).routing
    with _rows_training(adapter, routers, number), routing.recording() as used, torch.enable_grad():
        if init is not None:
            fit.start = _initialize_rows(routers, number, init, checked)
        rows = [row for router in routers for row in router.rows]
        fit.losses = descend(checked, rows, steps, lr)
        if used and not any((ids == number).any() for ids in used):
            raise PeftValueError(_other_tasks(adapter.config, number, used))
    fit.seconds = perf_counter() - begin
    return fit


def _check_can_fit(adapter: PolyAdapter) -> None:
    """Check that the model runs with an adapter whose routing can train."""
    merged, active = adapter.tuner.merged_adapters, adapter.tuner.active_adapters
    if merged:
        raise PeftValueError(
            f"Adapters {merged} are merged into the weights; call `unmerge_adapter` before a task "
            "is fitted."
        )
    if adapter.name not in active:
        raise PeftValueError(
            f"Adapter {adapter.name} must be active to be fitted; the active ones are {active}. "
            f"Call `set_adapter({adapter.name!r})` first."
        )
    for router in adapter.task_routers().values():
        router.check_can_open()


def _other_tasks(config: PolyConfig, task: int, used: Sequence[Tensor]) -> str:
    """Return the message for a loss that ran the model with other tasks only."""
    others = sorted({other for ids in used for other in ids.tolist()})
    return (
        f"`loss` never ran the model with task {task_label(task, config)}, but with "
        f"{', '.join(task_label(other, config) for other in others)}: have it call the model "
        f"with `task_ids={task}`."
    )


@contextmanager
def _rows_training(
    adapter: PolyAdapter, routers: Sequence[TaskRouter], task: int
) -> Iterator[None]:
    """Context in which one task's rows train, in evaluation mode; an error restores the rows."""
    opened = [(router, router.rows, router.runs) for router in routers]
    values = [(router, router.module_logits[task].detach().clone()) for router in routers]
    with evaluating(adapter.tuner):
        for router in routers:
            router.open_rows([task])
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for router, row in values:
                    router.module_logits[task] = row
            raise
        finally:
            for router, rows, runs in opened:
                router.rows, router.runs = rows, runs


@torch.no_grad()
def _initialize_rows(
    routers: Sequence[TaskRouter], task: int, init: str, loss: FewShotLoss
) -> int | None:
    """Set a task's rows to those of the task with the least loss ("best"), which is returned, or to
    equal weights.
    """
    best: int | None = None
    if init == "best":
        least = float("inf")
        for other in track(range(routers[0].n_tasks), "Trying tasks' routing", unit="task"):
            if other == task:
                continue
            for router in routers:
                router.module_logits[task] = router.module_logits[other]
            value = loss.of_all()
            if isfinite(value) and value < least:
                least, best = value, other
    for router in routers:
        router.module_logits[task] = 0 if best is None else router.module_logits[best]
    return best
