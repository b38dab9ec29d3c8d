# SPDX-License-Identifier: Apache-2.0
"""Constants, at their documented place."""

from typing import Any as _Any

from ..base import constants as _constants
from ..base.constants import *  # noqa: F403


def __getattr__(name: str) -> _Any:
    """Return a method's table of default target modules, or a placeholder."""
    return getattr(_constants, name)
