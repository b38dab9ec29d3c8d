# SPDX-License-Identifier: Apache-2.0
"""Sizes as numbers where `torch.jit.trace` looks on, to which they are tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def untraced() -> AbstractContextManager[object]:
    """Return a context whose operations `torch.jit.trace` does not see, to which sizes are tensors."""
    return nullcontext() if torch._C._get_tracing_state() is None else _untraced()


@contextmanager
def _untraced() -> Iterator[None]:
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def shapes(*tensors: Tensor) -> list[Sequence[int]]:
    """Return tensors' shapes as numbers, to decide by: in a trace, for all inputs that it will get."""
    if torch._C._get_tracing_state() is None:
        return [tensor.shape for tensor in tensors]
    with untraced():
        return [tensor.shape for tensor in tensors]
