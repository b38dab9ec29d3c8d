# SPDX-License-Identifier: Apache-2.0
"""The calls of a model that are running in all threads, and changes of its adapters, which wait.

Changes come one after the other. A change says which adapters it touches. It waits until the calls
of other threads that use these have ended, and calls that begin meanwhile and use them wait for its
end. All other calls go on. A call takes no lock: it notes itself before it looks for a change, and
a change announces itself before it looks for calls, so one of the two sees the other.

A call inside another one is told apart: a change may touch it alone.

A call of a compiled model, or one that bypasses the model's `forward` and `generate`, is not seen,
unless its caller notes it by `RunningCalls.during`.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import TIMEOUT_MAX, Condition, RLock, get_ident
from time import monotonic
from typing import Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from ..errors import PeftRuntimeError

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound="_Changeable")


class _Change(NamedTuple):
    """A change in progress: the adapters that it touches, None for all; true `active` if it touches
    calls that name none; and its thread.
    """

    adapters: Collection[str] | None
    active: bool
    thread: int

    def touches(self, names: object) -> bool:
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

    def __init__(self, patience: float = 60.0) -> None:
        self.patience = patience
        # By thread, `adapter_names` of its calls, the outermost first.
        self._calls: dict[int, list[object]] = {}
        self._change: _Change | None = None
        self._one_change = RLock()
        self._ended = Condition()  # notified when calls or the change have ended
        _instances.add(self)

    @classmethod
    def of(cls, base: nn.Module) -> RunningCalls:
        """Return those of a base model, which all models with adapters around it share."""
        return _by_base.setdefault(base, cls())

    def __reduce__(self) -> tuple[object, ...]:
        """A copy starts with no call in progress."""
        return RunningCalls, (self.patience,)

    def during(self, names: object) -> AbstractContextManager[None]:
        """Return a context for a call with such `adapter_names`, None for the active adapters."""
        return nullcontext() if torch.compiler.is_compiling() else _Call(self, names)

    @contextmanager
    def change(
        self, adapters: Collection[str] | None, active: bool = False, patience: float | None = None
    ) -> Iterator[None]:
        """Context for a change of the model.

        Args:
            adapters: The adapters that it touches, None for all. The others stay as they are.
            active: True if it touches calls that name no adapters.
            patience: In place of the model's.

        Raises:
            PeftRuntimeError: A call of another thread that uses these did not end in time; nothing
                has begun.
        """
        with self._one_change:
            outer = self._change
            if outer is not None:  # this change is part of one
                if adapters is None or outer.adapters is None:
                    adapters = None
                else:
                    adapters = (*adapters, *outer.adapters)
                active = active or outer.active
            self._change = _Change(adapters, active, get_ident())
            try:
                self._wait_for_calls(self._change, self.patience if patience is None else patience)
                yield
            finally:
                self._change = outer
                with self._ended:
                    self._ended.notify_all()

    def _wait_for_calls(self, change: _Change, patience: float) -> None:
        """Wait until no other thread runs a call that a change touches."""
        end = monotonic() + patience
        while busy := self._in_the_way(change):
            left = end - monotonic()
            if left <= 0:
                raise PeftRuntimeError(
                    f"{len(busy)} running calls of other threads use {_described(busy)}, and did "
                    f"not end within {patience:g} seconds; nothing was changed. Change the model "
                    "when they have ended."
                )
            with self._ended:
                if self._in_the_way(change):
                    self._ended.wait(min(left, TIMEOUT_MAX))

    def _in_the_way(self, change: _Change) -> list[object]:
        """Return `adapter_names` of the other threads' calls that a change touches."""
        return [
            names
            for thread, calls in self._calls.copy().items()
            for names in calls.copy()
            if thread != change.thread and change.touches(names)
        ]

    def _wait_for_change(self, thread: int, calls: list[object]) -> None:
        """Wait until no change of another thread touches a thread's innermost call, which is about
        to begin.
        """
        while (change := self._change) is not None and change.thread != thread:
            *outer, names = calls
            # A change that touches the calls around this one waits for them, and so for this one.
            if not change.touches(names) or any(map(change.touches, outer)):
                return
            calls.pop()
            with self._ended:
                self._ended.notify_all()
                if self._change is change:
                    self._ended.wait()
            calls.append(names)

    def _keep_own_thread(self) -> None:
        """Forget the calls and changes of threads that a forked process does not have."""
        thread = get_ident()
        self._calls = {key: calls for key, calls in self._calls.items() if key == thread}
        if self._change is None or self._change.thread != thread:
            self._change, self._one_change = None, RLock()
        self._ended = Condition()


_instances: WeakSet[RunningCalls] = WeakSet()
_by_base: WeakKeyDictionary[nn.Module, RunningCalls] = WeakKeyDictionary()


def _keep_own_threads() -> None:
    for running in _instances:
        running._keep_own_thread()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_own_threads)


def _described(calls: Sequence[object]) -> str:
    """Return the adapters that some calls use, by their `adapter_names`."""
    lists = [names for names in calls if isinstance(names, (list, tuple))]
    used = sorted({str(name) for names in lists for name in names})[:8]
    return ", ".join(used if len(lists) == len(calls) else [*used, "the active adapters"])


class _Call(AbstractContextManager):
    """A call in progress."""

    __slots__ = ("names", "running", "thread")

    def __init__(self, running: RunningCalls, names: object) -> None:
        self.running, self.names = running, names

    def __enter__(self) -> None:
        running, self.thread = self.running, get_ident()
        calls = running._calls.setdefault(self.thread, [])
        calls.append(self.names)
        if running._change is not None:
            running._wait_for_change(self.thread, calls)

    def __exit__(self, *error: object) -> None:
        running = self.running
        calls = running._calls[self.thread]
        calls.pop()
        if not calls:
            del running._calls[self.thread]
        if running._change is not None:
            with running._ended:
                running._ended.notify_all()


@contextmanager
def changing(
    model: object, adapters: Collection[str] | None = (), patience: float | None = None
) -> Iterator[None]:
    """Context for a change of some adapters of a model, None for all; see `RunningCalls`. A model's
    first adapter becomes the active one.

    In a model without a tuner, which adapters were injected into, no calls are noted.
    """
    tuner = getattr(model, "_modules", {}).get("base_model", model)
    running = getattr(tuner, "__dict__", {}).get("running_calls")
    if not isinstance(running, RunningCalls):
        yield
        return
    with running.change(()):  # no other change meanwhile, so the active adapters stay
        names = tuner.active_adapters or adapters or ()
        active = adapters is None or any(name in names for name in adapters)
        with running.change(adapters, active, patience):
            yield


class _Changeable(Protocol):
    """A model whose calls are noted."""

    running_calls: RunningCalls


def changes_all(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Make a method of a tuner a change of all adapters."""

    @functools.wraps(method)
    def change(self: M, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.running_calls.change(None):
            return method(self, *args, **kwargs)

    return change


def holds(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function one whose argument `model` no other thread changes meanwhile."""
    place = list(inspect.signature(function).parameters).index("model")

    @functools.wraps(function)
    def hold(*args: P.args, **kwargs: P.kwargs) -> R:
        with changing(kwargs.get("model", args[place] if place < len(args) else None)):
            return function(*args, **kwargs)

    return hold
