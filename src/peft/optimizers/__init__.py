# SPDX-License-Identifier: Apache-2.0
"""Optimizers with a learning rate for each role of an adapter's parameters."""

import typing as _typing

from ..base.placeholders import placeholders as _placeholders
from .groups import create_optimizer, parameter_groups, trainer_optimizer
from .loraplus import create_loraplus_optimizer

__all__ = ["create_loraplus_optimizer", "create_optimizer", "parameter_groups", "trainer_optimizer"]


# Names of the interface that this package does not implement; each is a placeholder.
create_lorafa_optimizer: type
create_riemannian_optimizer: type

if not _typing.TYPE_CHECKING:  # a type checker would take any name for one that exists
    __getattr__ = _placeholders(__name__)
