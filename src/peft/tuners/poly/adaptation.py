# SPDX-License-Identifier: Apache-2.0
"""New tasks from few examples: what of an adapter trains, the regimes of the papers, and a task's
routing fitted in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ...base.errors import PeftTypeError, PeftValueError
from ...base.plain_values import plain
from ...config import at_least, choice
from ...config import number as finite_number
from .deriving import DerivingTuner
from .layer import is_fixed
from .regimes import Regime, regime_named
from .router import InputRouter, TaskRouter
from .task_ids import one_task, task_label


@dataclass
class TaskFit:
    """What fitting a task's routing came to.

    Attributes:
        task: The task's id.
        losses: The loss before each step, and last after all.
        seconds: How long it took.
        start: The task whose routing it started from, None where it was not another's.
    """

    task: int
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    start: int | None = None


class AdaptingTuner(DerivingTuner):
    """A tuner whose adapters can be trained in part."""

    def train_only(
        self,
        *,
        skills: bool = False,
        tasks: Any = None,
        companions: bool = False,
        adapter_name: str | None = None,
    ) -> None:
        """Say what of an adapter trains: its skills, the routing of some tasks, or both. All else
        is frozen.

        The rows of tasks become parameters by themselves (in the memory of the table), so that an
        optimiser sees no other: those have no gradient, no weight decay and no state. Make the
        optimiser afterwards. `set_adapter` trains all again. Warns where nothing of the model
        trains then.

        Args:
            skills: Train the skills.
            tasks: Whose routing trains, and whose own skills: ids or names, "all", or None for no
                one's. Input routing trains with "all". A task that is called "all" is meant by `["all"]`.
            companions: Train modules and embedding rows that the adapter has beside its layers.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError, PeftValueError: A task is unknown; nothing is changed.
            PeftRuntimeError: The model is sharded already.

        Example:
            >>> from torch import nn
            >>> from peft import PolyConfig, get_peft_model
            >>> config = PolyConfig(r=2, n_tasks=2, n_skills=2, task_names=["sum", "max"], target_modules=["0"])
            >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), config)
            >>> model.add_tasks(["sort"])
            >>> model.train_only(tasks=["sort"])
            >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
            [('base_model.model.0.poly_router.default.rows.0', (1, 2))]

        Source: arXiv:2211.03831, section 3.3
        """
        name = self.one_adapter(adapter_name)
        every = self.is_word(tasks, ("all",), name, "tasks")
        for option, value in (("skills", skills), ("companions", companions)):
            if not isinstance(value, bool):
                raise PeftTypeError(f"`{option}`={value!r} must be True or False.")
        numbers = [] if every or tasks is None else self.task_numbers(self.task_routed(name), tasks)
        tables = [
            table
            for _, layer in self.poly_layers(name)
            for table in layer.task_tables(name)
            if not is_fixed(table)
        ]
        if numbers:
            for table in tables:
                table.check_can_open()
        for other in self.peft_config:
            self.set_requires_grad(other, False)
        for wrapper in self.auxiliary_wrappers():
            wrapper.set_requires_grad(name, companions)
        for _, layer in self.poly_layers(name):
            for holder in (layer.poly_lora_A, layer.poly_lora_B):
                holder[name].requires_grad_(skills)
            if every and isinstance(layer.poly_router[name], InputRouter):
                layer.poly_router[name].requires_grad_(True)
        for table in tables:
            if every:
                table.requires_grad_(True)
            elif numbers:
                table.open_rows(numbers)
        self.warn_if_frozen(name)

    def begin_regime(
        self,
        regime: str,
        tasks: Any = None,
        adapter_name: str | None = None,
        new_adapter: str | None = None,
    ) -> Regime:
        """Set an adapter up as a regime of the multi-head routing paper adapts it to new tasks.
        `REGIMES` describes all.

        Args:
            regime: "Z", "full", "mu-Z", "mu", "random" or "shared"; "μ" may stand for "mu".
            tasks: The new tasks, by id or name, which the adapter has already (`add_tasks`). "mu"
                and "shared" make an adapter of one task and take none.
            adapter_name: By default the active adapter.
            new_adapter: Name of the adapter that "mu", "random" and "shared" make, by default the
                old one's with the regime's. It becomes the active one; the old one stays as it is.

        Returns:
            The regime, with the paper's learning rates.

        Raises:
            PeftValueError: The regime or a task is unknown, or tasks are missing or given where
                there are none to give.
            PeftRuntimeError: The model is sharded already.

        Source: arXiv:2211.03831, section 3.3 and 4
        """
        chosen = regime_named(regime)
        name = self.task_routed(adapter_name)
        if chosen.needs_tasks != (tasks is not None):
            raise PeftValueError(
                f"Regime {chosen.name!r} takes the new tasks: pass `tasks=`, by id or name, of the "
                "adapter's "
                f"{self.peft_config[name].n_tasks}; `add_tasks` adds new ones."  # type: ignore[attr-defined]
                if chosen.needs_tasks
                else f"Regime {chosen.name!r} takes no tasks, for it makes an adapter of one: leave out `tasks`={tasks!r}."
            )
        if chosen.needs_tasks and chosen.name != "random" and new_adapter is not None:
            raise PeftValueError(
                f"Regime {chosen.name!r} makes no adapter: leave out `new_adapter`={new_adapter!r}."
            )
        numbers = None if tasks is None else self.task_numbers(name, tasks)
        if chosen.name == "mu":
            name = self._activate_new(name, new_adapter or f"{name}_mu", self.average_skills)
        elif chosen.name in ("shared", "random"):
            name = self._activate_new(
                name,
                new_adapter or f"{name}_{chosen.name}",
                self._redraw,
                shared=chosen.name == "shared",
            )
        elif chosen.name == "mu-Z":
            self.check_unsharded(name, "begin a regime")
            for router in dict.fromkeys(self.task_routers(name).values()):
                with torch.no_grad():
                    router.module_logits[numbers] = 0
        self.train_only(
            skills=chosen.skills, tasks=numbers if chosen.routing else None, adapter_name=name
        )
        if chosen.name == "mu-Z":
            self._hold_routing(name)
        return chosen

    def _hold_routing(self, name: str) -> None:
        """Take a task's weights as they are in training too."""
        for router in dict.fromkeys(self.task_routers(name).values()):
            router.fixed, router.how = True, router.how._replace(relaxed=False, dropout=0.0)
        self.peft_config[name].routing = "fixed"  # type: ignore[attr-defined]

    def _activate_new(
        self, source: str, new: str, make: Callable[..., None], **options: Any
    ) -> str:
        make(new, adapter_name=source, **options)
        self.set_adapter(new)
        return new

    def fit_task(
        self,
        task: int | str,
        loss: Callable[[], Tensor] | Iterable[Mapping[str, Any]],
        steps: int = 40,
        lr: float = 0.1,
        init: str | None = None,
        adapter_name: str | None = None,
    ) -> TaskFit:
        """Fit a task's routing to a few examples, in place; nothing else of the model is touched.
        Takes seconds.

        The model runs in evaluation mode meanwhile (gates are not drawn, dropout is off) and Adam
        steps on the task's rows. What trains, and training mode, are as before when it is done. The
        rows that gave the least loss are kept.

        Args:
            task: Id or name of a task that the adapter has; see `add_tasks`.
            loss: A function that gives the loss of the model on the examples, called with no
                arguments and passing the task itself; or batches as keyword arguments for the model, whose output has a `loss`. `task_ids` are filled in there.
            steps: How many; each goes through one batch, or calls the function once. 0 takes none:
                what `init` says, and its loss.
            lr: Learning rate, by default the paper's for the router.
            init: None: from the task's present weights. "best": from those of the task that has the
                least loss on the examples, one forward for each task; "equal": from equal weights.
            adapter_name: By default the active adapter.

        Returns:
            The losses, and how long it took.

        Raises:
            PeftTypeError: `loss` is neither a function nor batches, or returns something else than
                a tensor of one number.
            PeftValueError: The task is unknown, a value is not allowed, adapters are merged, or the
                loss does not depend on the task's routing, runs other tasks only, or is not finite; nothing is changed.
            PeftRuntimeError: The model is sharded already.

        Source: arXiv:2211.03831, section 3.3 (MHR-z)
        """
        name, begin = self.task_routed(adapter_name), perf_counter()
        number = one_task(task, self.peft_config[name], "task")
        self._check_can_fit(name)
        steps, lr = _checked_options(steps, lr, init)
        closure, batches = self._closure(loss, number)
        fit = TaskFit(number)
        routers = list(dict.fromkeys(self.task_routers(name).values()))
        with self._fitting(name, number), self.poly_routing.noting() as used, torch.enable_grad():
            if init is not None:
                fit.start = self._start_from(routers, number, init, closure, batches)
            _descend(
                fit,
                closure,
                [row for router in routers for row in router.rows],
                steps,
                lr,
                keep_last=batches > 1,
            )
            if used and not any((ids == number).any() for ids in used):
                raise PeftValueError(self._used_others(name, number, used))
        fit.seconds = perf_counter() - begin
        return fit

    def _check_can_fit(self, name: str) -> None:
        """Check that an adapter runs as one whose routing can be fitted.

        Raises:
            PeftValueError: It is not active, or adapters are merged.
        """
        if self.merged_adapters:
            raise PeftValueError(
                f"Adapters {self.merged_adapters} are merged into the weights; call "
                "`unmerge_adapter` before a task is fitted."
            )
        if name not in self.active_adapters:
            raise PeftValueError(
                f"Adapter {name} must be active to be fitted; the active ones are "
                f"{self.active_adapters}. Call "
                f"`set_adapter({name!r})` first."
            )
        for router in self.task_routers(name).values():
            router.check_can_open()

    def _used_others(self, name: str, task: int, used: Sequence[Tensor]) -> str:
        """Return the message for a loss that ran other tasks than the one to be fitted."""
        config = self.peft_config[name]
        others = sorted({other for ids in used for other in ids.tolist()})
        return (
            f"`loss` never ran the model with task {task_label(task, config)}, but with "
            f"{', '.join(task_label(other, config) for other in others)}: have it call the model "
            f"with `task_ids={task}`."
        )

    def _closure(self, loss: Any, task: int) -> tuple[Callable[[], Tensor], int]:
        """A function that gives the loss of the next batch, and after how many calls it has gone
        through all.
        """
        if callable(loss):
            return (lambda: _one_number(loss())), 1
        batches = list(loss) if isinstance(loss, Iterable) else []
        if not batches or not all(isinstance(batch, Mapping) for batch in batches):
            raise PeftTypeError(
                "`loss` must be a function without arguments, or batches: keyword arguments for "
                "the model."
            )
        turns = cycle(batches)

        def of_next() -> Tensor:
            output = self(**{**next(turns), "task_ids": task})
            return _one_number(
                getattr(output, "loss", None),
                "The model's output has no `loss`; batches need `labels`.",
            )

        return of_next, len(batches)

    @contextmanager
    def _fitting(self, name: str, task: int) -> Iterator[None]:
        """A context in which one task's rows train and the model is in evaluation mode; after an
        error they are as before.
        """
        parameters = [(p, p.requires_grad) for p in self.parameters()]
        modes = [(module, module.training) for module in self.modules()]
        routers = dict.fromkeys(self.task_routers(name).values())
        opened = [(router, router.rows, router.runs) for router in routers]
        values = [(router, router.module_logits[task].detach().clone()) for router in routers]
        self.eval()
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
    def _start_from(
        self,
        routers: Sequence[TaskRouter],
        task: int,
        init: str,
        closure: Callable[[], Tensor],
        batches: int,
    ) -> int | None:
        """Give a task's rows the values they start from; the task they are from."""
        best: int | None = None
        if init == "best":
            least = float("inf")
            for other in range(len(routers[0].module_logits)):
                if other == task:
                    continue
                for router in routers:
                    router.module_logits[task] = router.module_logits[other]
                value = sum(float(closure()) for _ in range(batches))
                if isfinite(value) and value < least:
                    least, best = value, other
        for router in routers:
            router.module_logits[task] = 0 if best is None else router.module_logits[best]
        return best


