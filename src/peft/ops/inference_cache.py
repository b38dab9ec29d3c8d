# SPDX-License-Identifier: Apache-2.0
"""The inference cache: results that depend on an adapter's tensors alone, such as factors composed
from a vector bank.

Every call of a model gives the same result as a freshly loaded model, in whatever order adapters
were trained, switched, grown, merged, loaded or deleted, and however parameters were written to.

- A call starts with the results of earlier calls only if the tensors that they were computed from
  hold the same numbers, by comparison with copies. Comparing identity and version would be faster
  but wrong: `p.data.copy_(…)` and engines that own a parameter's memory change neither. A result is
  used for the tensors that it was computed from, and for no others.
- Within one call (a forward, or all steps of one `generate`) a tensor counts as unchanged while
  its version and address are the same. A write to a parameter's memory that bypasses torch while a
  call runs is not detected.
- Nothing is kept with gradients on, under a compiler, tracer or transform, or for layers called
  without their model. Results of tensors that are slow to compare (large, or on a GPU, where a
  comparison would synchronize) are kept within one `generate` only.

A call takes earlier results out of the model and puts them back at its end, so threads that call
one model share none at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from .dispatch import PLAIN_TENSORS, is_eager

T = TypeVar("T")

LARGEST = 2**18
"""Largest number of elements of a tensor that is copied."""

ADAPTERS = 8
"""Number of adapters with results: in a call the first, between calls those used last."""


class _Result:
    """A value, its options and source tensors, and copies of their numbers of that time or None."""

    def __init__(
        self,
        value: object,
        sources: tuple[Tensor, ...],
        copies: tuple[Tensor, ...] | None,
        options: Hashable,
    ) -> None:
        self.value, self.sources, self.copies, self.options = value, sources, copies, options
        self.noted = [(source._version, source.data_ptr()) for source in sources]

    def is_of(self, sources: tuple[Tensor, ...], options: Hashable) -> bool:
        """Return whether these are the same tensors, and torch has noted no change."""
        if len(sources) != len(self.sources) or options != self.options:
            return False
        for source, own, noted in zip(sources, self.sources, self.noted, strict=True):
            if source is not own or (source._version, source.data_ptr()) != noted:
                return False
        return True


# The results of an adapter, by layer and kind.
_Results = dict[tuple[nn.Module, str], _Result]


class InferenceCache:
    """Results of a model's last calls, by adapter."""

    def __init__(self) -> None:
        self._results: dict[str, _Results] = {}

    def __reduce__(self) -> tuple[object, ...]:
        """Start a copy without results."""
        return InferenceCache, ()

    def __len__(self) -> int:
        """Return how many results are kept."""
        return sum(map(len, self._results.values()))

    def during_call(self, runs_often: bool = False) -> AbstractContextManager[None]:
        """Return a context for a call of the model; one inside another is part of that."""
        if torch.compiler.is_compiling() or _THREAD.call is not None:
            return nullcontext()
        return _Call(self, runs_often)

    def forget(self, adapter_name: str) -> None:
        """Give back the memory of an adapter's results."""
        self._results.pop(adapter_name, None)

    def take(self, adapter_name: str) -> _Results:
        """Take an adapter's results out; none, if any of their tensors holds other numbers now.

        All are compared in a row, since it is slower between layers, when the caches hold weights.
        """
        results = self._results.pop(adapter_name, {})
        pairs = {
            (id(s), id(c)): (s, c)
            for r in results.values()
            for s, c in zip(r.sources, r.copies or (), strict=True)
        }
        return results if all(_same(*pair) for pair in pairs.values()) else {}

    def put(self, adapter_name: str, results: _Results) -> None:
        """Keep those of an adapter's results that can be compared."""
        self._results.pop(adapter_name, None)
        kept = {key: result for key, result in results.items() if result.copies is not None}
        if kept:
            self._results[adapter_name] = kept
        for oldest in list(self._results)[:-ADAPTERS]:
            self._results.pop(oldest, None)


class _Call(AbstractContextManager):
    """A call in progress in this thread, with the results of the adapters that it has used."""

    def __init__(self, cache: InferenceCache, runs_often: bool) -> None:
        self.cache, self.runs_often = cache, runs_often
        self.results: dict[str, _Results] = {}
        self._copies: dict[int, Tensor] = {}

    def __enter__(self) -> None:
        _THREAD.call = self

    def __exit__(self, *error: object) -> None:
        _THREAD.call = None
        for adapter_name, results in self.results.items():
            self.cache.put(adapter_name, results)

    def results_of(self, adapter_name: str) -> _Results | None:
        """Return an adapter's results, to be added to; None if the cache is full."""
        results = self.results.get(adapter_name)
        if results is None and len(self.results) < ADAPTERS:
            results = self.results[adapter_name] = self.cache.take(adapter_name)
        return results

    def copies_of(self, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Return copies to compare with; layers that share a bank share its copy."""
        if not _can_compare(sources):
            return None
        for source in sources:
            copy = self._copies.get(id(source))
            if copy is None or not _same(source, copy):
                self._copies[id(source)] = source.detach().clone()
        return tuple([self._copies[id(source)] for source in sources])


class _Thread(threading.local):
    call: _Call | None = None


_THREAD = _Thread()


def is_running_often() -> bool:
    """Return whether the call in progress runs the model many times."""
    return _THREAD.call is not None and _THREAD.call.runs_often


def cached(
    owner: nn.Module,
    adapter_name: str,
    kind: str,
    sources: tuple[Tensor, ...],
    make: Callable[[], T],
    options: Hashable = None,
) -> T | None:
    """Return a cached result of `make` for the same values of its sources, or call it and keep the
    result.

    The result must not be written to; `options` is all that it depends on except `sources`. Where
    no result can be kept, return None without a call.
    """
    call = None if torch.is_grad_enabled() or not is_eager() else _THREAD.call
    results = None if call is None else call.results_of(adapter_name)
    if call is None or results is None:
        return None
    key = owner, kind
    result = results.get(key)
    if result is None or not result.is_of(sources, options):
        results.pop(key, None)
        for source in sources:
            if type(source) not in PLAIN_TENSORS or source.is_inference() or source.is_meta:
                return None
        if not (call.runs_often or _can_compare(sources)):
            return None
        result = results[key] = _Result(make(), sources, call.copies_of(sources), options)
    return cast(T, result.value)


def reuse(
    owner: nn.Module,
    adapter_name: str,
    kind: str,
    sources: tuple[Tensor, ...],
    make: Callable[[], T],
    options: Hashable = None,
) -> T:
    """Return `cached` or, where no result can be kept, `make()`."""
    value = cached(owner, adapter_name, kind, sources, make, options)
    return make() if value is None else value


def _can_compare(tensors: tuple[Tensor, ...]) -> bool:
    return all(tensor.device.type == "cpu" and tensor.numel() <= LARGEST for tensor in tensors)


def _same(tensor: Tensor, copy: Tensor) -> bool:
    """Return whether a tensor is what it was; one without memory, which engines that shard
    parameters free between calls, is not.
    """
    return (
        tensor.untyped_storage().nbytes() > 0
        and tensor.dtype == copy.dtype
        and tensor.device == copy.device
        and tensor.shape == copy.shape
        and torch.equal(tensor, copy)
    )
