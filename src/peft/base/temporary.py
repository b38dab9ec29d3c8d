# SPDX-License-Identifier: Apache-2.0
"""Values that contexts change for their time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import RLock
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Change(Generic[T]):
    """A change of a value by one context, and the value to restore."""

    key: object
    before: T
    change: Callable[[T], T]


class TemporaryValues(Generic[T]):
    """Values that contexts change for their time, restored in whatever order these end.

    Contexts of several threads or coroutines are not nested: the first to begin may end first. The
    others then go on with their own changes, and the last restores what the first one found.

    Attributes:
        lock: Held while a change begins or ends; a caller may hold it for longer.

    Example:
        >>> scales = TemporaryValues()
        >>> first = scales.begin("scale", 1.0, lambda scale: 2 * scale)  # 2 from now on
        >>> second = scales.begin("scale", 2.0, lambda scale: 5 * scale)  # 10 from now on
        >>> scales.end(first), scales.end(second)
        (5.0, 1.0)
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self._open: dict[object, list[Change[T]]] = {}

    def begin(self, key: object, value: T, change: Callable[[T], T]) -> Change[T]:
        """Note a change of the value that a key has now."""
        begun = Change(key, value, change)
        with self.lock:
            self._open.setdefault(key, []).append(begun)
        return begun

    def is_changed(self, key: object) -> bool:
        """Return whether a context has changed the value of a key."""
        return key in self._open

    def end(self, ended: Change[T]) -> T:
        """Take a change off; return the value that its key has from now on."""
        with self.lock:
            every = self._open[ended.key]
            place, value = every.index(ended), ended.before
            for later in every[place + 1 :]:
                later.before, value = value, later.change(value)
            del every[place]
            if not every:
                del self._open[ended.key]
            return value
