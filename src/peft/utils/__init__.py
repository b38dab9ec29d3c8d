# SPDX-License-Identifier: Apache-2.0
"""Files, keys, names and helpers that know nothing of tuners."""

from .adapter_files import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from .constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from .other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    _get_submodules,
    infer_device,
    prepare_model_for_kbit_training,
)
from .peft_types import PeftType, TaskType, register_peft_method
from .save_and_load import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)

__all__ = [
    "CONFIG_NAME",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "PeftType",
    "TaskType",
    "_get_submodules",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "infer_device",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "register_peft_method",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
