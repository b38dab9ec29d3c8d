# SPDX-License-Identifier: Apache-2.0
"""The files of a routed adapter: weights and gates, and the experts' factors where these are saved
with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...base.constants import MODEL_ROOT
from ...checkpoint.format import CheckpointFormat
from .config import RoutedConfig
from .sources import SAVED

if TYPE_CHECKING:
    from .layer import RoutedLayer


class RoutedFormat(CheckpointFormat[RoutedConfig]):
    """Checkpoints of routed adapters: experts in them are read before the adapter is made."""

    def import_state(  # noqa: D102
        self, state: dict[str, Tensor], config: RoutedConfig, names: Collection[str]
    ) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in state.items() if f".{SAVED}." not in key}


def with_experts(
    config: RoutedConfig,
    state: dict[str, Tensor],
    adapter_name: str,
    layers: Mapping[str, RoutedLayer],
) -> tuple[RoutedConfig, dict[str, Tensor]]:
    """Return config and tensors of an adapter for a file, with the experts' factors: if the config
    asks for it, or experts in memory have no other place.
    """
    sources = (*config.experts.values(), *config.general_experts.values())
    if not config.save_experts and all(source.get("source") for source in sources):
        return config, state
    state = dict(state)
    for path, layer in layers.items():
        experts = layer.factors(adapter_name)
        factors, numbers = experts(), experts.numbers.tolist()
        start = f"{MODEL_ROOT}{path}.{SAVED}."
        general = [len(experts.place)] if experts.has_general else []
        state |= {
            f"{start}down": factors.down,
            f"{start}up": factors.up,
            f"{start}ranks": torch.tensor(experts.ranks),
            f"{start}numbers": torch.tensor([*numbers, *general]),
        }
    return replace(config, save_experts=True), state
