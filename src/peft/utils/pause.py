# SPDX-License-Identifier: Apache-2.0
"""Parameters that are frozen for a while."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class Pause:
    """Which parameters are frozen for a while, by the places they have in modules.

    FSDP2 puts other tensors there to compute with, and what is trainable in a forward is decided by those.
    """

    def __init__(self) -> None:
        self._places: list[tuple[nn.Module, str]] = []

    def begin(self, roots: Iterable[nn.Module], parameters: Iterable[nn.Parameter]) -> None:
        """Freeze those of some parameters that are trainable; they are somewhere in the modules `roots`."""
        trainable = {id(parameter) for parameter in parameters if parameter.requires_grad}
        for module in dict.fromkeys(module for root in roots for module in root.modules()):
            self._places += [(module, name) for name, p in module._parameters.items() if id(p) in trainable]
        self._require_grad(False)

    def end(self) -> None:
        """Unfreeze them."""
        self._require_grad(True)
        self.forget()

    def forget(self) -> None:
        """Leave them as they are."""
        self._places = []

    def _require_grad(self, required: bool) -> None:
        for module, name in self._places:
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(required)
