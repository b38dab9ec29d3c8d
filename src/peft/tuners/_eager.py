# SPDX-License-Identifier: Apache-2.0
"""What torch does with operations at the moment: if they are done now, and in which precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def is_eager() -> bool:
    """Whether operations run as they are called, and once: no compiler and no transform looks on."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def is_batched(x: Tensor | None) -> bool:
    """Tell if a gradient is one of a batch, of `torch.autograd.grad(…, is_grads_batched=True)`."""
    return x is not None and torch._C._functorch.is_legacy_batchedtensor(x)


def is_autocast(x: Tensor) -> bool:
    """Tell if autocast is on where a tensor is; torch raises if asked for devices that have none."""
    if not torch._C._is_any_autocast_enabled():  # a look at a flag, with no name of a device made
        return False
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which operations where a tensor is have their operands' precision."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


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
