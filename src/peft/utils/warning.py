# SPDX-License-Identifier: Apache-2.0
"""Warnings that name the caller's line, however deep in this package they arise."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

from .error import PeftWarning

__all__ = ["PeftWarning", "warn"]

_PACKAGE = __name__.partition(".")[0]
# Libraries whose frames are not the caller's: torch calls modules, and context managers decorate functions.
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
