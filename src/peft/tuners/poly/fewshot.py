# SPDX-License-Identifier: Apache-2.0
"""New tasks from few examples: train parts of a Poly adapter, or fit only a task's routing.

`PolyModel` has a method for each function, which documents the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from math import isfinite
from time import perf_counter
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from ...base.errors import PeftTypeError, PeftValueError
from ...base.plain_values import plain
from ...base.progress import remark, track
from ...base.validation import at_least, choice
from ...base.validation import number as finite_number
from .adapter import PolyAdapter, Task, Tasks
from .router import InputRouter, TaskRouter
from .task_ids import one_task, task_label

if TYPE_CHECKING:
    from .config import PolyConfig

# A function that returns the loss, or batches for a model whose output has a `loss`.
Loss: TypeAlias = Callable[[], Tensor] | Iterable[Mapping[str, object]]


@dataclass
class TaskFit:
    """Result of fitting a task's routing.

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


def train_only(
    adapter: PolyAdapter,
    *,
    skills: bool = False,
    tasks: Tasks | None = None,
    companions: bool = False,
) -> None:
    """Train an adapter's skills, the routing of some tasks, or both; freeze everything else."""
    name = adapter.name
    every = adapter.is_keyword(tasks, ("all",), "tasks")
    for option, value in (("skills", skills), ("companions", companions)):
        if not isinstance(value, bool):
            raise PeftTypeError(f"`{option}`={value!r} must be True or False.")
    numbers: list[int] = []
    if tasks is not None and not every:
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
        if every and isinstance(layer.poly_router[name], InputRouter):
            layer.poly_router[name].requires_grad_(True)
    for table in tables:
        if every:
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
    steps, lr = _checked_options(steps, lr, init)
    next_loss, batches = _loss_function(adapter, loss, task)
    fit = TaskFit(number)
    routers = list(dict.fromkeys(adapter.task_routers().values()))
    routing = next(iter(adapter.layers.values())).routing
    with _rows_training(adapter, routers, number), routing.recording() as used, torch.enable_grad():
        if init is not None:
            fit.start = _initialize_rows(routers, number, init, next_loss, batches)
        rows = [row for router in routers for row in router.rows]
        _descend(fit, next_loss, rows, steps, lr, keep_last=batches > 1)
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


def _loss_function(
    adapter: PolyAdapter, loss: Loss, task: Task
) -> tuple[Callable[[], Tensor], int]:
    """Return a function for the loss of the next batch, and the number of batches.

    A task given by name is passed by name: with several active adapters it must be the same task
    in each.
    """
    if callable(loss):
        function = loss
        return (lambda: _one_number(function())), 1
    batches = list(loss) if isinstance(loss, Iterable) else []
    if not batches or not all(isinstance(batch, Mapping) for batch in batches):
        raise PeftTypeError(
            "`loss` must be a function without arguments, or batches: keyword arguments for "
            "the model."
        )
    turns = cycle(batches)

    def next_loss() -> Tensor:
        output = adapter.tuner(**{**next(turns), "task_ids": task})
        return _one_number(
            getattr(output, "loss", None),
            "The model's output has no `loss`; batches need `labels`.",
        )

    return next_loss, len(batches)


@contextmanager
def _rows_training(
    adapter: PolyAdapter, routers: Sequence[TaskRouter], task: int
) -> Iterator[None]:
    """Context in which one task's rows train, in evaluation mode; an error restores the rows."""
    tuner = adapter.tuner
    parameters = [(p, p.requires_grad) for p in tuner.parameters()]
    modes = [(module, module.training) for module in tuner.modules()]
    opened = [(router, router.rows, router.runs) for router in routers]
    values = [(router, router.module_logits[task].detach().clone()) for router in routers]
    tuner.eval()
    for p, _ in parameters:
        p.requires_grad_(False)
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
        for p, required in parameters:
            p.requires_grad_(required)
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _initialize_rows(
    routers: Sequence[TaskRouter],
    task: int,
    init: str,
    next_loss: Callable[[], Tensor],
    batches: int,
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
            value = sum(float(next_loss()) for _ in range(batches))
            if isfinite(value) and value < least:
                least, best = value, other
    for router in routers:
        router.module_logits[task] = 0 if best is None else router.module_logits[best]
    return best


def _one_number(value: object, remedy: str = "") -> Tensor:
    """Return a loss as a tensor `[]`, checked; `remedy` is the message if it is None."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    if value is None and remedy:
        raise PeftTypeError(remedy)
    got = f"{value!r}, a {type(value).__name__}"
    if isinstance(value, Tensor):
        got = f"a tensor of shape {list(value.shape)}"
    raise PeftTypeError(
        "`loss` must return a tensor of one number that gradients flow through; it returned "
        f"{got}. Return the loss itself, without `.item()` or `float()`."
    )


def _checked_options(steps: int, lr: float, init: str | None) -> tuple[int, float]:
    """Return the number of steps and the learning rate, checked."""
    steps, lr = plain(steps), plain(lr)
    offences = [
        *at_least("steps", steps, 0),
        *finite_number("lr", lr, positive=True),
        *choice("init", init, (None, "best", "equal")),
    ]
    if offences:
        raise PeftValueError(" ".join(offences))
    return steps, float(lr)


def _descend(
    fit: TaskFit,
    next_loss: Callable[[], Tensor],
    rows: Sequence[Tensor],
    steps: int,
    lr: float,
    keep_last: bool,
) -> None:
    """Take steps with Adam on a task's rows, add the losses to `fit`, and leave the rows at the
    least loss; with `keep_last` at the last, since losses of different batches do not compare.
    """
    optimizer = torch.optim.Adam(rows, lr=lr)
    best, kept = float("inf"), [row.detach().clone() for row in rows]
    turns = track(range(steps + 1), f"Fitting task {fit.task}", unit="step")
    for step in turns:
        value = next_loss()
        fit.losses.append(float(value.detach()))
        remark(turns, f"loss {fit.losses[-1]:.4g}")
        if not isfinite(fit.losses[-1]):
            raise _not_finite(f"`loss` is {fit.losses[-1]}", fit.task, step, lr)
        if fit.losses[-1] < best or keep_last:
            best, kept = fit.losses[-1], [row.detach().clone() for row in rows]
        if step < steps:
            for row, gradient in zip(rows, _gradients(value, rows, fit.task), strict=True):
                if gradient is not None and not gradient.isfinite().all():
                    raise _not_finite(
                        f"`loss` is {fit.losses[-1]}, but has gradients that are NaN or infinite",
                        fit.task,
                        step,
                        lr,
                    )
                row.grad = gradient
            optimizer.step()
    with torch.no_grad():
        for row, values in zip(rows, kept, strict=True):
            row.copy_(values)


def _not_finite(cause: str, task: int, step: int, lr: float) -> PeftValueError:
    """Return the error for a loss or a gradient that is not finite."""
    remedy = f"use a smaller `lr` than {lr}, or look" if step else "look"
    return PeftValueError(
        f"{cause} after {step} steps; the routing of task {task} is left as it was. To fit it, "
        f"{remedy} for what makes the loss so: "
        "values of the examples, labels that are all left out, a 16-bit dtype."
    )


def _gradients(loss: Tensor, parameters: Sequence[Tensor], task: int) -> Sequence[Tensor | None]:
    """Return the gradients of a loss, which must depend on one of the parameters."""
    gradients: Sequence[Tensor | None] = [None]
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise PeftValueError(
            f"`loss` does not depend on the routing of task {task}: have it run the model with "
            f"`task_ids={task}`, with the adapter and gradients on and nothing detached."
        )
    return gradients
