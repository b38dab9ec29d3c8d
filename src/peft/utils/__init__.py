# SPDX-License-Identifier: Apache-2.0
"""Helpers of the PEFT interface, at their documented place."""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from ..base.constants import (
    CONFIG_NAME,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from ..base.errors import NoMatchingPeftModuleError, PeftError, PeftWarning
from ..base.modules import _get_submodules, infer_device, shift_tokens_right
from ..base.placeholders import placeholder as _placeholder
from ..base.registry import PeftType, TaskType, register_peft_method
from ..base.tensors import cast_mixed_precision_params, id_tensor_storage, transpose
from ..checkpoint.hub import load_peft_weights
from ..checkpoint.state_dict import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from ..core.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from ..core.trainable_tokens import TrainableTokensWrapper
from ..integrations.kbit import prepare_model_for_int8_training, prepare_model_for_kbit_training
from . import constants as _constants
from .loftq_utils import replace_lora_weights_loftq
from .other import _freeze_adapter, get_quantization_config

# Names of the interface that this package does not implement, as placeholders.
PromptLearningConfig: type
_set_adapter: type
_set_trainable: type
get_gptqmodel_quant_linear: type
map_cache_to_layer_device_map: type
set_additional_trainable_modules: type

if not _TYPE_CHECKING:  # type checkers would accept any name

    def __getattr__(name: str) -> _Any:
        """Return a method's default target modules, or a name that is elsewhere or not provided."""
        if name.startswith("TRANSFORMERS_MODELS_TO_"):
            return getattr(_constants, name)
        return _placeholder(name, __name__)


__all__ = [
    "CONFIG_NAME",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "TrainableTokensWrapper",
    "_freeze_adapter",
    "_get_submodules",
    "cast_mixed_precision_params",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "get_quantization_config",
    "id_tensor_storage",
    "infer_device",
    "load_peft_weights",
    "prepare_model_for_int8_training",
    "prepare_model_for_kbit_training",
    "register_peft_method",
    "replace_lora_weights_loftq",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
    "transpose",
]
