# SPDX-License-Identifier: Apache-2.0
"""LoRA: low-rank adaptation, `ΔW = s · B·A`, and DoRA, its form with separate lengths. Source: arXiv:2106.09685, 2402.09353"""

from typing import Any as _Any

from ...utils.markers import marker as _marker
from ...utils.peft_types import register_peft_method
from .config import LoraConfig, LoraRuntimeConfig
from .conversion import LoraConversion, convert_to_lora, save_as_lora, save_tasks_as_lora
from .layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer
from .model import LoraModel


def __getattr__(name: str) -> _Any:
    """Names of the interface that are not provided here, as classes that no object is of."""
    return _marker(name, __name__)


__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoraConfig",
    "LoraConversion",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "convert_to_lora",
    "save_as_lora",
    "save_tasks_as_lora",
]

register_peft_method(name="lora", config_cls=LoraConfig, model_cls=LoraModel, is_mixed_compatible=True)
