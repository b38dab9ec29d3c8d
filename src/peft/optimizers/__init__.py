# SPDX-License-Identifier: Apache-2.0
"""Optimisers with a learning rate for each role of an adapter's parameters."""

from typing import Any as _Any

from ..utils.markers import marker as _marker
from .groups import create_optimizer, parameter_groups, trainer_optimizer
from .loraplus import create_loraplus_optimizer

__all__ = ["create_loraplus_optimizer", "create_optimizer", "parameter_groups", "trainer_optimizer"]


def __getattr__(name: str) -> _Any:
    """Names of the interface that are not provided here."""
    return _marker(name, __name__)
