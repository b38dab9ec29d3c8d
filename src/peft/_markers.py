# SPDX-License-Identifier: Apache-2.0
"""Names of the PEFT interface that this package does not provide.

Client libraries import them at their own import and ask `isinstance(config, PrefixTuningConfig)`. They get a class that nothing is
an instance of; making one, or calling what is a function elsewhere, raises an error that says what is provided.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .utils.error import PeftNotSupportedError
from .utils.peft_types import registered_methods

_NAMES = frozenset(
    [
        "AdaLoraConfig",
        "AdaLoraModel",
        "AdamssConfig",
        "AdamssModel",
        "AdaptionPromptConfig",
        "AdaptionPromptModel",
        "ArrowConfig",
        "BOFTConfig",
        "BOFTModel",
        "BdLoraConfig",
        "BeftConfig",
        "BeftModel",
        "C3AConfig",
        "C3AModel",
        "CPTConfig",
        "CPTEmbedding",
        "CartridgeConfig",
        "CartridgeEncoder",
        "DeftConfig",
        "DeftModel",
        "DeloraConfig",
        "DeloraModel",
        "EvaConfig",
        "FourierFTConfig",
        "FourierFTModel",
        "FrodConfig",
        "FrodModel",
        "GloraConfig",
        "GloraModel",
        "GraloraConfig",
        "GraloraModel",
        "HRAConfig",
        "HRAModel",
        "HiraConfig",
        "HiraModel",
        "IA3Config",
        "IA3Model",
        "KasaConfig",
        "LNTuningConfig",
        "LNTuningModel",
        "LilyConfig",
        "LilyModel",
        "LoHaConfig",
        "LoHaModel",
        "LoftQConfig",
        "LoraGAConfig",
        "MissConfig",
        "MissModel",
        "MontecloraConfig",
        "MultitaskPromptTuningConfig",
        "MultitaskPromptTuningInit",
        "OFTConfig",
        "OFTModel",
        "OSFConfig",
        "OSFModel",
        "PeanutConfig",
        "PeanutModel",
        "PrefixEncoder",
        "PrefixTuningConfig",
        "PromptEmbedding",
        "PromptEncoder",
        "PromptEncoderConfig",
        "PromptEncoderReparameterizationType",
        "PromptLearningConfig",
        "PromptTuningConfig",
        "PromptTuningInit",
        "PsoftConfig",
        "PsoftModel",
        "PveraConfig",
        "PveraModel",
        "RandLoraConfig",
        "RandLoraModel",
        "RoadConfig",
        "RoadModel",
        "ShadowConfig",
        "ShadowModel",
        "ShiraConfig",
        "ShiraModel",
        "SupertuningConfig",
        "SupertuningModel",
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
        "TinyLoraConfig",
        "TinyLoraModel",
        "TrainableTokensConfig",
        "TrainableTokensModel",
        "UniLoraConfig",
        "UniLoraModel",
        "VeloraConfig",
        "VeraConfig",
        "VeraModel",
        "WaveFTConfig",
        "WaveFTModel",
        "XLoraConfig",
        "XLoraModel",
        "bloom_model_postprocess_past_key_value",
        "compose_cartridge_adapters",
        "create_arrow_model",
        "find_kappa_target_modules",
        "get_eva_state_dict",
        "initialize_kv_prefix_from_past_key_values",
        "initialize_kv_prefix_from_text",
        "initialize_lora_eva_weights",
        "preprocess_loraga",
        "prompt_embeddings_from_past_key_values",
        "replace_lora_weights_loftq",
    ]
)
_OF_HELPERS = frozenset(["DoraCaching", "KappaTuneSelector", "MontecloraTrainerMixin", "find_kappa_target_modules"])
_OF_OPTIMIZERS = frozenset(["create_lorafa_optimizer", "create_riemannian_optimizer"])


@cache
def marker(name: str, module: str = "peft") -> type:
    """The class that stands for a name of a module.

    Raises:
        AttributeError: In the interface the module has no such name.
    """
    if name not in {"peft": _NAMES, "peft.helpers": _OF_HELPERS, "peft.optimizers": _OF_OPTIMIZERS}[module]:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise PeftNotSupportedError(f"{name} is not provided by this package; it provides {', '.join(registered_methods())}.")

    return type(name, (), {"__init__": refuse, "__module__": module, "__doc__": "Not provided by this package."})
