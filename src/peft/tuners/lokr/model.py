# SPDX-License-Identifier: Apache-2.0
"""LoKr on a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from .._combining import Combination, Combined
from .._geometry import geometry
from .._layer import BaseTunerLayer
from .._roles import Role
from ..lycoris_utils import LycorisTuner
from . import combining
from .config import LoKrConfig
from .layer import Conv1d, Conv2d, Conv3d, Linear, LoKrLayer


class LoKrModel(LycorisTuner):
    """A model with LoKr adapters: `W + (alpha / r) · (W1 ⊗ W2)` in every adapted layer.

    Args:
        As `BaseTuner`.

    Example:
        >>> import torch
        >>> model = LoKrModel(torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3)), LoKrConfig(target_modules=["0"]), "default")
        >>> model.model[0].lokr_w1["default"].shape
        torch.Size([2, 2])

    Source: arXiv:2309.14859, section 3.2
    """

    prefix: ClassVar[str] = "lokr_"
    tuner_layer_cls = LoKrLayer
    parameter_roles: ClassVar[Mapping[str, Role]] = {
        "A": Role(("lokr_w1_b", "lokr_w2_b")),
        "B": Role(("lokr_w1_a", "lokr_w2_a")),
        "full": Role(("lokr_w1", "lokr_w2", "lokr_t2")),
    }
    supported_modules: ClassVar[str] = "nn.Linear (also quantised), Conv1D, nn.Conv1d, nn.Conv2d and nn.Conv3d"
    combination_types: ClassVar[tuple[str, ...]] = ("svd",)

    def tuner_layer_class(self, config: Any, module: nn.Module) -> type[BaseTunerLayer] | None:  # noqa: D102
        size = geometry(module)
        return None if size is None else (Linear, Conv1d, Conv2d, Conv3d)[len(size.kernel_size)]

    def combine(self, request: Combination) -> Combined:  # noqa: D102
        return combining.combine(self, request)

    def config_to_save(self, adapter_name: str) -> LoKrConfig:
        """The config, its layout left out where no layer's tensors depend on it, so that others read the file without remark."""
        config: Any = self.peft_config[adapter_name]
        depends = any(
            adapter_name in layer.lokr_w2 and layer.lokr_w2[adapter_name].dim() == 3
            for layer in self.tuner_layers()
            if isinstance(layer, LoKrLayer)
        )
        return config if depends else replace(config, kronecker_layout="flat")
