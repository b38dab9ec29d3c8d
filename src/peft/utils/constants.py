# SPDX-License-Identifier: Apache-2.0
"""Constants, and the default target modules of each method, at their documented place."""

import re
from functools import cache as _cache
from typing import Any as _Any

from ..base.constants import *  # noqa: F403
from ..base.placeholders import placeholder as _placeholder
from ..base.registry import PEFT_TYPE_TO_TUNER_MAPPING as _TUNERS

MIN_TARGET_MODULES_FOR_OPTIMIZATION: type  # a placeholder
_TABLE = re.compile(r"TRANSFORMERS_MODELS_TO_(\w+)_TARGET_MODULES_MAPPING")


def __getattr__(name: str) -> _Any:
    """Return `TRANSFORMERS_MODELS_TO_<METHOD>_TARGET_MODULES_MAPPING`, a method's default target
    modules by model type. Entries that are added to it take effect.
    """
    table = _TABLE.fullmatch(name)
    if table is None or table[1] not in _TUNERS:
        return _placeholder(name, __name__)
    return _own_defaults(_TUNERS[table[1]])


@_cache
def _own_defaults(tuner: _Any) -> dict[str, list[str] | str]:
    """Give a method its own copy of the default target modules."""
    entries = tuner.default_target_modules.items()
    tuner.default_target_modules = {
        kind: names if isinstance(names, str) else list(names) for kind, names in entries
    }
    return tuner.default_target_modules
