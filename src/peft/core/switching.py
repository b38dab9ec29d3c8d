# SPDX-License-Identifier: Apache-2.0
"""Checks before the adapters of a model are switched, a context without them, and the removal of
one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeAlias

from torch import nn

from ..base.calls.running import changing
from ..base.errors import PeftTypeError, PeftValueError, warn
from ..base.temporary import Change, TemporaryValues
from ..base.validation import check_adapter
from ..integrations.distributed import take_back
from .adapters import AdapterParameterDict
from .auxiliary import AuxiliaryTrainingWrapper
from .layer import BaseTunerLayer

Part: TypeAlias = BaseTunerLayer | AuxiliaryTrainingWrapper
"""A module that has an entry for each of several adapters."""

Shared = Collection[AdapterParameterDict]
"""The containers of parameters that all layers share."""


class _Switchable(Protocol):
    """A tuner, whose adapters can be switched off."""

    def tuner_layers(self) -> Iterable[BaseTunerLayer]: ...

    def enable_adapter_layers(self) -> None: ...

    def disable_adapter_layers(self) -> None: ...


# Whether a tuner's adapters are switched on.
_ENABLED: TemporaryValues[bool] = TemporaryValues()


@contextmanager
def without_adapters(tuner: _Switchable) -> Iterator[None]:
    """Context in which a model runs without adapters; see `PeftModel.disable_adapter`."""
    disabled = _disabled(tuner)
    try:
        yield
    finally:
        with changing(tuner, None, patience=math.inf):  # the adapters must not stay off
            if _ENABLED.end(disabled):
                tuner.enable_adapter_layers()


def _disabled(tuner: _Switchable) -> Change[bool]:
    """Switch the adapters off, unless they are, and note it."""

    def states() -> set[bool]:
        return {layer.disable_adapters for layer in tuner.tuner_layers()}

    with _ENABLED.lock:  # nothing changes: inside a call it need not wait for changes of others
        if _ENABLED.is_changed(tuner) and states() == {True}:
            return _ENABLED.begin(tuner, False, _off)
    with changing(tuner):
        found = states()
        if len(found) > 1:
            warn(
                "The model contains some adapter layers that are enabled and others that are "
                "disabled. All of them will be enabled at the end of the `disable_adapter` context."
            )
        if found != {True}:
            tuner.disable_adapter_layers()
        return _ENABLED.begin(tuner, found != {True}, _off)


def _off(_: bool) -> bool:
    return False


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
