# SPDX-License-Identifier: Apache-2.0
"""What torch does with operations at the moment: if they are done now, and in which precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..base.tracing import shapes as shapes
from ..base.tracing import untraced as untraced


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
