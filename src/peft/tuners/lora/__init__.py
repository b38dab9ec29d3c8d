# SPDX-License-Identifier: Apache-2.0
"""LoRA: low-rank adaptation, `ΔW = s · B·A`, and DoRA, its form with separate norms. Source:
arXiv:2106.09685, 2402.09353
"""

import typing as _typing
from typing import Any as _Any

from ...base.placeholders import placeholders as _placeholders
from ...base.registry import register_peft_method
from .bnb import Linear4bit, Linear8bitLt
from .config import LoraConfig, LoraRuntimeConfig
from .conversion import LoraConversion, convert_to_lora, save_as_lora, save_tasks_as_lora
from .corda import preprocess_corda
from .eva import get_eva_state_dict, initialize_lora_eva_weights
from .layer import (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    LoraLayer,
    MultiheadAttention,
    ParamWrapper,
)
from .loftq import replace_lora_weights_loftq
from .loraga import preprocess_loraga
from .model import LoraModel
from .starts.configs import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from .torchao import TorchaoLoraLinear

# Names of the interface that this package does not implement, as placeholders.
ArrowConfig: _Any
BdLoraConfig: _Any
KasaConfig: _Any
MontecloraConfig: _Any
VeloraConfig: _Any
AqlmLoraLinear: _Any
EetqLoraLinear: _Any
GPTQLoraLinear: _Any
HqqLoraLinear: _Any
IncLoraLinear: _Any
LoraParallelLinear: _Any
QuantLinear: _Any
create_arrow_model: _Any

if not _typing.TYPE_CHECKING:  # type checkers would accept any name
    __getattr__ = _placeholders(__name__)


__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "CordaConfig",
    "Embedding",
    "EvaConfig",
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "LoftQConfig",
    "LoraConfig",
    "LoraConversion",
    "LoraGAConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "MultiheadAttention",
    "ParamWrapper",
    "TorchaoLoraLinear",
    "convert_to_lora",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "save_tasks_as_lora",
]

register_peft_method(
    name="lora", config_cls=LoraConfig, model_cls=LoraModel, is_mixed_compatible=True
)
