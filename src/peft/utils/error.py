# SPDX-License-Identifier: Apache-2.0
"""Errors and warnings of the package, at their documented place."""

from ..base.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    NoMatchingPeftModuleError,
    PeftError,
    PeftNotSupportedError,
    PeftRuntimeError,
    PeftTypeError,
    PeftValueError,
    PeftWarning,
    UnsupportedModuleError,
)

__all__ = [
    "CheckpointError", "CheckpointNotFoundError", "CheckpointWriteError",
    "NoMatchingPeftModuleError", "PeftError", "PeftNotSupportedError", "PeftRuntimeError",
    "PeftTypeError", "PeftValueError", "PeftWarning", "UnsupportedModuleError",
]  # fmt: skip
