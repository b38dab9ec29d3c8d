# SPDX-License-Identifier: Apache-2.0
"""Freeze parameters temporarily."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from .containers import walk


class TemporaryFreeze:
    """Parameters that are frozen temporarily.

    FSDP2 puts another tensor in a parameter's place to compute with. That tensor decides what
    trains, and copies `requires_grad` only when it is next put there, so it is changed too.
    """

    def __init__(self) -> None:
        self._frozen: list[tuple[nn.Module, str, nn.Parameter]] = []

    def begin(
        self,
        roots: Iterable[nn.Module],
        parameters: Iterable[nn.Parameter | None],
        adapters: Collection[str] | None = None,
    ) -> None:
        """Freeze those of some parameters, of some adapters (None for any), that are trainable."""
        trainable = {
            id(parameter)
            for parameter in parameters
            if parameter is not None and parameter.requires_grad
        }
        if not trainable:
            return
        for module in dict.fromkeys(module for root in roots for _, module in walk(root, adapters)):
            self._frozen += [
                (module, name, p)
                for name, p in module._parameters.items()
                if p is not None and id(p) in trainable
            ]
        self._require_grad(False)

    def end(self) -> None:
        """Unfreeze the parameters."""
        self._require_grad(True)
        self.forget()

    def forget(self) -> None:
        """Leave the parameters as they are from now on."""
        self._frozen = []

    def _require_grad(self, required: bool) -> None:
        for module, name, parameter in self._frozen:
            in_place = module._parameters.get(name)
            for tensor in (parameter, parameter if in_place is None else in_place):
                tensor.requires_grad_(required)
