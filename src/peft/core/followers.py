# SPDX-License-Identifier: Apache-2.0
"""Layers that share a weight with an adapted layer, and follow its adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

from torch import Tensor, nn

from ..base.calls.adapter_batch import ADAPTER_BATCHES
from ..base.containers import WeightFollower
from .auxiliary import AuxiliaryTrainingWrapper


class Owner(Protocol):
    """A layer whose adapters others follow."""

    merged_adapters: list[str]

    @property
    def active_adapters(self) -> list[str]:
        """Return the names of the active adapters."""

    def follower_delta(self, adapter_name: str, base: nn.Module, x: Tensor) -> Tensor:
        """Return what an adapter adds to the output of another layer with the same weight."""


class Follower(AuxiliaryTrainingWrapper, WeightFollower):
    """A layer that shares its weight with an adapted one, the owner.

    It adds the deltas of those of the owner's adapters that it follows: their parameters are the
    owner's, and a merge into the owner's weight is one into its own.

    Args:
        module: The layer.
        owner: The adapted layer.
    """

    def __init__(self, module: nn.Module, owner: Owner) -> None:
        super().__init__(module)
        self.original_module = module
        self._owner = (owner,)  # in a tuple, not to be registered
        self._followed: list[str] = []

    @property
    def owner(self) -> Owner:
        """The adapted layer with the same weight."""
        return self._owner[0]

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that it follows."""
        return list(self._followed)

    def has(self, adapter_name: str) -> bool:
        """Return whether it follows an adapter."""
        return adapter_name in self._followed

    def follow(self, adapter_name: str) -> None:
        """Follow an adapter that the owner has."""
        self._followed.append(adapter_name)
        self._active_adapter = self.among(self.owner.active_adapters)

    def parameters_of(self, adapter_name: str) -> list[nn.Parameter]:
        """Return nothing: the parameters are the owner's."""
        return []

    def remove(self, adapter_name: str) -> None:
        """Follow an adapter no longer."""
        self._followed.remove(adapter_name)

    def check_one_of(self, adapter_names: Iterable[str]) -> None:
        """Check nothing: several adapters add up."""

    def plain(self, adapter_names: Collection[str]) -> nn.Module:
        """Return the layer itself."""
        return self.original_module

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return nothing: the parameters are the owner's."""
        return {}

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Run the layer with the deltas of the active adapters, or of each sample's adapter."""
        batch = ADAPTER_BATCHES.current
        if batch is None or self._disable_adapters:
            names = [] if self._disable_adapters else self._active_adapter
            return self._run(names, x, *args, **kwargs)

        def run(name: str, x: Tensor, *args: object, **kwargs: object) -> Tensor:
            return self._run([name] if self.has(name) else [], x, *args, **kwargs)

        return self._run_for_samples(batch, run, (x, *args), kwargs)

    def _run(self, names: list[str], x: Tensor, *args: object, **kwargs: object) -> Tensor:
        result = self.original_module(x, *args, **kwargs)
        for name in names:
            if name not in self.owner.merged_adapters:
                delta = self.owner.follower_delta(name, self.original_module, x)
                result = result + delta.to(result.dtype)
        return result
