# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA: low-rank factors composed from the vectors of one shared bank. Source: arXiv:2405.15179"""

from ...utils.peft_types import register_peft_method
from .config import VBLoRAConfig
from .layer import Linear, VBLoRALayer
from .model import VBLoRAModel
from .shared import VectorBank

__all__ = ["Linear", "VBLoRAConfig", "VBLoRALayer", "VBLoRAModel", "VectorBank"]

register_peft_method(name="vblora", config_cls=VBLoRAConfig, model_cls=VBLoRAModel, is_mixed_compatible=True)
