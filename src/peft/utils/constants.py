# SPDX-License-Identifier: Apache-2.0
"""Constants, and the default target modules of each method, at their documented place."""

import re
from functools import cache as _cache
from typing import Any as _Any

from ..base.constants import *  # noqa: F403
from ..base.placeholders import placeholder as _placeholder
from ..base.registry import PEFT_TYPE_TO_TUNER_MAPPING as _TUNERS
from ..base.registry import PeftType as _PeftType

# Names of the interface that this package does not implement, as placeholders.
MIN_TARGET_MODULES_FOR_OPTIMIZATION: type
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING: type
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: type
bloom_model_postprocess_past_key_value: type
starcoder_model_postprocess_past_key_value: type

# Some tables are named without the underscore of their method.
_METHODS = {*_PeftType.__members__, *(name.replace("_", "") for name in _PeftType.__members__)}
_TABLE = re.compile(r"TRANSFORMERS_MODELS_TO_(\w+)_TARGET_MODULES_MAPPING")


def __getattr__(name: str) -> _Any:
    """Return `TRANSFORMERS_MODELS_TO_<METHOD>_TARGET_MODULES_MAPPING`, a method's default target
    modules by model type. Entries that are added to it take effect. The tables of methods that this
    package lacks are empty.
    """
    table = _TABLE.fullmatch(name)
    if table is None or not (table[1] in _TUNERS or table[1] in _METHODS):
        return _placeholder(name, __name__)
    return _own_defaults(table[1])


@_cache
def _own_defaults(method: str) -> dict[str, list[str] | str]:
    """Give a method its own copy of the default target modules."""
    tuner: _Any = _TUNERS.get(method)
    if tuner is None:
        return {}
    entries = tuner.default_target_modules.items()
    tuner.default_target_modules = {
        kind: names if isinstance(names, str) else list(names) for kind, names in entries
    }
    return tuner.default_target_modules
