# SPDX-License-Identifier: Apache-2.0
"""Names of methods and tasks and the registry of methods, at their documented place."""

from ..base.registry import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PeftType,
    TaskType,
    register_peft_method,
)

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PeftType", "TaskType",
    "register_peft_method",
]  # fmt: skip
