# SPDX-License-Identifier: Apache-2.0
"""What travels beside a call of a model, because the model does not hand it down to its layers.

A `CallStack` holds it while the call runs, and puts it back while backward runs layers again
(gradient checkpointing). Either ends with what it was for, be that an error: a call is held by the
frame that runs it, a call put back by autograd's own record of the backward pass, which autograd
drops when that pass is over.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class _Thread(threading.local):
    """The calls of one thread: several may run the model at a time."""

    def __init__(self) -> None:
        self.calls: list[Any] = []


class CallStack(Generic[T]):
    """The calls in progress, the innermost last, and those that backward has put back."""

    def __init__(self) -> None:
        self._thread = _Thread()

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with no call in progress."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._thread = _Thread()

    @property
    def current(self) -> T | None:
        """The innermost call in progress, or the one whose backward is."""
        calls = self._thread.calls
        if not calls:
            return None
        return _whose_turn(calls) if type(calls[-1]) is _PutBack else calls[-1]

    @property
    def running(self) -> T | None:
        """The innermost call whose forward is in progress."""
        for call in reversed(self._thread.calls):
            if type(call) is not _PutBack:
                return call
        return None

    @contextmanager
    def during(self, call: T) -> Iterator[T]:
        """A call in progress while the context is open."""
        calls = self._thread.calls
        try:
            calls.append(call)
            yield call
        finally:
            _remove(calls, call)

    def run(self, call: T, function: Callable[[], Any]) -> Any:
        """Run a forward as a call, which is put back when backward reaches the output, should it
        run layers again: those come after it.
        """
        replays = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        first = torch._C._autograd._get_sequence_nr() if replays else 0  # type: ignore[attr-defined]
        with self.during(call):
            output = function()
        if replays:
            replay = _Replay(self, call, range(first, torch._C._autograd._get_sequence_nr()))  # type: ignore[attr-defined]
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(replay)
        return output

    def _put_back(self, call: T, nodes: range) -> None:
        calls, backward = self._thread.calls, _Backward()
        calls.append(
            _PutBack(call, nodes, weakref.ref(backward, functools.partial(_take_off, calls)))
        )
        torch.autograd.Variable._execution_engine.queue_callback(backward)  # type: ignore[attr-defined]


class _Backward:
    """A backward pass. Autograd alone holds this object, among what it will call when the pass is
    over; so it is gone when the pass is, also when that ends in an error and nothing is called.
    """

    def __call__(self) -> None:
        """There is nothing to do but to be let go."""


@dataclasses.dataclass(eq=False)
class _PutBack:
    """A call that has been put back for as long as a backward pass goes on.

    Args:
        call: The call.
        nodes: Numbers of the steps that autograd noted in its forward.
        backward: The pass.
    """

    call: Any
    nodes: range
    backward: weakref.ref[_Backward]


def _take_off(calls: list[Any], backward: weakref.ref[_Backward]) -> None:
    """Take a call off a stack whose backward pass is over."""
    for entry in calls:
        if type(entry) is _PutBack and entry.backward is backward:
            _remove(calls, entry)
            return


class _Replay:
    """A tensor hook that puts a call back."""

    def __init__(self, stack: CallStack, call: Any, nodes: range) -> None:
        self.stack, self.call, self.nodes = stack, call, nodes

    def __call__(self, gradient: Tensor) -> None:
        self.stack._put_back(self.call, self.nodes)


def _whose_turn(calls: list[Any]) -> Any:
    """Of the calls at a stack's end that backward has put back, the one that the step it is at
    belongs to: calls can lie in one another. Steps that were noted while layers ran again belong to
    the one that was put back last.
    """
    put_back = list(itertools.takewhile(lambda entry: type(entry) is _PutBack, reversed(calls)))
    node = torch._C._current_autograd_node() if len(put_back) > 1 else None  # type: ignore[attr-defined]
    own = (
        [] if node is None else [entry for entry in put_back if node._sequence_nr() in entry.nodes]
    )
    return min(own, key=lambda entry: len(entry.nodes), default=put_back[0]).call


def _remove(calls: list[Any], call: Any) -> None:
    """Take a call out of a stack, wherever in it it is."""
    for i in range(len(calls) - 1, -1, -1):
        if calls[i] is call:
            del calls[i]
            return


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a model's output."""
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
