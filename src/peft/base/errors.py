# SPDX-License-Identifier: Apache-2.0
"""Errors and warnings of this package."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class PeftError(Exception):
    """Base class of the errors that this package raises."""


class PeftWarning(UserWarning):
    """Base class of warnings of this package that a program may want to filter."""


class PeftValueError(PeftError, ValueError):
    """A value that a config, method or argument does not allow."""


class NoMatchingPeftModuleError(PeftValueError):
    """The config targets no module of the model."""


class PeftTypeError(PeftError, TypeError):
    """An argument of a wrong type."""


class PeftRuntimeError(PeftError, RuntimeError):
    """An operation that the present state does not allow."""


class PeftNotSupportedError(PeftError, NotImplementedError, ValueError):
    """An argument or operation that the method does not support."""


class UnsupportedModuleError(PeftError, TypeError, ValueError):
    """A targeted module of a kind that the method cannot adapt."""


class CheckpointError(PeftError, RuntimeError, ValueError):
    """A checkpoint that is damaged or does not fit the model or config."""


class CheckpointWriteError(PeftError, OSError):
    """A file that could not be written. The old file, if any, is unchanged."""


class CheckpointNotFoundError(PeftError, FileNotFoundError, ValueError):
    """No checkpoint at the given path or Hub id."""


_PACKAGE = __name__.partition(".")[0]
# Libraries whose frames lie between this package and the caller of a warning: torch calls modules,
# contextlib decorated functions.
_BETWEEN = (_PACKAGE, "torch", "contextlib")


def calling_library() -> str:
    """Return the name of the library that called into this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _library(frame) == _PACKAGE:
        frame = frame.f_back
    return _library(frame)


def _library(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn with the line of the caller: outside this package, torch and contextlib."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _library(frame) in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
