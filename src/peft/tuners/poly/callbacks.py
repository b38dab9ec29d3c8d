# SPDX-License-Identifier: Apache-2.0
"""A callback for transformers' `Trainer` that watches the routing while it is trained. Importing this file imports transformers."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback

from ...config import is_int
from ...utils.error import PeftValueError, PeftWarning
from ...utils.sharding import unparallel
from .report import routing_report


class RoutingCallback(TrainerCallback):
    """Logs how the routing by task stands, whenever the trainer logs, and warns of skills that fall out of use.

    Logged are, as means over the layers, `routing/entropy`, `routing/usage_entropy`, `routing/discreteness` and
    `routing/sparsity`, and as `routing/least_used` and `routing/most_used` the smallest and largest share of use of any skill.
    `history` keeps them with the measures of each layer. Callbacks are called in turn: to have those before this one log the
    measures too (TensorBoard, Weights & Biases), put it first, `trainer.callback_handler.callbacks.insert(0, RoutingCallback())`.

    Args:
        adapter_name: The adapter.
        dead_below: A skill whose share of use is below this part of the equal share is dead.
        collapsed_above: A layer has collapsed if one skill's share of use is above this.
        start: Do not warn before this step: routers begin with equal weights, and find their way slowly.

    Raises:
        PeftValueError: A value is not allowed.

    Example:
        >>> from peft.tuners.poly.callbacks import RoutingCallback
        >>> callback = RoutingCallback(dead_below=0.1)
        >>> callback.history
        []
    """

    def __init__(
        self, adapter_name: str = "default", dead_below: float = 0.05, collapsed_above: float = 0.95, start: int = 0
    ) -> None:
        if not (0 <= dead_below < 1 and 0 < collapsed_above <= 1 and is_int(start)):
            raise PeftValueError(
                f"`dead_below`={dead_below!r} must be at least 0 and below 1, `collapsed_above`={collapsed_above!r} above 0 and at "
                f"most 1, and `start`={start!r} an integer."
            )
        self.adapter_name, self.dead_below, self.collapsed_above, self.start = adapter_name, dead_below, collapsed_above, start
        self.history: list[dict[str, Any]] = []
        self._warned: set[tuple[str, str]] = set()

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        """Add the measures to what is logged."""
        report = routing_report(unparallel(model), self.adapter_name)
        count = len(report.layers)
        means = {
            key: sum(m[key] for m in report.layers.values()) / count
            for key in ("entropy", "usage_entropy", "discreteness", "sparsity")
        }
        shares = [share for layer in report.layers.values() for share in layer["usage"]]
        values = {**means, "least_used": min(shares), "most_used": max(shares)}
        for entry in ([] if logs is None else [logs]) + state.log_history[-1:]:  # the trainer keeps a copy of what it logs
            entry.update({f"routing/{key}": round(value, 6) for key, value in values.items()})
        self.history.append({"step": state.global_step, **values, "layers": report.layers})
        if state.global_step >= self.start:
            for path, layer in report.layers.items():
                self._judge(path, layer["usage"])

    def _judge(self, path: str, usage: list[float]) -> None:
        """Warn of a layer, once for each kind of trouble."""
        if len(usage) < 2:
            return
        dead = [skill for skill, share in enumerate(usage) if share < self.dead_below / len(usage)]
        if max(usage) > self.collapsed_above:
            self._warn(
                path, "collapsed", f"skill {usage.index(max(usage))} has {max(usage):.0%} of the use: the layer has collapsed to it"
            )
        elif dead:
            self._warn(path, "dead", f"skills {dead} are hardly used by any task")

    def _warn(self, path: str, kind: str, text: str) -> None:
        if (path, kind) not in self._warned:
            self._warned.add((path, kind))
            warnings.warn(f"`{path}`: {text}; a term `routing_loss(balance=…)` keeps skills in use.", PeftWarning, stacklevel=4)
