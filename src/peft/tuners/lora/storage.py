# SPDX-License-Identifier: Apache-2.0
"""Differences between LoRA's tensors in a model and in a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

from torch import Tensor

from ...checkpoint.format import CheckpointFormat
from .config import LoraConfig
from .starts import is_random, without_start

_MAGNITUDE = "lora_magnitude_vector"


class LoraFormat(CheckpointFormat[LoraConfig]):
    """Conversion of LoRA's tensors between a model and a checkpoint.

    DoRA's norms are parameters `weight` of modules in the model; the key in a checkpoint is that of
    the module. An adapter with a random start is saved with the start, which is then taken off.
    """

    inner_names: ClassVar[Mapping[str, str]] = {_MAGNITUDE: "weight"}
    token_dims: ClassVar[Mapping[str, int]] = {"lora_embedding_A": 1, "lora_B.weight": 0}

    def export_state(self, state: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:  # noqa: D102
        end = f"{_MAGNITUDE}.weight"
        return {
            key.removesuffix(".weight") if key.endswith(end) else key: tensor
            for key, tensor in state.items()
        }

    def import_state(  # noqa: D102
        self, state: dict[str, Tensor], config: LoraConfig, names: Collection[str]
    ) -> dict[str, Tensor]:
        if is_random(config.init_lora_weights):
            state = without_start(config, state)
        return {
            f"{key}.weight" if key.endswith(_MAGNITUDE) else key: tensor
            for key, tensor in state.items()
        }
