# SPDX-License-Identifier: Apache-2.0
"""Watching the routing while it is trained: in a loop of one's own, or in transformers' `Trainer`."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ...config import is_int
from ...utils.error import PeftValueError, PeftWarning
from ...utils.sharding import unparallel
from .report import routing_report


class RoutingWatch:
    """Measures how the routing by task stands, and warns of skills that fall out of use.

    The measures are, as means over the layers, `entropy`, `usage_entropy`, `discreteness` and `sparsity`, and `least_used` and
    `most_used`, the smallest and largest share of use of any skill.

    Args:
        adapter_name: The adapter.
        dead_below: A skill whose share of use is below this part of the equal share is dead.
        collapsed_above: A layer has collapsed if one skill's share of use is above this.
        start: Do not warn before this step: routers begin with equal weights, and find their way slowly.

    Attributes:
        history: The measures of each look with its `step`, and those of each layer as `layers`.

    Raises:
        PeftValueError: A value is not allowed.

    Example:
        >>> from peft import PolyConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), PolyConfig(n_tasks=2, n_skills=2, target_modules=["0"]))
        >>> watch = RoutingWatch()
        >>> round(watch.look(model, step=100)["entropy"], 3)
        1.0
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

    def look(self, model: nn.Module, step: int) -> dict[str, float]:
        """The measures as they are now, without those of the layers.

        Args:
            model: A model with the adapter; also inside DDP.
            step: Which step it is.

        Raises:
            PeftValueError: There is no such adapter that routes by task.
        """
        layers = routing_report(unparallel(model), self.adapter_name).layers
        shares = [share for layer in layers.values() for share in layer["usage"]]
        names = ("entropy", "usage_entropy", "discreteness", "sparsity")
        values = {name: sum(layer[name] for layer in layers.values()) / len(layers) for name in names}
        values |= {"least_used": min(shares), "most_used": max(shares)}
        self.history.append({"step": step, **values, "layers": layers})
        if step >= self.start:
            for path, layer in layers.items():
                self._judge(path, layer["usage"])
        return values

    def _judge(self, path: str, usage: list[float]) -> None:
        """Warn of a layer, once for each kind of trouble."""
        dead = [skill for skill, share in enumerate(usage) if share < self.dead_below / len(usage)]
        if len(usage) > 1 and max(usage) > self.collapsed_above:
            text = f"skill {usage.index(max(usage))} has {max(usage):.0%} of the use: the layer has collapsed to it"
            self._warn(path, "collapsed", text)
        elif dead:
            self._warn(path, "dead", f"skills {dead} are hardly used by any task")

    def _warn(self, path: str, kind: str, text: str) -> None:
        if (path, kind) not in self._warned:
            self._warned.add((path, kind))
            warnings.warn(f"`{path}`: {text}; a term `routing_loss(balance=…)` keeps skills in use.", PeftWarning, stacklevel=4)


def routing_callback(watch: RoutingWatch | None = None) -> Any:
    """A callback for transformers' `Trainer`: whenever that logs, a `RoutingWatch` looks, and its measures are logged too, as
    `routing/entropy` and so on.

    Callbacks are called in turn. To have those of TensorBoard or Weights & Biases get the measures too, put this one first,
    `trainer.callback_handler.callbacks.insert(0, routing_callback())`.

    Args:
        watch: By default a new one; the callback has it as `watch`.
    """
    from transformers import TrainerCallback

    class RoutingCallback(TrainerCallback):
        def __init__(self) -> None:
            self.watch = watch or RoutingWatch()

        def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
            values = self.watch.look(model, state.global_step)
            for entry in ([] if logs is None else [logs]) + state.log_history[-1:]:  # the trainer keeps a copy of what it logs
                entry.update({f"routing/{key}": round(value, 6) for key, value in values.items()})

    return RoutingCallback()
