# SPDX-License-Identifier: Apache-2.0
"""The methods, each in a folder of its own. Importing a method's package registers it."""

import typing as _typing

from ..base.placeholders import placeholders as _placeholders
from .loha import LoHaConfig, LoHaModel
from .lokr import (
    LoKrConfig,
    LoKrModel,
    inspect_lokr_file,
    load_lokr_file,
    lokr_config_from_lycoris,
    save_lokr_file,
)
from .lora import (
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraModel,
    LoraRuntimeConfig,
    convert_to_lora,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    preprocess_loraga,
    save_as_lora,
    save_tasks_as_lora,
)
from .poly import PolyConfig, PolyModel, convert_to_poly, routing_report, save_as_poly
from .routed import ArrowConfig, RoutedConfig, RoutedModel, create_arrow_model, get_routed_model
from .vblora import VBLoRAConfig, VBLoRAModel, VectorBank, bank_usage

if _typing.TYPE_CHECKING:
    from ..base.placeholder_names import *  # noqa: F403
else:
    __getattr__ = _placeholders(__name__)


__all__ = [
    "ArrowConfig",
    "EvaConfig",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "PolyConfig",
    "PolyModel",
    "RoutedConfig",
    "RoutedModel",
    "VBLoRAConfig",
    "VBLoRAModel",
    "VectorBank",
    "bank_usage",
    "convert_to_lora",
    "convert_to_poly",
    "create_arrow_model",
    "get_eva_state_dict",
    "get_routed_model",
    "initialize_lora_eva_weights",
    "inspect_lokr_file",
    "load_lokr_file",
    "lokr_config_from_lycoris",
    "preprocess_loraga",
    "routing_report",
    "save_as_lora",
    "save_as_poly",
    "save_lokr_file",
    "save_tasks_as_lora",
]
