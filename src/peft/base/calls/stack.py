# SPDX-License-Identifier: Apache-2.0
"""Values of a model's call, kept for its layers to read while the call runs.

A model does not pass `adapter_names` or `task_ids` on to its layers. A `CallStack` keeps them while
the call runs, and again while backward recomputes layers (gradient checkpointing). Both end also
after an error: a running call ends with its frame, a restored call when autograd frees its
backward pass. Where a model's method is a generator, it is in progress while an item is made.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

# Calls and restored calls, the innermost last.
_Calls: TypeAlias = list[Any]

_C: Any = torch._C


class _Thread(threading.local):
    """The calls of one thread; several threads may run the model at a time."""

    def __init__(self) -> None:
        self.calls: _Calls = []


class CallStack(Generic[T]):
    """The calls in progress, the innermost last, and those restored for a backward pass."""

    def __init__(self) -> None:
        self._thread = _Thread()

    def __getstate__(self) -> dict[str, object]:
        """A copy starts with no call in progress."""
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self._thread = _Thread()

    @property
    def current(self) -> T | None:
        """The innermost call in progress, or the call whose backward is in progress."""
        calls = self._thread.calls
        if not calls:
            return None
        return _restored_call(calls) if type(calls[-1]) is _Restored else calls[-1]

    @property
    def running(self) -> T | None:
        """The innermost call whose forward is in progress."""
        for call in reversed(self._thread.calls):
            if type(call) is not _Restored:
                return call
        return None

    @contextmanager
    def during(self, call: T) -> Iterator[T]:
        """Context in which a call is in progress."""
        calls = self._thread.calls
        try:
            calls.append(call)
            yield call
        finally:
            _remove(calls, call)

    def run(self, call: T, function: Callable[[], R]) -> R:
        """Run a method as a call, and restore the call when backward reaches the output."""
        recomputes = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        first = _C._autograd._get_sequence_nr() if recomputes else 0
        with self.during(call):
            output = function()
        if recomputes:
            nodes = range(first, _C._autograd._get_sequence_nr())
            hook = _RestoreHook(self, call, nodes)
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(hook)
        return lazily(output, functools.partial(self.run, call))

    def _restore(self, call: T, nodes: range) -> None:
        calls, backward = self._thread.calls, _Backward()
        calls.append(
            _Restored(call, nodes, weakref.ref(backward, functools.partial(_end_restored, calls)))
        )
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(backward)


def run_in(context: Callable[[], AbstractContextManager[object]], function: Callable[[], R]) -> R:
    """Return a function's result, computed in a context; so is each item, if it is an iterator."""
    with context():
        output = function()
    return lazily(output, functools.partial(run_in, context))


def lazily(output: R, run: Callable[[Callable[[], object]], object]) -> R:
    """Return a method's output; if it is an iterator, one that makes each item by `run`."""
    if not isinstance(output, Iterator):
        return output
    return cast(R, _items(output, run))


def _items(
    iterator: Iterator[object], run: Callable[[Callable[[], object]], object]
) -> Iterator[object]:
    end = object()
    try:
        while (item := run(lambda: next(iterator, end))) is not end:
            yield item
    finally:
        if isinstance(iterator, Generator):
            iterator.close()  # its own blocks end with it


class _Backward:
    """A backward pass. Only autograd holds this object, so an error in the pass frees it too."""

    def __call__(self) -> None:
        """Do nothing: the object matters only because autograd frees it."""


@dataclasses.dataclass(eq=False)
class _Restored:
    """A call that is in progress again for as long as a backward pass runs.

    Args:
        nodes: Sequence numbers of the autograd nodes of its forward.
    """

    call: object
    nodes: range
    backward: weakref.ref[_Backward]


def _end_restored(calls: _Calls, backward: weakref.ref[_Backward]) -> None:
    """Remove the call of a backward pass that is over from a stack."""
    for entry in calls:
        if type(entry) is _Restored and entry.backward is backward:
            _remove(calls, entry)
            return


class _RestoreHook:
    """A tensor hook that restores a call."""

    def __init__(self, stack: CallStack[T], call: T, nodes: range) -> None:
        self.stack, self.call, self.nodes = stack, call, nodes

    def __call__(self, gradient: Tensor) -> None:
        self.stack._restore(self.call, self.nodes)


def _restored_call(calls: _Calls) -> Any:
    """Return the innermost restored call that autograd's current node belongs to.

    Nodes that were recorded during recomputation belong to the call that was restored last.
    """
    restored = list(itertools.takewhile(lambda entry: type(entry) is _Restored, reversed(calls)))
    node = _C._current_autograd_node() if len(restored) > 1 else None
    if node is None:
        return restored[0].call
    containing = [entry for entry in restored if node._sequence_nr() in entry.nodes]
    return min(containing, key=lambda entry: len(entry.nodes), default=restored[0]).call


def _remove(calls: _Calls, call: object) -> None:
    """Remove the last occurrence of a call from a stack."""
    for i in range(len(calls) - 1, -1, -1):
        if calls[i] is call:
            del calls[i]
            return


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield all tensors in a model's output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(vars(value))
