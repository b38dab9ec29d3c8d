# SPDX-License-Identifier: Apache-2.0
"""`Method`: the members of a method's `BaseTuner` that a model with adapters uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ..config import PeftConfig, TargetedConfig
from .combining import CombiningMethod
from .injection import AdapterMethod
from .plan import TargetRules


class Method(TargetRules[Any], AdapterMethod[Any], CombiningMethod, Protocol):
    """The members of a method's `BaseTuner` that a model with adapters uses."""

    @property
    def adapter_call_arguments(self) -> tuple[str, ...]:
        """Return the keyword arguments of the model's calls that are for the method."""

    @property
    def merge_options(self) -> tuple[str, ...]:
        """Return the arguments of a merge in addition to the common ones."""

    def config_to_save(self, adapter_name: str) -> TargetedConfig:
        """Return the config to write beside an adapter's weights."""

    def detach_adapter(self, adapter_name: str) -> None:
        """Undo `attach_adapter`, before an adapter is deleted."""

    def detach_adapters(self) -> None:
        """Undo the method's changes to the model outside its layers."""

    def merge_options_of(
        self, adapter_name: str, options: Mapping[str, object]
    ) -> Mapping[str, object]:
        """Return the checked options that one adapter is merged with."""

    def saved_start(self, config: Any) -> object:
        """Return the start from the base weight that a file's adapter has."""

    def adopt_start(self, adapter_name: str, start: Any) -> None:
        """Give an adapter the start of a file that was loaded into it."""

    def without_start(
        self, model: nn.Module, adapter_name: str
    ) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Return config and tensors of an adapter without its start from the base weight."""

    def file_contents(
        self, adapter_name: str, config: Any, state: dict[str, Tensor]
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return the config and tensors to write to a file."""
