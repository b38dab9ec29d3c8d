# SPDX-License-Identifier: Apache-2.0
"""`LoHaModel`: a model with LoHa adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ...checkpoint.format import CheckpointFormat, ModuleShape, Shapes
from ...core.method_info import Role
from ...core.targets import pattern_value
from ..lycoris_utils import LycorisTuner
from .config import LoHaConfig
from .layer import Conv1d, Conv2d, Conv3d, Linear, LoHaLayer
from .param_wrapper import ParamWrapper


class LoHaFormat(CheckpointFormat[LoHaConfig]):
    """LoHa's tensors in a checkpoint, which are those in a model."""

    def module_shape(self, shapes: Shapes) -> ModuleShape | None:
        """Return the size from `w1_a [out, r]` and `w1_b [r, in · taps]`, or from Tucker's form.

        The first are the same for a convolution and a linear layer, and are taken for the latter.
        """
        a, b = shapes.get("hada_w1_a", ()), shapes.get("hada_w1_b", ())
        if len(a) != 2 or len(b) != 2:
            return None
        if core := shapes.get("hada_t1"):
            return ModuleShape(a[1], b[1], b[0], core[2:])
        return ModuleShape(a[0], b[1], b[0])


class LoHaModel(LycorisTuner[LoHaConfig]):
    """A model with LoHa adapters: `W + (alpha / r) · (w1_a·w1_b) ∘ (w2_a·w2_b)` in every adapted
    layer.

    Example:
        >>> import torch
        >>> from peft import LoHaConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> model = LoHaModel(base, LoHaConfig(r=2, target_modules=["0"]), "default")
        >>> model.model[0].hada_w1_a["default"].shape
        torch.Size([8, 2])

    Source: arXiv:2108.06098, section 2.2
    """

    prefix: ClassVar[str] = "hada_"
    tuner_layer_cls = LoHaLayer
    layer_classes = (Linear, Conv1d, Conv2d, Conv3d)
    parameter_layer_cls = ParamWrapper
    checkpoint_format = LoHaFormat()
    parameter_roles: ClassVar[Mapping[str, Role]] = {
        "A": Role(("hada_w1_b", "hada_w2_b")),
        "B": Role(("hada_w1_a", "hada_w2_a")),
        "full": Role(("hada_t1", "hada_t2")),
    }

    def tuner_layer_options(
        self, config: LoHaConfig, path: str, build: object
    ) -> dict[str, object]:
        """Return rank and alpha for the module at `path`."""
        return {
            "r": pattern_value(config.rank_pattern, path, config.r),
            "alpha": pattern_value(config.alpha_pattern, path, config.alpha),
        }
