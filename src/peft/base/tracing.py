# SPDX-License-Identifier: Apache-2.0
"""Sizes under `torch.jit.trace`, which records them as tensors, and under `torch.compile`, where
some are symbols.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

_C: Any = torch._C


def untraced() -> AbstractContextManager[object]:
    """Return a context whose operations `torch.jit.trace` does not record."""
    return nullcontext() if torch._C._get_tracing_state() is None else _untraced()


@contextmanager
def _untraced() -> Iterator[None]:
    state = _C._get_tracing_state()
    _C._set_tracing_state(None)
    try:
        yield
    finally:
        _C._set_tracing_state(state)


def shapes(*tensors: Tensor) -> list[Sequence[int]]:
    """Return shapes of tensors as numbers; a trace keeps the decisions made by them."""
    if torch._C._get_tracing_state() is None:
        return [tensor.shape for tensor in tensors]
    with untraced():
        return [tensor.shape for tensor in tensors]


def numel(tensor: Tensor) -> int:
    """Return a tensor's number of elements as a number, also in a trace."""
    if torch._C._get_tracing_state() is None:
        return tensor.numel()
    with untraced():
        return tensor.numel()


def is_one_of(size: int, sizes: Iterable[int | None]) -> bool:
    """Return `size in sizes`, which a compiler takes to be false for a constant and a symbol."""
    return any(size == other for other in sizes)
