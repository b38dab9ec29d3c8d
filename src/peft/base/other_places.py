# SPDX-License-Identifier: Apache-2.0
"""Names of the interface at further places: Hugging Face PEFT, in this release or an earlier one,
has them in modules that are not their home here. Module `__getattr__`s look here.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

_CONSTANTS = "CONFIG_NAME EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND "
_CONSTANTS += "SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME"
_STATE = "get_peft_model_state_dict load_peft_weights set_peft_model_state_dict"
_REGISTRY = "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_TUNER_MAPPING "
_REGISTRY += "PeftType TaskType"
_WRAPPERS = "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper"
_FUNCTIONS = "cast_adapter_dtype delete_adapter set_adapter set_requires_grad"
_QUANTIZED = "is_bnb_4bit_available is_bnb_available is_eetq_available"

# The home of each name, by the module that has it too.
_PLACES: Mapping[str, Mapping[str, str]] = {
    "peft.config": {"peft.utils.peft_types": "PeftType TaskType"},
    "peft.mapping": {
        "peft.mapping_func": "get_peft_model",
        "peft.peft_model": "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "peft.utils.peft_types": "PeftType TaskType",
    },
    "peft.peft_model": {
        "peft.mapping_func": "get_peft_model",
        "peft.tuners.tuners_utils": "BaseTuner",
        "peft.utils": f"{_CONSTANTS} {_STATE} {_WRAPPERS} id_tensor_storage infer_device "
        "shift_tokens_right",
        "peft.utils.constants": "DUMMY_MODEL_CONFIG",
        "peft.utils.integrations": "init_empty_weights",
        "peft.utils.peft_types": _REGISTRY,
    },
    "peft.tuners": {"peft.tuners.mixed": "MixedModel"},
    "peft.tuners.lora": {"peft.import_utils": _QUANTIZED},
    "peft.tuners.lora.config": {"peft.config": "PeftConfig"},
    "peft.tuners.lora.layer": {
        "peft.utils.integrations": "dequantize_module_weight gather_params_ctx get_bnb_param_type",
        "peft.tuners.lora.config": "LoraConfig",
        "peft.tuners.tuners_utils": "BaseTunerLayer check_adapters_to_merge",
        "peft.utils": "PeftWarning transpose",
    },
    "peft.tuners.lora.model": {
        "peft.import_utils": _QUANTIZED,
        "peft.tuners.tuners_utils": "BaseTunerLayer check_target_module_exists onload_layer",
        "peft.utils": "ModulesToSaveWrapper TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING "
        "_freeze_adapter _get_submodules get_peft_model_state_dict get_quantization_config",
        "peft.utils.merge_utils": "dare_linear dare_ties magnitude_prune task_arithmetic ties",
        "peft.utils.other": "get_pattern_key",
    },
    "peft.tuners.poly.router": {"peft.tuners.poly.router": "PolyRouter:TaskRouter"},
    "peft.tuners.tuners_utils": {
        "peft.config": "PeftConfig",
        "peft.functional": _FUNCTIONS,
        "peft.utils": f"{_CONSTANTS} {_WRAPPERS} _get_submodules",
        "peft.utils.constants": "DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES SEQ_CLS_HEAD_NAMES",
        "peft.utils.error": "NoMatchingPeftModuleError PeftWarning",
        "peft.utils.integrations": "init_empty_weights",
        "peft.utils.peft_types": "PEFT_TYPE_TO_PREFIX_MAPPING PeftType TaskType",
    },
    "peft.utils": {"peft.config": "PeftConfig", "peft.utils.other": "get_pattern_key"},
    "peft.utils.other": {
        "peft.import_utils": "is_gptqmodel_available is_torch_tpu_available is_xpu_available",
        "peft.utils.constants": "EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND",
    },
    "peft.utils.save_and_load": {
        "peft.utils": f"{_CONSTANTS} {_WRAPPERS} infer_device",
        "peft.utils.peft_types": "PEFT_TYPE_TO_TUNER_MAPPING PeftType",
    },
}


def from_other_place(name: str, module: str) -> object:
    """Return an object whose home is another module than the one it is asked of.

    Raises:
        KeyError: The interface does not have the name there.

    Example:
        >>> from_other_place("PeftType", "peft.peft_model")
        <enum 'PeftType'>
    """
    for home, names in _PLACES.get(module, {}).items():
        for place in names.split():
            place, _, name_at_home = place.partition(":")
            if place == name:
                return getattr(import_module(home), name_at_home or name)
    raise KeyError(name)
