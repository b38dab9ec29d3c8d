# SPDX-License-Identifier: Apache-2.0
"""Monitoring of the routing in training: in a loop of your own, or in transformers' `Trainer`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from ....base.errors import PeftValueError, PeftWarning
from ....base.plain_values import plain
from ....base.validation import is_int, number
from ....integrations.distributed import unwrap_model
from ..router import TaskRouter
from .report import LayerMeasures, layer_measures, mean_measures, poly_adapter, task_routers

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RoutingWatch:
    """Measures of the routing by task during training, with warnings of unused skills and of
    routing that does not move.

    The measures are the means over the layers of `entropy`, `usage_entropy`, `discreteness`,
    `sparsity` and `spread`; and `least_used` and `most_used`, the smallest and largest share of use
    of any skill.

    Args:
        adapter_name: The adapter; by default, at each look, "default", else the only active one.
        dead_below: A skill is dead if its share of use is below this fraction of the equal share.
        collapsed_above: A layer has collapsed if one skill's share of use is above this.
        start: First step at which to warn of skills; routers begin with equal weights and change
            slowly.
        flat_below: Routing has not moved if the `spread` of every layer is below this.
        flat_after: First step at which to warn of routing that trains but has not moved.

    Attributes:
        history: The measures of each look with its `step`, and those of each layer as `layers`.

    Raises:
        PeftValueError: A value is not allowed.

    Example:
        >>> from peft import PolyConfig, get_peft_model
        >>> config = PolyConfig(n_tasks=2, n_skills=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), config)
        >>> watch = RoutingWatch()
        >>> round(watch.look(model, step=10)["entropy"], 3)
        1.0
    """

    def __init__(
        self,
        adapter_name: str | None = None,
        dead_below: float = 0.05,
        collapsed_above: float = 0.95,
        start: int = 0,
        flat_below: float = 0.1,
        flat_after: int = 100,
    ) -> None:
        fractions = {"dead_below": dead_below, "collapsed_above": collapsed_above}
        for name, value in {**fractions, "flat_below": flat_below}.items():
            for problem in number(name, plain(value)):
                raise PeftValueError(problem)
        if not (
            0 <= dead_below < 1
            and 0 < collapsed_above <= 1
            and flat_below >= 0
            and is_int(start)
            and is_int(flat_after)
        ):
            raise PeftValueError(
                f"`dead_below`={dead_below!r} must be at least 0 and below 1, "
                f"`collapsed_above`={collapsed_above!r} above 0 and at most 1, "
                f"`flat_below`={flat_below!r} at least 0, and `start`={start!r} and "
                f"`flat_after`={flat_after!r} integers."
            )
        self.adapter_name = adapter_name
        self.dead_below, self.collapsed_above, self.start = dead_below, collapsed_above, start
        self.flat_below, self.flat_after = flat_below, flat_after
        self.history: list[dict[str, float | dict[str, LayerMeasures]]] = []
        self._warned: set[tuple[str, str]] = set()

    def look(self, model: nn.Module, step: int) -> dict[str, float]:
        """Measure the routing, add the measures to `history`, and warn.

        Args:
            model: A model with the adapter, also inside DDP.
            step: The step of training.

        Returns:
            The measures, without those of single layers.

        Raises:
            PeftValueError: No such adapter routes by task, or the choice is ambiguous.
        """
        model = unwrap_model(model)
        routers = task_routers(model, poly_adapter(model, self.adapter_name))
        layers = layer_measures(routers)
        shares = [share for layer in layers.values() for share in layer["usage"]]
        values = mean_measures(layers)
        values |= {"least_used": min(shares), "most_used": max(shares)}
        self.history.append({"step": step, **values, "layers": layers})
        if step >= self.start:
            for path, layer in layers.items():
                self._check_usage(path, layer["usage"])
        largest = max(layer["spread"] for layer in layers.values())
        if step >= self.flat_after and largest < self.flat_below and _train(routers.values()):
            self._warn(
                "",
                "flat",
                f"After {step} steps all tasks still mix their skills alike: the routing has "
                "hardly moved. The paper's learning rate for it is a hundred times that of the "
                "skills; give it one of its own with `peft.optimizers.create_optimizer(model)`, or "
                "in a Trainer with `optimizer_cls_and_kwargs=peft.optimizers.trainer_optimizer()`.",
            )
        return values

    def _check_usage(self, path: str, usage: list[float]) -> None:
        """Warn of a layer with unused skills, or with one skill that has all the use."""
        dead = [skill for skill, share in enumerate(usage) if share < self.dead_below / len(usage)]
        most = max(usage)
        if len(usage) > 1 and most > self.collapsed_above:
            fault, kind = f"skill {usage.index(most)} has {most:.0%} of the use: ", "collapsed"
            fault += "the layer has collapsed to it"
        elif dead:
            fault, kind = f"skills {dead} are hardly used by any task", "dead"
        else:
            return
        remedy = "a term `routing_loss(balance=…)` keeps skills in use."
        self._warn(path, kind, f"`{path}`: {fault}; {remedy}")

    def _warn(self, path: str, kind: str, message: str) -> None:
        """Warn once for each layer and kind of fault."""
        if (path, kind) not in self._warned:
            self._warned.add((path, kind))
            warnings.warn(message, PeftWarning, stacklevel=3 if kind == "flat" else 4)


def _train(routers: Iterable[TaskRouter]) -> bool:
    """Return whether any table of several tasks and skills trains in full."""
    return any(
        router.module_logits.requires_grad and min(router.n_tasks, router.n_skills) > 1
        for router in routers
    )


def routing_callback(watch: RoutingWatch | None = None) -> TrainerCallback:
    """Return a callback for transformers' `Trainer` that logs the measures of a `RoutingWatch`, as
    `routing/entropy` and so on, whenever the trainer logs.

    Callbacks run in order. For TensorBoard or Weights & Biases to get the measures too, insert this
    one before theirs: `trainer.callback_handler.callbacks.insert(0, routing_callback())`.

    Args:
        watch: By default a new one; the callback has it as `watch`.
    """
    from transformers import TrainerCallback

    class RoutingCallback(TrainerCallback):
        def __init__(self) -> None:
            self.watch = watch or RoutingWatch()

        def on_log(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            model: nn.Module | None = None,
            logs: dict[str, float] | None = None,
            **kwargs: object,
        ) -> None:
            if model is None:
                return
            values = self.watch.look(model, state.global_step)
            measures = {f"routing/{key}": round(value, 6) for key, value in values.items()}
            if logs is not None:
                logs.update(measures)
            for entry in state.log_history[-1:]:  # the trainer keeps a copy of what it logs
                entry.update(measures)

    return RoutingCallback()
