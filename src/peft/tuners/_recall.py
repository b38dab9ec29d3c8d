# SPDX-License-Identifier: Apache-2.0
"""`Recall`: what inference computes from an adapter's tensors alone, kept for as long as they hold the same numbers.

Parameters change in ways that leave no trace: `p.data.copy_(…)` counts no version, engines write to flat memory in which parameters
lie. So the numbers themselves decide: what was read is copied, and compared before a result is used again. Inside one call of a
model, or of `generate`, a tensor that was compared once counts as the same unless torch has noted a change.

Comparing takes a small part of the time that is saved where the tensors are in the host's memory. Elsewhere it would wait for the
device; there results are kept inside a call of `generate` only.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._eager import is_eager

T = TypeVar("T")


class Call:
    """A call in which parameters change by torch's operations if at all.

    Args:
        runs_often: Whether it runs the model many times.

    Attributes:
        used: The results used in it, and kept.
    """

    def __init__(self, runs_often: bool) -> None:
        self.runs_often = runs_often
        self.used: dict[_Result, None] = {}


class _Thread(threading.local):
    def __init__(self) -> None:
        self.call: Call | None = None


_THREAD = _Thread()


def during_call(model: nn.Module, runs_often: bool = False) -> AbstractContextManager[None]:
    """A call of a model in progress while the context is open; one inside another is part of that."""
    if torch.compiler.is_compiling() or _THREAD.call is not None:
        return nullcontext()
    return _During(model, runs_often)


def is_running_often() -> bool:
    """Whether the call in progress runs the model many times."""
    return _THREAD.call is not None and _THREAD.call.runs_often


class _During(AbstractContextManager):
    """What the model's last call used is looked at first, all in a row: between layers, which fill the processor's caches with
    weights, the same takes several times as long.
    """

    def __init__(self, model: nn.Module, runs_often: bool) -> None:
        self.model, self.call = model, Call(runs_often)

    def __enter__(self) -> None:
        _THREAD.call = self.call
        if not torch.is_grad_enabled() and is_eager():
            for result in _USED.get(self.model, ()):
                if (known := result()) is not None and known.is_there():
                    known.look(self.call)

    def __exit__(self, *error: Any) -> None:
        _THREAD.call = None
        if self.call.used:
            _USED[self.model] = [weakref.ref(result) for result in self.call.used]


class _Watch:
    """The numbers a tensor had when it was last looked at."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        self.copy: Tensor | None = None
        self.call: Call | None = None
        self.noted: tuple[int, int] = (-1, -1)
        self.token = object()

    def look(self, tensor: Tensor) -> object:
        """What stays the same object for as long as the tensor has the same numbers."""
        call, noted = _THREAD.call, (tensor._version, tensor.data_ptr())
        if call is None or call is not self.call or noted != self.noted:
            if self.copy is None or not _same(self.copy, tensor):
                self.copy = tensor.detach().clone() if tensor.device.type == "cpu" and tensor.numel() <= Recall.largest else None
                self.token = object()
            self.call, self.noted = call, noted
        return self.token


# One for each tensor, for as long as a result depends on it: a bank is shared by many layers.
_WATCHES: weakref.WeakValueDictionary[int, _Watch] = weakref.WeakValueDictionary()


class _Result:
    """A result, and what its sources were when it was made."""

    def __init__(self, sources: tuple[Tensor, ...]) -> None:
        self.sources = sources
        self.watches = [_watch(source) for source in sources]
        self.tokens: list[object] = []
        self.call: Call | None = None
        self.noted: list[tuple[int, int]] = []
        self.value: Any = None

    def is_there(self) -> bool:
        """Whether the sources have memory: engines that shard parameters take it from them between calls."""
        return all(source.untyped_storage().nbytes() for source in self.sources)

    def look(self, call: Call | None, make: Callable[[], Any] | None = None) -> None:
        """See whether the sources have the same numbers as then; if not, make the result anew where it is said how."""
        looks = [watch.look(source) for watch, source in zip(self.watches, self.sources, strict=True)]
        if looks != self.tokens:
            self.call = None
            if make is None:
                return
            self.value, self.tokens = make(), looks
        self.call, self.noted = call, [watch.noted for watch in self.watches]

    def is_of(self, sources: tuple[Tensor, ...], call: Call | None) -> bool:
        """Whether this call has looked already, and torch has noted no change since."""
        if call is None or call is not self.call:
            return False
        for source, own, noted in zip(sources, self.sources, self.noted, strict=True):
            if source is not own or (source._version, source.data_ptr()) != noted:
                return False
        return True


# What each model's last call used.
_USED: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[_Result]]] = weakref.WeakKeyDictionary()


class Recall:
    """Results of an adapter on one layer.

    Attributes:
        largest: Tensors of more numbers are not copied.
        adapters: Of how many adapters results are kept, those used last.
    """

    largest = 2**18
    adapters = 8

    def __init__(self) -> None:
        self._known: dict[str, dict[Hashable, _Result]] = {}

    def __call__(self, adapter_name: str, what: Hashable, sources: tuple[Tensor, ...], make: Callable[[], T]) -> T:
        """`make()`, or what it returned before.

        Args:
            adapter_name: Whose tensors they are.
            what: Tells an adapter's results apart.
            sources: All that the result depends on. Nothing may write to the result.
            make: Computes it.
        """
        if torch.is_grad_enabled() or not is_eager():
            self._known.pop(adapter_name, None)
            return make()
        results, call = self._known.get(adapter_name), _THREAD.call
        known = None if results is None else results.get(what)
        if known is None or not known.is_of(sources, call):
            if not _may_keep(sources):
                self._known.pop(adapter_name, None)
                return make()
            known = self._look(adapter_name, what, sources, known, make)
        if call is not None:
            call.used[known] = None
        return known.value

    def _look(self, adapter_name: str, what: Hashable, sources: tuple[Tensor, ...], known: _Result | None, make: Any) -> _Result:
        """A result that holds for the sources' numbers of now."""
        results = self._known.get(adapter_name)
        if results is None:
            results = self._known[adapter_name] = {}
            for oldest in list(self._known)[: -self.adapters]:
                self._known.pop(oldest, None)
        if known is None or any(source is not own for source, own in zip(sources, known.sources, strict=True)):
            known = results[what] = _Result(sources)
        known.look(_THREAD.call, make)
        return known

    def forget(self, adapter_name: str) -> None:
        """Give back the memory of an adapter's results."""
        self._known.pop(adapter_name, None)

    def __len__(self) -> int:
        """How many results are kept."""
        return sum(map(len, self._known.values()))

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without results."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._known = {}


def _may_keep(sources: tuple[Tensor, ...]) -> bool:
    often = is_running_often()
    for source in sources:
        if type(source) not in (nn.Parameter, Tensor) or source.is_inference():
            return False
        if not often and (source.device.type != "cpu" or source.numel() > Recall.largest):
            return False
    return True


def _watch(tensor: Tensor) -> _Watch:
    watch = _WATCHES.get(id(tensor))
    if watch is None or watch.tensor() is not tensor:
        watch = _WATCHES[id(tensor)] = _Watch(tensor)
    return watch


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and one.shape == other.shape and torch.equal(one, other)
