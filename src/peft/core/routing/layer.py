# SPDX-License-Identifier: Apache-2.0
"""`RoutingLayer`: a layer whose adapters treat samples differently."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ...ops.nested import are_tokens
from ..layer import BaseTunerLayer
from .calls import Routing


class RoutingLayer(BaseTunerLayer):
    """A layer whose adapters route: what they compute depends on a sample's task or input.

    Args:
        base_layer: The layer to adapt.
        routing: The routing of the model, shared by its layers; None for a layer without a model.
    """

    def __init__(self, base_layer: nn.Module, routing: Routing | None = None) -> None:
        super().__init__(base_layer)
        self.routing = routing or Routing(base_layer)

    def forward(
        self, x: Tensor, *args: object, task_ids: object = None, **kwargs: object
    ) -> Tensor:
        """Return the base layer's output plus the deltas of the active adapters.

        Args:
            x: `[rows, *leading, in]`.
            *args, **kwargs: Further arguments of the base layer.
            task_ids: A task for each row, if the layer is called directly; in a model, the call of
                the model gets them.
        """
        if task_ids is None:
            return super().forward(x, *args, **kwargs)
        with self.routing.layer_call(task_ids, x):
            return super().forward(x, *args, **kwargs)

    def apply_to_samples(  # noqa: D102
        self, adapter_name: str, samples: list[int], x: Tensor, result: Tensor, owner: Tensor | None
    ) -> Tensor:
        with self.routing.subset(samples, owner):  # each sample keeps its own task
            return self.apply_adapter(adapter_name, x, result)

    def apply_to_tokens(
        self, adapter_name: str, nested: Tensor, x: Tensor, result: Tensor
    ) -> Tensor:
        """Apply an adapter to a nested input as padded samples, so that each keeps its task."""
        real = are_tokens(nested)
        padded = [t.new_zeros(*real.shape, *t.shape[1:]).index_put((real,), t) for t in (x, result)]
        with self.routing.padded(
            real.repeat_interleave(math.prod(x.shape[1:-1]), 1), self.layout.stream
        ):
            return self.apply_adapter(adapter_name, *padded)[real]

    def resolve_task(self, adapter_name: str, task_id: object) -> int | None:
        """Return the task of a merge, checked; None if the delta is not that of one task."""
        raise NotImplementedError

    def note_merges(self, adapter_names: list[str]) -> None:
        """Record the adapters that are merged now, and their tasks in the routing."""
        super().note_merges(adapter_names)
        options = self._merges.options(self)
        tasks = {
            name: self.resolve_task(name, options[name].get("task_id")) for name in adapter_names
        }
        self.routing.note_merges(self, {n: task for n, task in tasks.items() if task is not None})
