# SPDX-License-Identifier: Apache-2.0
"""Products of an activation of the base model with an adapter's factor, in two precisions.

Adapters of a model in bfloat16 or float16 are kept in float32. Plain operations then copy the
activation to float32, multiply without matrix units and copy the result back: much more work than
an adapter's few multiplications. On a GPU with Triton, kernels read and write activations as they
are (`mixed_precision_triton.py`). Results are as exact as in float32; a result in the base model's
precision is rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from .dispatch import PLAIN_TENSORS, can_trace, is_autocast, is_batched, is_eager
from .triton_support import Trial, agrees, define, has_triton

Tensors: TypeAlias = tuple[Tensor, ...]

_HALF = frozenset({torch.bfloat16, torch.float16})

_MIN_ELEMENTS = 2**22
"""Smallest activation, in elements, for which the Triton kernels are used in eager mode; below it
launch overhead exceeds the time saved.
"""

_MAX_RANK = 128
"""Most columns of a factor that the kernels support."""


def can_stay(x: Tensor, dtype: torch.dtype) -> bool:
    """Return whether an input needs no cast for products with factors of a dtype."""
    return (
        dtype is torch.float32
        and x.dtype in _HALF
        and type(x) in PLAIN_TENSORS
        and not is_autocast(x)
        and x.is_contiguous()
        and (can_trace(x) or (is_eager() and _is_large(x) and has_triton(x.device)))
    )


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast an input that `can_stay` for operations other than products with factors."""
    return x.to(dtype) if x.dtype in _HALF and dtype is torch.float32 else x


def down(activation: Tensor, factor: Tensor, scale: float = 1.0) -> Tensor:
    """Return `scale · activation · factor`, in the factor's precision.

    Args:
        activation: `[n, rows, k]` or `[rows, k]`.
        factor: `[n, k, m]` or `[k, m]`.
    """
    if activation.dtype == factor.dtype or not _are_mixed(activation, factor):
        return scaled(activation @ factor, scale)
    if can_trace(activation):
        return scaled(_traced_down(activation, factor), scale)
    if _is_recorded(activation, factor):
        return scaled(_Down.apply(activation, factor), scale)
    return _down(activation, factor, scale, _is_large(activation))


def _down(activation: Tensor, factor: Tensor, scale: float = 1.0, allowed: bool = True) -> Tensor:
    if allowed and _are_taken(activation, activation.shape[-1], factor.shape[-1], factor):
        return _kernels().down(activation, factor, scale)
    return scaled(activation.to(factor.dtype) @ factor, scale)


def across(factor: Tensor, activation: Tensor, scale: float = 1.0) -> Tensor:
    """Return `scale · factorᵀ · activation`, in the factor's precision.

    Args:
        factor: `[n, rows, m]` or `[rows, m]`.
        activation: `[n, rows, k]` or `[rows, k]`.
    """
    if activation.dtype == factor.dtype or not _are_mixed(activation, factor):
        return scaled(factor, scale).mT @ activation
    if can_trace(activation):
        return scaled(_traced_across(factor, activation), scale)
    allowed = _is_large(activation) and not _is_recorded(factor, activation)
    return _across(factor, activation, scale, allowed)


def _across(factor: Tensor, activation: Tensor, scale: float = 1.0, allowed: bool = True) -> Tensor:
    if allowed and _are_taken(activation, activation.shape[-1], factor.shape[-1], factor):
        return _kernels().across(factor, activation, scale)
    return scaled(factor, scale).mT @ activation.to(factor.dtype)


def up(p: Tensor, q: Tensor, like: Tensor) -> Tensor:
    """Return `p · q` in the shape and precision of `like`.

    Args:
        p: `[n, rows, k]` or `[rows, k]`.
        q: `[n, k, columns]` or `[k, columns]`.
        like: A tensor of as many elements.
    """
    if like.dtype in _HALF and can_trace(like):
        return _traced_up(p, q, like)
    return _up(p, q, like, _is_large(like) and not _is_recorded(p, q))


def _up(p: Tensor, q: Tensor, like: Tensor, allowed: bool = True) -> Tensor:
    if allowed and _are_taken(like, q.shape[-1], p.shape[-1], p, q):
        return _kernels().up(None, p, q, torch.empty_like(like))
    return (p @ q).view(like.shape).to(like.dtype)


def can_add(result: Tensor, p: Tensor, q: Tensor) -> bool:
    """Return whether a kernel adds `p · q` to `result`, without a tensor of that size."""
    if can_trace(result):
        return _are_mixed(result, p)
    return _is_large(result) and _are_taken(result, q.shape[-1], p.shape[-1], p, q)


def add(result: Tensor, p: Tensor, q: Tensor, in_place: bool = True) -> Tensor:
    """Return `result + p · q` in the precision of `result`. Only compilers record gradients.

    Args:
        result: As many elements as the product has, in its order, contiguous.
        p: `[n, rows, k]` or `[rows, k]`.
        q: `[n, k, columns]` or `[k, columns]`.
        in_place: Write into the memory of `result`.
    """
    if can_trace(result):
        return _traced_add(result, p, q)
    return _add(result, p, q, in_place, _is_large(result) and not _is_recorded(result, p, q))


