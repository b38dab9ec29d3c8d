# SPDX-License-Identifier: Apache-2.0
"""The calls of a model that are running in all threads, and changes of its adapters, which wait.

Changes come one after the other. A change says which adapters it touches. It waits until the calls
of other threads that use these have ended, and calls that begin meanwhile and use them wait for its
end. All other calls go on. A call takes no lock: it notes itself before it looks for a change, and
a change announces itself before it looks for calls, so one of the two sees the other.

A call of a compiled model, or one that bypasses the model's `forward` and `generate`, is not seen.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Condition, RLock, get_ident
from time import monotonic
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch

from ..errors import PeftRuntimeError

P = ParamSpec("P")
R = TypeVar("R")


class _Change(NamedTuple):
    """A change in progress: the adapters that it touches, None for all; true `active` if it touches
    calls that name none; and its thread.
    """

    adapters: Collection[str] | None
    active: bool
    thread: int

    def touches(self, names: Any) -> bool:
        """Return whether it touches a call with such `adapter_names`."""
        if self.adapters is None:
            return True
        if isinstance(names, (list, tuple)):
            return any(isinstance(name, str) and name in self.adapters for name in names)
        return self.active


class RunningCalls:
    """The running calls of one model, and its change in progress.

    Attributes:
        patience: Seconds that a change waits for calls of other threads before it is refused.
    """

    patience: float = 60.0

    def __init__(self) -> None:
        # By thread, `adapter_names` of its calls, the outermost first.
        self._calls: dict[int, list[Any]] = {}
        self._change: _Change | None = None
        self._one_change = RLock()
        self._ended = Condition()  # notified when calls or the change have ended

    def __reduce__(self) -> tuple[object, ...]:
        """A copy starts with no call in progress."""
        return RunningCalls, ()

    def during(self, names: object) -> AbstractContextManager[None]:
        """Return a context for a call with such `adapter_names`, None for the active adapters."""
        return nullcontext() if torch.compiler.is_compiling() else _Call(self, names)

    @contextmanager
    def change(self, adapters: Collection[str] | None, active: bool = False) -> Iterator[None]:
        """Context for a change of the model.

        Args:
            adapters: The adapters that it touches, None for all. The others stay as they are.
            active: True if it touches calls that name no adapters.

        Raises:
            PeftRuntimeError: A call of another thread that uses these did not end in time; nothing
                has begun.
        """
        with self._one_change:
            outer, thread = self._change, get_ident()
            if outer is not None:  # this change is part of one
                if adapters is None or outer.adapters is None:
                    adapters = None
                else:
                    adapters = (*adapters, *outer.adapters)
                active = active or outer.active
            self._change = _Change(adapters, active, thread)
            try:
                self._wait_for_calls(self._change)
                yield
            finally:
                self._change = outer
                with self._ended:
                    self._ended.notify_all()

    def _wait_for_calls(self, change: _Change) -> None:
        """Wait until no other thread runs a call that a change touches."""
        end = monotonic() + self.patience
        while busy := self._in_the_way(change):
            left = end - monotonic()
            if left <= 0:
                used = sorted({str(name) for names in busy for name in names or ()})
                raise PeftRuntimeError(
                    f"{len(busy)} running calls of other threads use "
                    f"{', '.join(used[:8]) or 'the active adapters'}, and did not end within "
                    f"{self.patience:g} seconds; nothing was changed. Change the model when they "
                    "have ended."
                )
            with self._ended:
                if self._in_the_way(change):
                    self._ended.wait(left)

    def _in_the_way(self, change: _Change) -> list[Any]:
        """Return `adapter_names` of the other threads' calls that a change touches."""
        found = [
            (thread, names)
            for thread, calls in list(self._calls.items())
            for names in list(calls)
            if thread != change.thread and change.touches(names)
        ]
        # A process that was forked has noted calls of threads that it does not have.
        threads = sys._current_frames() if found else {}
        return [names for thread, names in found if thread in threads]

    def _wait_for_change(self, thread: int, names: object) -> None:
        """Wait until no change of another thread touches a call that is about to begin."""
        while (change := self._change) is not None and change.thread != thread:
            if not change.touches(names):
                return
            calls = self._calls.pop(thread)
            with self._ended:
                self._ended.notify_all()
                if self._change is change:
                    self._ended.wait()
            self._calls[thread] = calls


class _Call(AbstractContextManager):
    """A call in progress."""

    __slots__ = ("names", "running", "thread")

    def __init__(self, running: RunningCalls, names: object) -> None:
        self.running, self.names = running, names

    def __enter__(self) -> None:
        running, self.thread = self.running, get_ident()
        calls = running._calls.get(self.thread)
        if calls is not None:  # inside another call
            calls.append(self.names)
            return
        running._calls[self.thread] = [self.names]
        if running._change is not None:
            running._wait_for_change(self.thread, self.names)

    def __exit__(self, *error: object) -> None:
        running = self.running
        calls = running._calls[self.thread]
        calls.pop()
        if not calls:
            del running._calls[self.thread]
            if running._change is not None:
                with running._ended:
                    running._ended.notify_all()


def changing(model: object, adapters: Collection[str] | None = ()) -> AbstractContextManager[None]:
    """Return a context for a change of some adapters of a model, None for all; see `RunningCalls`.

    In a model without a tuner, which adapters were injected into, no calls are noted.
    """
    tuner: Any = getattr(model, "_modules", {}).get("base_model", model)
    running = vars(tuner).get("running_calls")
    if not isinstance(running, RunningCalls):
        return nullcontext()
    active = adapters is None or any(name in tuner.active_adapters for name in adapters)
    return running.change(adapters, active)


def changes_all(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Make a method of a tuner a change of all adapters."""

    @functools.wraps(method)
    def change(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.running_calls.change(None):
            return method(self, *args, **kwargs)

    return change
