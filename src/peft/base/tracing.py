# SPDX-License-Identifier: Apache-2.0
"""Shapes as numbers under `torch.jit.trace`, which otherwise records sizes as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