def _add(
    result: Tensor, p: Tensor, q: Tensor, in_place: bool = False, allowed: bool = True
) -> Tensor:
    if allowed and _are_taken(result, q.shape[-1], p.shape[-1], p, q):
        return _kernels().up(result, p, q, result if in_place else torch.empty_like(result))
    product = (p @ q).view(result.shape)
    return result.add_(product) if in_place else (result + product).to(result.dtype)


def scaled(h: Tensor, scale: float | Tensor) -> Tensor:
    """Return `h · scale`, without a kernel where the scale is one."""
    return h if isinstance(scale, (int, float)) and scale == 1 else h * scale


class _Context(Protocol):
    """Attributes of an autograd context that this file uses."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Down(torch.autograd.Function):
    """`down` in mixed precision."""

    @staticmethod
    def forward(ctx: _Context, activation: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(activation, factor)
        return _down(activation, factor, allowed=_is_large(activation))

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        activation, factor = ctx.saved_tensors
        for_activation, for_factor = ctx.needs_input_grad
        return (
            up(gradient, factor.mT, activation) if for_activation else None,
            across(gradient, activation).mT if for_factor else None,
        )


def add_backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of `result + p · q` for a context that saved `p` and `q`."""
    p, q = ctx.saved_tensors
    rows = gradient.reshape(*p.shape[:-1], q.shape[-1])
    return (
        gradient if ctx.needs_input_grad[0] else None,
        down(rows, q.mT) if ctx.needs_input_grad[1] else None,
        across(p, rows) if ctx.needs_input_grad[2] else None,
    )


def _save(ctx: _Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[-2:])


# To compilers these products are operators, which run kernels for activations of any size: calls
# cost less there, and nothing in a captured graph.
_traced_down = define(
    "mixed_down(Tensor activation, Tensor factor) -> Tensor",
    _down,
    lambda x, factor: factor.new_empty((*x.shape[:-1], factor.shape[-1])),
    (_Down.backward, _save),
)
_traced_across = define(
    "mixed_across(Tensor factor, Tensor activation) -> Tensor",
    _across,
    lambda factor, x: factor.new_empty((*x.shape[:-2], factor.shape[-1], x.shape[-1])),
)
_traced_up = define(
    "mixed_up(Tensor p, Tensor q, Tensor like) -> Tensor",
    _up,
    lambda p, q, like: torch.empty_like(like, memory_format=torch.contiguous_format),
)
_traced_add = define(
    "mixed_add(Tensor result, Tensor p, Tensor q) -> Tensor",
    _add,
    lambda result, p, q: torch.empty_like(result, memory_format=torch.contiguous_format),
    (add_backward, _save),
)


def _are_mixed(activation: Tensor, factor: Tensor) -> bool:
    return (
        activation.dtype in _HALF and factor.dtype is torch.float32 and not is_autocast(activation)
    )


def _are_taken(activation: Tensor, length: int, width: int, *factors: Tensor) -> bool:
    """Return whether kernels support `[…, length]` activations with `[…, width]` factors."""
    if width > _MAX_RANK or activation.dtype not in _HALF or not activation.numel():
        return False
    device = activation.device
    for tensor in factors:
        if tensor.dtype is not torch.float32 or tensor.device != device:
            return False
        if type(tensor) not in PLAIN_TENSORS:
            return False
    return (
        type(activation) in PLAIN_TENSORS
        and activation.is_contiguous()
        and not is_batched(activation)
        and has_triton(device)
        and agrees(_trial(length, width, activation.dtype), device)
    )


def _is_large(activation: Tensor) -> bool:
    return activation.dtype in _HALF and activation.numel() >= _MIN_ELEMENTS


def _is_recorded(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@functools.cache
def _kernels() -> ModuleType:
    from . import mixed_precision_triton as kernels

    return kernels


@functools.lru_cache(1024)
def _trial(length: int, width: int, dtype: torch.dtype) -> Trial:
    return _trial_of_blocks(*_kernels().blocks(length, width), dtype)


@functools.cache
def _trial_of_blocks(length: int, width: int, dtype: torch.dtype) -> Trial:
    """Return the kernels, the same in plain operations, and an example for both."""
    # Several steps of each kernel's loop.
    rows, length, width = 500, 2 * length if length == 256 else length, width // 2

    def results(of: ModuleType | SimpleNamespace) -> Callable[..., Tensors]:
        def run(x: Tensor, first: Tensor, h: Tensor, p: Tensor, q: Tensor, one: Tensor) -> Tensors:
            out = torch.empty_like(x)
            found = of.down(x, first, 0.5), of.across(h, x, 2.0), of.up(x, p, q, out)
            return tuple(one * tensor.float() for tensor in found)

        return run

    def example(device: torch.device) -> Tensors:
        """Return arguments with results of about one, and with integers where results are rounded,
        so that rounding cannot differ.
        """
        x = torch.randint(-3, 4, (rows, length), device=device).to(dtype)
        p = torch.randint(-1, 2, (rows, width), device=device).float()
        q = torch.randint(-1, 2, (width, length), device=device).float()
        first = torch.randn(width, length, device=device).mT / 16
        h = torch.randn(rows, width, device=device) / 16
        return x, first, h, p, q, torch.ones((), device=device, requires_grad=True)

    plain = SimpleNamespace(
        down=lambda x, first, scale: x.double() @ first.double() * scale,
        across=lambda h, x, scale: h.double().mT @ x.double() * scale,
        up=lambda x, p, q, out: x.float() + p @ q,
    )
    return Trial(results(_kernels()), results(plain), example)