def _one_number(value: Any, remedy: str = "") -> Tensor:
    """Return a loss, which has to be a tensor of one number.

    Raises:
        PeftTypeError: It is something else.
    """
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


def _checked_options(steps: Any, lr: Any, init: Any) -> tuple[int, float]:
    """Return the number of steps and the learning rate.

    Raises:
        PeftValueError: A value is not allowed.
    """
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
    closure: Callable[[], Tensor],
    rows: Sequence[Tensor],
    steps: int,
    lr: float,
    keep_last: bool,
) -> None:
    """Take steps on a task's rows and leave them at the least loss; `keep_last` where losses, being
    of different batches, do not compare.

    Raises:
        PeftValueError: The loss is not finite, or does not depend on the rows.
    """
    optimizer = torch.optim.Adam(rows, lr=lr)
    best, kept = float("inf"), [row.detach().clone() for row in rows]
    for step in range(steps + 1):
        value = closure()
        fit.losses.append(float(value.detach()))
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


def _not_finite(what: str, task: int, step: int, lr: float) -> PeftValueError:
    remedy = f"use a smaller `lr` than {lr}, or look" if step else "look"
    return PeftValueError(
        f"{what} after {step} steps; the routing of task {task} is left as it was. To fit it, "
        f"{remedy} for what makes the loss so: "
        "values of the examples, labels that are all left out, a 16-bit dtype."
    )


def _gradients(loss: Tensor, parameters: Sequence[Tensor], task: int) -> Sequence[Tensor | None]:
    """Return the gradients of a loss.

    Raises:
        PeftValueError: It depends on none of the parameters.
    """
    gradients: Sequence[Tensor | None] = [None]
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise PeftValueError(
            f"`loss` does not depend on the routing of task {task}: have it run the model with "
            f"`task_ids={task}`, with the adapter and gradients on and nothing detached."
        )
    return gradients
