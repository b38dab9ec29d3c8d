# SPDX-License-Identifier: Apache-2.0
"""Warnings that name the caller's line, however deep in this package they arise."""

from __future__ import annotations

import sys
import warnings

from .error import PeftWarning

__all__ = ["PeftWarning", "warn"]

_PACKAGE = __name__.partition(".")[0]


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of the line outside this package that led here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
