# SPDX-License-Identifier: Apache-2.0
"""Optimisers with a learning rate for each role of an adapter's parameters."""

import typing as _typing
from typing import Any as _Any

from ..base.placeholders import placeholder as _placeholder
from .groups import create_optimizer, parameter_groups, trainer_optimizer
from .loraplus import create_loraplus_optimizer

__all__ = ["create_loraplus_optimizer", "create_optimizer", "parameter_groups", "trainer_optimizer"]


# Names of the interface that are not provided here; a class stands for each.
create_lorafa_optimizer: _Any
create_riemannian_optimizer: _Any

if not _typing.TYPE_CHECKING:  # to which any name would be right

    def __getattr__(name: str) -> _Any:
        return _placeholder(name, __name__)
