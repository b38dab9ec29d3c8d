# SPDX-License-Identifier: Apache-2.0
"""Choose between the fused path and plain operations.

`can_fuse` says whether a chain is computed together with the base layer's product, `is_ordinary`
whether it is added to a finished output, and `owns_output` whether in place. They alone know the
inputs and modes that `fused_linear` does not support: hooks, transforms, autocast, tensor
subclasses, nested, meta, sparse and empty inputs, single vectors. To a compiler a chain is added
to a finished output by new tensors, with operators for the kernels where it `can_trace`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled, _is_tracing
from torch.autograd import forward_ad
from torch.nn.modules import module as _hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PLAIN_TENSORS = nn.Parameter, Tensor
"""Types whose operations are torch's own; a subclass may do something else."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton interprets kernels instead of compiling them; they run on any device then."""


def is_eager() -> bool:
    """Return whether we run in plain eager mode: not under `torch.compile`, tracing, `torch.func`
    transforms or forward-mode AD.
    """
    return not (
        torch.compiler.is_compiling()
        or _is_tracing()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def can_trace(x: Tensor) -> bool:
    """Return whether a compiler takes our operators for a tensor and others beside it: on a GPU,
    where the operators look for Triton themselves, and outside transforms.
    """
    return (
        torch.compiler.is_compiling()
        and (x.device.type == "cuda" or INTERPRETED)
        and not is_traceable_wrapper_subclass(x)
        and not _are_functorch_transforms_active()
    )


def is_batched(x: Tensor | None) -> bool:
    """Return whether a gradient is batched, by `torch.autograd.grad(…, is_grads_batched=True)`."""
    return x is not None and torch._C._functorch.is_legacy_batchedtensor(x)


def is_autocast(x: Tensor) -> bool:
    """Return whether autocast is on for a tensor's device."""
    if not _is_any_autocast_enabled():  # reads a flag, and makes no device name
        return False
    kind = x.device.type  # torch raises if asked about devices without autocast
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context with autocast off for a tensor's device."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


def are_unhooked(modules: Iterable[nn.Module], kind: type[nn.Module]) -> bool:
    """Return whether modules run the forward of `kind` alone: no hooks, no replaced forward."""
    for module in modules:
        attributes = module.__dict__
        if type(module) is not kind or (
            attributes["_forward_hooks"]
            or attributes["_forward_pre_hooks"]
            or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
            or "forward" in attributes
        ):
            return False
    return not (
        _hooks._global_forward_hooks
        or _hooks._global_forward_pre_hooks
        or _hooks._global_backward_hooks
        or _hooks._global_backward_pre_hooks
    )


def is_ordinary(x: Tensor) -> bool:
    """Return whether we run in eager mode or are compiled, and an input is a plain dense tensor, of
    at least two dimensions, with elements in memory.
    """
    return (
        type(x) in PLAIN_TENSORS
        and (torch.compiler.is_compiling() or (is_eager() and x.numel() > 0))
        and not (x.is_nested or x.is_meta)
        and x.layout is torch.strided
        and x.dim() > 1
    )


def can_fuse(layer: nn.Module, x: Tensor) -> bool:
    """Return whether a layer's call is one matrix product in one precision, for `fused_linear`."""
    return (
        not torch.compiler.is_compiling()
        and are_unhooked((layer,), nn.Linear)
        # Quantized and distributed weights multiply differently.
        and type(weight := layer._parameters.get("weight")) in PLAIN_TENSORS
        and is_ordinary(x)
        and x.dtype == weight.dtype  # type: ignore[union-attr]
        and x.is_contiguous()
        and not is_autocast(x)
    )


def owns_output(layer: nn.Module) -> bool:
    """Return whether a layer's output may be overwritten: no hook, no own forward holds it, and no
    compiler places it.
    """
    return type(layer) is nn.Linear and not (
        torch.compiler.is_compiling()
        or "forward" in layer.__dict__
        or layer._forward_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or _hooks._global_forward_hooks
        or _hooks._global_backward_hooks
        or _hooks._global_backward_pre_hooks
    )
