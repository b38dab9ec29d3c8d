# SPDX-License-Identifier: Apache-2.0
"""Checks before the adapters of a model are switched, and the removal of one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TypeAlias

from torch import nn

from ..base.errors import PeftTypeError, PeftValueError, warn
from ..base.validation import check_adapter
from ..integrations.distributed import take_back
from .adapters import AdapterParameterDict
from .auxiliary import AuxiliaryTrainingWrapper
from .layer import BaseTunerLayer

Part: TypeAlias = BaseTunerLayer | AuxiliaryTrainingWrapper
"""A module that has an entry for each of several adapters."""

Shared = Collection[AdapterParameterDict]
"""The containers of parameters that all layers share."""


def to_change(model: nn.Module, parts: Iterable[Part]) -> list[Part]:
    """Return parts of a model, after FSDP2 has taken back copies of their parameters, in which a
    change would be lost.
    """
    take_back(model)
    return list(parts)


def check_deletable(parts: Sequence[Part], adapter_name: str, adapters: Collection[str]) -> None:
    """Check that an adapter, named by a string, exists and is not merged."""
    if not isinstance(adapter_name, str):
        raise PeftTypeError(
            f"`adapter_name`={adapter_name!r} must be one adapter's name; delete several one by "
            "one."
        )
    check_adapter(adapter_name, adapters, "does not exist")
    if any(isinstance(p, BaseTunerLayer) and adapter_name in p.merged_adapters for p in parts):
        raise PeftValueError(
            f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please unmerge "
            "them first."
        )


def check_can_be_active(parts: Sequence[Part], adapter_names: Sequence[str]) -> None:
    """Raise `PeftValueError` if several adapters train a copy of the same module."""
    for part in parts:
        if isinstance(part, AuxiliaryTrainingWrapper):
            part.check_one_of(adapter_names)


def is_merged(parts: Sequence[Part]) -> bool:
    """Return whether an adapter is merged, or was until adapters were switched off."""
    layers = [part for part in parts if isinstance(part, BaseTunerLayer)]
    return any(layer.merged or layer._merges.suspended(layer) for layer in layers)


def delete(parts: Sequence[Part], shared: Shared, adapter_name: str) -> None:
    """Remove an adapter's entries from parts, and then from the containers that layers share."""
    for part in parts:
        part.delete_adapter(adapter_name)
    for container in shared:
        if adapter_name in container:
            del container[adapter_name]


def left_active(active: Sequence[str], deleted: str, adapters: Collection[str]) -> str | list[str]:
    """Return the adapters to make active after one of the active ones was deleted: the others, or
    the first by name.
    """
    left = [name for name in active if name != deleted]
    if not left and adapters:
        left = [min(adapters)]
        warn(
            f"Adapter {deleted} was active which is now deleted. Setting active adapter to "
            f"{left[0]}."
        )
    return left[0] if len(left) == 1 else left
