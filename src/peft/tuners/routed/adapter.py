# SPDX-License-Identifier: Apache-2.0
"""One routed adapter on a model: its config and its layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ...base.calls.running import changing
from ...base.errors import PeftValueError
from ...core.adapter_choice import named_or_active
from ...core.adapters import check_unsharded
from ...core.tuner import BaseTuner
from ...integrations.distributed import take_back
from .config import RoutedConfig
from .deltas import Experts
from .layer import RoutedLayer


@dataclass(frozen=True, eq=False)
class RoutedAdapter:
    """One routed adapter of a tuner: its name, its config, and its layers by module path."""

    tuner: BaseTuner[RoutedConfig]
    name: str
    config: RoutedConfig
    layers: dict[str, RoutedLayer]

    @classmethod
    def of(cls, tuner: BaseTuner[RoutedConfig], adapter_name: str | None) -> RoutedAdapter:
        """Return an adapter of a tuner, by default the active one."""
        adapter_name = named_or_active(adapter_name, tuner.active_adapters, tuner.peft_config)
        config = tuner.peft_config[adapter_name]
        if not isinstance(config, RoutedConfig):
            raise PeftValueError(
                f"Adapter {adapter_name} is not a routed adapter: its config is a "
                f"{type(config).__name__}."
            )
        layers = tuner.adapter_layers(adapter_name, RoutedLayer)
        return cls(tuner, adapter_name, config, layers)

    @classmethod
    @contextmanager
    def to_change(
        cls, tuner: BaseTuner[RoutedConfig], adapter_name: str | None
    ) -> Iterator[RoutedAdapter]:
        """Context for a change of an adapter, by default the active one."""
        with changing(tuner):
            take_back(tuner)
            adapter = cls.of(tuner, adapter_name)
            check_unsharded(adapter.layers, adapter.name, "change it")
            with changing(tuner, [adapter.name]):
                yield adapter

    def check_unmerged(self) -> None:
        """Check that the adapter is not merged into the weights, which would stay as they are."""
        if self.name in self.tuner.merged_adapters:
            raise PeftValueError(f"Adapter {self.name} is merged; call `unmerge_adapter` first.")

    def check_running(self) -> None:
        """Check that calls of the model run the adapter: it is active, on, and nothing merged."""
        tuner = self.tuner
        if tuner.merged_adapters:
            raise PeftValueError(
                f"Adapters {tuner.merged_adapters} are merged into the weights; call "
                "`unmerge_adapter` first."
            )
        if self.name not in tuner.active_adapters:
            raise PeftValueError(
                f"Adapter {self.name} must be active; the active ones are "
                f"{tuner.active_adapters}. Call `set_adapter({self.name!r})` first."
            )
        if tuner.adapters_disabled:
            raise PeftValueError(
                "The adapters are switched off; call `enable_adapter_layers`, or leave the context "
                "`disable_adapter`, first."
            )

    def experts(self) -> Experts:
        """Return its experts, from the layers."""
        names = list(self.config.experts)
        experts = Experts({name: {} for name in names})
        for path, layer in self.layers.items():
            parts = layer.factors(self.name).deltas()
            for number, delta in parts.deltas.items():
                experts.deltas[names[number]][path] = delta
            if parts.general is not None:
                experts.general[path] = parts.general
        return experts
