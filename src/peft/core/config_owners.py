# SPDX-License-Identifier: Apache-2.0
"""The adapters that have a config object, since one object must not be the config of two."""

from __future__ import annotations

from weakref import WeakValueDictionary

from torch import nn

from ..config import PeftConfig

# By the id of the config. An id may be used again, so `has_owner` also compares the objects.
_OWNERS: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


def note_owner(config: PeftConfig, tuner: nn.Module) -> None:
    """Note the tuner whose `peft_config` has a config."""
    _OWNERS[id(config)] = tuner


def has_owner(config: PeftConfig) -> bool:
    """Return whether an adapter of a living model has this very object as its config."""
    tuner = _OWNERS.get(id(config))
    held: dict[str, PeftConfig] = getattr(tuner, "peft_config", {})
    return any(own is config for own in held.values())
