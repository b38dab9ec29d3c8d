# SPDX-License-Identifier: Apache-2.0
"""Errors and warnings of this package, and how it warns of the caller's line."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class PeftError(Exception):
    """Base of every error raised on purpose by this package."""


class PeftWarning(UserWarning):
    """Base of the warnings of this package that a program may want to filter."""


class PeftValueError(PeftError, ValueError):
    """A value is outside what a config, method or argument allows."""


class NoMatchingPeftModuleError(PeftValueError):
    """No module of the model is one that the config targets."""


class PeftTypeError(PeftError, TypeError):
    """An argument has a type that cannot be used."""


class PeftRuntimeError(PeftError, RuntimeError):
    """An operation is not possible in the present state."""


class PeftNotSupportedError(PeftError, NotImplementedError, ValueError):
    """An argument or operation that this method cannot honour."""


class UnsupportedModuleError(PeftError, TypeError, ValueError):
    """A targeted module is of a kind the method cannot adapt."""


class CheckpointError(PeftError, RuntimeError, ValueError):
    """A checkpoint is damaged, or does not fit the model or the config."""


class CheckpointNotFoundError(PeftError, FileNotFoundError, ValueError):
    """There is no checkpoint at the place given."""


_PACKAGE = __name__.partition(".")[0]
# Libraries whose frames are not the caller's: torch calls modules, and context managers decorate
# functions.
_BETWEEN = (_PACKAGE, "torch", "contextlib")


def calling_library() -> str:
    """Return the name of the library whose code called into this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _library(frame) == _PACKAGE:
        frame = frame.f_back
    return _library(frame)


def _library(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of the line that led here: outside this package and what calls it for others."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _library(frame) in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
