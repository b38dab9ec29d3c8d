# SPDX-License-Identifier: Apache-2.0
"""Parameters that are frozen for a while."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from .containers import walk


class TemporaryFreeze:
    """Which parameters are frozen for a while.

    They are known by the places they have in modules too: FSDP2 puts other tensors there to compute
    with. Those decide what is trainable in a forward, and take that over from the parameter itself
    when they are next put there.
    """

    def __init__(self) -> None:
        self._freeze: list[tuple[nn.Module, str, nn.Parameter]] = []

    def begin(
        self,
        roots: Iterable[nn.Module],
        parameters: Iterable[nn.Parameter | None],
        adapters: Collection[str] | None = None,
    ) -> None:
        """Freeze those of some parameters that are trainable; they are somewhere in the modules
        `roots`, being these adapters'.
        """
        trainable = {
            id(parameter)
            for parameter in parameters
            if parameter is not None and parameter.requires_grad
        }
        if not trainable:
            return
        for module in dict.fromkeys(module for root in roots for _, module in walk(root, adapters)):
            self._freeze += [
                (module, name, p)
                for name, p in module._parameters.items()
                if p is not None and id(p) in trainable
            ]
        self._require_grad(False)

    def end(self) -> None:
        """Unfreeze them."""
        self._require_grad(True)
        self.forget()

    def forget(self) -> None:
        """Leave them as they are."""
        self._freeze = []

    def _require_grad(self, required: bool) -> None:
        for module, name, parameter in self._freeze:
            in_place = module._parameters.get(name)
            for tensor in (parameter, parameter if in_place is None else in_place):
                tensor.requires_grad_(required)
