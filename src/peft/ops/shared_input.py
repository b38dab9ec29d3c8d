# SPDX-License-Identifier: Apache-2.0
"""The input of a few layers, and the memory in which they add their gradients for it.

Autograd adds them with a pass over the activations for each layer. Here each layer's backward adds
the product that it needs anyhow to what those before it have found. The layers stay nodes of their
own: what is not part of a backward pass, or not in this order, is not missed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef


class SharedInput:
    """An input as the first layer found it.

    Attributes:
        alias: What the layers read. Nothing else does, so that no other gradient is added to
            theirs.
        gradient: The gradient for the alias.
    """

    def __init__(self, x: Tensor) -> None:
        self._x, self._state = x, _state(x)
        self.alias, self.gradient = x.view_as(x), SharedGradient()

    def is_(self, x: Tensor) -> bool:
        """Return whether this is an input, unchanged and on the same stream."""
        return self._x is x and self._state == _state(x)


def _state(x: Tensor) -> tuple[object, ...]:
    return x._version, torch.cuda.current_stream(x.device) if x.is_cuda else None


class SharedGradient:
    """The sum of the gradients for an input in the backward pass that runs. Autograd owns it."""

    def __init__(self) -> None:
        self._found: tuple[int, TensorWeakRef] | None = None

    def get(self) -> Tensor | None:
        """Return what the layers have added up so far in this pass."""
        found = self._found
        if found is None or not found[0] == torch._C._current_graph_task_id() != -1:
            return None
        return found[1]()

    def set(self, gradient: Tensor) -> None:
        """Note the memory to add to, which the first layer returns."""
        self._found = torch._C._current_graph_task_id(), TensorWeakRef(gradient)
