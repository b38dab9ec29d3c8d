# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA: low-rank factors composed from the vectors of a bank. Source: arXiv:2405.15179."""

from ...base.registry import register_peft_method
from .config import VBLoRAConfig
from .layer import Linear, VBLoRALayer
from .methods import VBLoRAMethods
from .model import VBLoRAModel
from .shared_bank import VectorBank
from .usage import BankUsage, bank_usage

__all__ = [
    "BankUsage",
    "Linear",
    "VBLoRAConfig",
    "VBLoRALayer",
    "VBLoRAMethods",
    "VBLoRAModel",
    "VectorBank",
    "bank_usage",
]

register_peft_method(
    name="vblora", config_cls=VBLoRAConfig, model_cls=VBLoRAModel, is_mixed_compatible=True
)
