# SPDX-License-Identifier: Apache-2.0
"""Names of the PEFT interface that this package does not provide.

Client libraries import them at their own import and ask `isinstance(config, PrefixTuningConfig)`. They get a class that nothing is
an instance of; making one raises an error that says what is provided.
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
        "AutoPeftModel",
        "BOFTConfig",
        "BOFTModel",
        "BdLoraConfig",
        "BeftConfig",
        "BeftModel",
        "C3AConfig",
        "C3AModel",
        "CPTConfig",
        "CartridgeConfig",
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
        "LoraConfig",
        "LoraGAConfig",
        "LoraModel",
        "LoraRuntimeConfig",
        "MissConfig",
        "MissModel",
        "MontecloraConfig",
        "MultitaskPromptTuningConfig",
        "OFTConfig",
        "OFTModel",
        "OSFConfig",
        "OSFModel",
        "PeanutConfig",
        "PeanutModel",
        "PrefixTuningConfig",
        "PromptEncoderConfig",
        "PromptLearningConfig",
        "PromptTuningConfig",
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
    ]
)


@cache
def marker(name: str) -> type:
    """The class that stands for a name.

    Raises:
        AttributeError: The interface has no such name.
    """
    if name not in _NAMES:
        raise AttributeError(f"module 'peft' has no attribute {name!r}")

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise PeftNotSupportedError(f"{name} is not provided by this package; it provides {', '.join(registered_methods())}.")

    return type(name, (), {"__init__": refuse, "__module__": "peft", "__doc__": "Not provided by this package."})
