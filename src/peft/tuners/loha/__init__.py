# SPDX-License-Identifier: Apache-2.0
"""LoHa: Hadamard products of low-rank matrices, `ΔW = (alpha / r) · (w1_a·w1_b) ∘ (w2_a·w2_b)`.
Source: arXiv:2108.06098
"""

from ...base.registry import register_peft_method
from .config import LoHaConfig
from .layer import Conv1d, Conv2d, Conv3d, Linear, LoHaLayer
from .model import LoHaModel

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Linear", "LoHaConfig", "LoHaLayer", "LoHaModel"]

register_peft_method(
    name="loha",
    config_cls=LoHaConfig,
    model_cls=LoHaModel,
    prefix="hada_",
    is_mixed_compatible=True,
)
