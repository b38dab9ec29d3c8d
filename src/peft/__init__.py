# SPDX-License-Identifier: Apache-2.0
"""Parameter-efficient fine-tuning with Poly, VB-LoRA and LoKr: an independent implementation of the
PEFT interface.

Importing this package imports torch. transformers, huggingface_hub and other libraries are imported
by the functions that need them.
"""

import typing as _typing

from . import functional as functional
from . import helpers as helpers
from . import import_utils as import_utils
from . import optimizers as optimizers
from . import utils as utils
from ._version import __version__
from .auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from .base.errors import NoMatchingPeftModuleError, PeftError, PeftWarning
from .base.placeholders import install as _install
from .base.placeholders import placeholders as _placeholders
from .base.progress import show_progress
from .base_models import meta_model, save_merged
from .clustering import adapter_similarity, cluster_adapters
from .config import PeftConfig
from .inspection import AdapterContents, inspect_adapter
from .library import AdapterEntry, AdapterFleet, AdapterLibrary, AdapterPack, adapter_sizes
from .mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    get_peft_config,
    inject_adapter_in_model,
)
from .mapping_func import get_peft_model
from .mixed_model import PeftMixedModel
from .peft_model import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_layer_status,
    get_model_status,
)
from .planning import AdapterPlan, LayerPlan, plan
from .standalone import load_standalone
from .timing import StepTimes, time_adapter
from .tuners.loha import LoHaConfig, LoHaModel
from .tuners.lokr import (
    LoKrConfig,
    LoKrModel,
    inspect_lokr_file,
    load_lokr_file,
    lokr_config_from_lycoris,
    save_lokr_file,
)
from .tuners.lora import (
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
    replace_lora_weights_loftq,
    save_as_lora,
    save_tasks_as_lora,
)
from .tuners.poly import PolyConfig, PolyModel, convert_to_poly, routing_report, save_as_poly
from .tuners.routed import (
    ArrowConfig,
    RoutedConfig,
    RoutedModel,
    create_arrow_model,
    get_routed_model,
)
from .tuners.vblora import VBLoRAConfig, VBLoRAModel, VectorBank, bank_usage
from .utils import (
    PeftType,
    TaskType,
    cast_mixed_precision_params,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    prepare_model_for_int8_training,
    prepare_model_for_kbit_training,
    register_peft_method,
    set_base_model_state_dict,
    set_peft_model_state_dict,
    shift_tokens_right,
)

_install()


if _typing.TYPE_CHECKING:
    from .base.placeholder_names import *  # noqa: F403
else:
    __getattr__ = _placeholders(__name__)


__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "AdapterContents",
    "AdapterEntry",
    "AdapterFleet",
    "AdapterLibrary",
    "AdapterPack",
    "AdapterPlan",
    "ArrowConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "EvaConfig",
    "LayerPlan",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PolyConfig",
    "PolyModel",
    "RoutedConfig",
    "RoutedModel",
    "StepTimes",
    "TaskType",
    "VBLoRAConfig",
    "VBLoRAModel",
    "VectorBank",
    "__version__",
    "adapter_similarity",
    "adapter_sizes",
    "bank_usage",
    "cast_mixed_precision_params",
    "cluster_adapters",
    "convert_to_lora",
    "convert_to_poly",
    "create_arrow_model",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "get_routed_model",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "inspect_adapter",
    "inspect_lokr_file",
    "load_lokr_file",
    "load_peft_weights",
    "load_standalone",
    "lokr_config_from_lycoris",
    "meta_model",
    "plan",
    "prepare_model_for_int8_training",
    "prepare_model_for_kbit_training",
    "preprocess_loraga",
    "register_peft_method",
    "replace_lora_weights_loftq",
    "routing_report",
    "save_as_lora",
    "save_as_poly",
    "save_lokr_file",
    "save_merged",
    "save_tasks_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
    "show_progress",
    "time_adapter",
]
