# SPDX-License-Identifier: Apache-2.0
"""The members of configs, layers and tuners that this folder uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from ..base.registry import PEFT_TYPE_TO_TUNER_MAPPING, PeftType, lookup
from .format import CheckpointFormat
from .rank_padding import RankPadding, Unpadded


class AdapterConfig(Protocol):
    """The config of an adapter."""

    peft_type: str | PeftType | None
    task_type: str | None
    base_model_name_or_path: str | None
    inference_mode: bool

    @property
    def trained_biases(self) -> str:
        """Biases that are trained too: "none", "all", or another value for the adapted layers'."""

    def validate(self) -> None:
        """Check all fields."""

    def affects_output(self, name: str) -> bool:
        """Return whether a field changes what a loaded adapter computes."""


class AdapterLayer(Protocol):
    """A layer with adapters."""

    container_names: ClassVar[tuple[str, ...]]
    value_names: ClassVar[tuple[str, ...]]
    base_layer: nn.Module
    scaling: dict[str, float | Tensor]
    # Unpadded sizes of padded tensors, by adapter name and container.
    unpadded_sizes: dict[str, dict[str, Unpadded]]

    def rank_padding(self, container: str) -> RankPadding | None:
        """Return where tensors of a container have their rank; None if it can't be padded."""

    def hold_scale(self, adapter_name: str, scale: float | Tensor) -> None:
        """Set an adapter's scale, in place if it is a tensor."""

    def adopt_settings(self, adapter_name: str, other: AdapterLayer, other_name: str) -> None:
        """Take over a method's settings of an adapter in another layer."""


class AdapterBuild(Protocol):
    """An adapter that is complete but not in the model."""

    def all_layers(self) -> Iterator[tuple[str, AdapterLayer]]:
        """Yield the adapter's layers with their paths in a file."""

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the adapter's tensors with the names that they will have in the model."""


class Tuner(Protocol):
    """The tuner of a method."""

    model: nn.Module
    tuner_layer_cls: ClassVar[type[AdapterLayer]]
    # Parameters that all layers share, registered at the root of the model.
    shared_parameter_names: ClassVar[tuple[str, ...]]
    checkpoint_format: ClassVar[CheckpointFormat[Any]]

    @classmethod
    def of(cls, model: nn.Module, config: AdapterConfig) -> Tuner:
        """Return the tuner of a model's adapters."""

    @classmethod
    def note_loaded(cls, model: nn.Module, adapter_name: str) -> None:
        """Update the state that depends on an adapter's values."""

    def named_tuner_layers(self) -> Iterator[tuple[str, AdapterLayer]]:
        """Yield the layers with adapters, with their paths."""

    def present_names(
        self, config: AdapterConfig, state: Mapping[str, Tensor]
    ) -> tuple[AdapterConfig, Mapping[str, Tensor]]:
        """Return a config and a checkpoint with the present names of the model's modules."""

    def target_problems(self, config: AdapterConfig, path: str, module: nn.Module) -> Iterator[str]:
        """Yield reasons why a config does not fit a module."""

    def build_for(
        self,
        adapter_name: str,
        config: AdapterConfig,
        layers: Mapping[str, AdapterLayer],
        like: str,
    ) -> AdapterBuild:
        """Make an adapter without values for layers of the model."""


def tuner_class(config: AdapterConfig) -> type[Tuner]:
    """Return the tuner class of a config's method."""
    return lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
