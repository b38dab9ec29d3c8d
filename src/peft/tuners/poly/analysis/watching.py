# SPDX-License-Identifier: Apache-2.0
"""Watching the routing while it is trained: in a loop of one's own, or in transformers' `Trainer`."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ....base.containers import walk
from ....base.errors import PeftValueError, PeftWarning
from ....config import is_int
from ....core.adapter_choice import adapter_of
from ....integrations.distributed import unwrap_model
from ..layer import PolyLayer
from ..router import TaskRouter
from .report import routing_report


class RoutingWatch:
    """Measure how the routing by task stands; warn of skills that fall out of use and of routing
    that does not move.

    The measures are, as means over the layers, `entropy`, `usage_entropy`, `discreteness`,
    `sparsity` and `spread`, and `least_used` and `most_used`, the smallest and largest share of use
    of any skill.

    Args:
        adapter_name: The adapter; by default, whenever it looks, the one called "default", else the
            only one that is active.
        dead_below: A skill whose share of use is below this part of the equal share is dead.
        collapsed_above: A layer has collapsed if one skill's share of use is above this.
        start: Do not warn of skills before this step: routers begin with equal weights, and find
            their way slowly.
        flat_below: Routing that trains has not moved if the `spread` of every layer, the largest
            distance of a task's weight from the tasks' mean in parts of the equal share, is below.
        flat_after: The first step at which that is worth a warning.

    Attributes:
        history: The measures of each look with its `step`, and those of each layer as `layers`.

    Raises:
        PeftValueError: A value is not allowed.

    Example:
        >>> from peft import PolyConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), PolyConfig(n_tasks=2, n_skills=2, target_modules=["0"]))
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
        if not (
            0 <= dead_below < 1
            and 0 < collapsed_above <= 1
            and flat_below >= 0
            and is_int(start)
            and is_int(flat_after)
        ):
            raise PeftValueError(
                f"`dead_below`={dead_below!r} must be at least 0 and below 1, "
                f"`collapsed_above`={collapsed_above!r} above 0 and at "
                f"most 1, `flat_below`={flat_below!r} at least 0, and `start`={start!r} and "
                f"`flat_after`={flat_after!r} integers."
            )
        self.flat_below, self.flat_after = flat_below, flat_after
        self.adapter_name, self.dead_below, self.collapsed_above, self.start = (
            adapter_name,
            dead_below,
            collapsed_above,
            start,
        )
        self.history: list[dict[str, Any]] = []
        self._warned: set[tuple[str, str]] = set()

    def look(self, model: nn.Module, step: int) -> dict[str, float]:
        """The measures as they are now, without those of the layers.

        Args:
            model: A model with the adapter; also inside DDP.
            step: Which step it is.

        Raises:
            PeftValueError: There is no such adapter that routes by task, or several could be meant.
        """
        model = unwrap_model(model)
        name = adapter_of(model, self.adapter_name, PolyLayer, " of Poly")
        layers = routing_report(model, name).layers
        shares = [share for layer in layers.values() for share in layer["usage"]]
        names = ("entropy", "usage_entropy", "discreteness", "sparsity", "spread")
        values = {
            name: sum(layer[name] for layer in layers.values()) / len(layers) for name in names
        }
        values |= {"least_used": min(shares), "most_used": max(shares)}
        self.history.append({"step": step, **values, "layers": layers})
        if step >= self.start:
            for path, layer in layers.items():
                self._judge(path, layer["usage"])
        widest = max(layer["spread"] for layer in layers.values())
        if step >= self.flat_after and widest < self.flat_below and _trains(model, name):
            self._warn_flat(step)
        return values

    def _judge(self, path: str, usage: list[float]) -> None:
        """Warn of a layer, once for each kind of trouble."""
        dead = [skill for skill, share in enumerate(usage) if share < self.dead_below / len(usage)]
        if len(usage) > 1 and max(usage) > self.collapsed_above:
            text = f"skill {usage.index(max(usage))} has {max(usage):.0%} of the use: the layer has collapsed to it"
            self._warn(path, "collapsed", text)
        elif dead:
            self._warn(path, "dead", f"skills {dead} are hardly used by any task")

    def _warn_flat(self, step: int) -> None:
        if ("", "flat") not in self._warned:
            self._warned.add(("", "flat"))
            warnings.warn(
                f"After {step} steps all tasks still mix their skills alike: the routing has "
                "hardly "
                "moved. The paper's rate for it is a hundred times that of the skills; give it one "
                "of its own with `peft.optimizers.create_optimizer(model)`, or in a Trainer with "
                "`optimizer_cls_and_kwargs=peft.optimizers.trainer_optimizer()`.",
                PeftWarning,
                stacklevel=3,
            )

    def _warn(self, path: str, kind: str, text: str) -> None:
        if (path, kind) not in self._warned:
            self._warned.add((path, kind))
            warnings.warn(
                f"`{path}`: {text}; a term `routing_loss(balance=…)` keeps skills in use.",
                PeftWarning,
                stacklevel=4,
            )


def _trains(model: nn.Module, name: str) -> bool:
    """Return whether any of an adapter's tables of several tasks trains as a whole."""
    routers = (
        r.router(name) for _, r in walk(model) if isinstance(r, PolyLayer) and name in r.scaling
    )
    tables = (r for r in routers if isinstance(r, TaskRouter) and min(r.n_tasks, r.n_skills) > 1)
    return any(table.module_logits.requires_grad for table in tables)


def routing_callback(watch: RoutingWatch | None = None) -> Any:
    """A callback for transformers' `Trainer`: whenever that logs, a `RoutingWatch` looks, and its
    measures are logged too, as `routing/entropy` and so on.

    Callbacks are called in turn. To have those of TensorBoard or Weights & Biases get the measures
    too, put this one first, `trainer.callback_handler.callbacks.insert(0, routing_callback())`.

    Args:
        watch: By default a new one; the callback has it as `watch`.
    """
    from transformers import TrainerCallback

    class RoutingCallback(TrainerCallback):
        def __init__(self) -> None:
            self.watch = watch or RoutingWatch()

        def on_log(
            self,
            args: Any,
            state: Any,
            control: Any,
            model: Any = None,
            logs: Any = None,
            **kwargs: Any,
        ) -> None:
            values = self.watch.look(model, state.global_step)
            for entry in ([] if logs is None else [logs]) + state.log_history[
                -1:
            ]:  # the trainer keeps a copy of what it logs
                entry.update({f"routing/{key}": round(value, 6) for key, value in values.items()})

    return RoutingCallback()
