# SPDX-License-Identifier: Apache-2.0
"""Products of a wide matrix, of the base model's activations, with an adapter's thin one, whatever
precision each is in.

Beside a model in bfloat16 or float16, adapters are kept in float32. Plain operations have to copy
an activation to float32 then, multiply it without the units that there are for matrices, and copy
what comes out back: much more work than an adapter's few multiplications. Where Triton is, kernels
read and write activations as they are (`kernels.py`). Results are as exact as those of float32, and
what is in the base model's precision is rounded once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .dispatch import is_autocast, is_batched, is_eager
from .triton_support import agrees, has_triton

_PLAIN = nn.Parameter, Tensor
_HALF = frozenset({torch.bfloat16, torch.float16})

_LEAST = 2**22
"""Numbers that a wide matrix must have for kernels to pay. With fewer a GPU waits for its host,
whom they cost a little more.
"""

_WIDEST = 128
"""The most columns of a thin matrix that kernels take."""


def can_stay(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether an input need not be cast for its products with thin matrices of a dtype: kernels
    take those, if they agree.
    """
    return (
        dtype is torch.float32
        and x.dtype in _HALF
        and is_eager()  # a compiler must not follow what comes after
        and not is_autocast(x)
        and x.numel() >= _LEAST
        and type(x) in _PLAIN
        and x.is_contiguous()
        and _are_there(x.device)
    )


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An input that could stay as it is, for other things than products with thin matrices."""
    return x.to(dtype) if x.dtype in _HALF and dtype is torch.float32 else x


def down(wide: Tensor, thin: Tensor, scale: float = 1.0) -> Tensor:
    """`scale · wide · thin`, in the precision of `thin`.

    Args:
        wide: `[n, rows, k]` or `[rows, k]`.
        thin: `[n, k, m]` or `[k, m]`.
        scale: A number.
    """
    if wide.dtype == thin.dtype or not _are_mixed(wide, thin):
        return scaled(wide @ thin, scale)
    if _is_recorded(wide, thin):
        return _Down.apply(wide, thin, scale)
    if _are_taken(wide, wide.shape[-1], thin.shape[-1], thin):
        return _kernels().down(wide, thin, scale)
    return scaled(wide.to(thin.dtype) @ thin, scale)


def across(thin: Tensor, wide: Tensor, scale: float = 1.0) -> Tensor:
    """`scale · thinᵀ · wide`, in the precision of `thin`.

    Args:
        thin: `[n, rows, m]` or `[rows, m]`.
        wide: `[n, rows, k]` or `[rows, k]`.
        scale: A number.
    """
    if wide.dtype != thin.dtype and _are_mixed(wide, thin):
        if not _is_recorded(thin, wide) and _are_taken(wide, wide.shape[-1], thin.shape[-1], thin):
            return _kernels().across(thin, wide, scale)
        wide = wide.to(thin.dtype)
    return scaled(thin, scale).mT @ wide


def up(p: Tensor, q: Tensor, like: Tensor) -> Tensor:
    """`p · q` with as many elements as `like`, in its shape and precision.

    Args:
        p: `[n, rows, k]` or `[rows, k]`.
        q: `[n, k, columns]` or `[k, columns]`.
        like: A tensor of that size.
    """
    if not _is_recorded(p, q) and _are_taken(like, q.shape[-1], p.shape[-1], p, q):
        return _kernels().up(None, p, q, torch.empty_like(like))
    return (p @ q).view(like.shape).to(like.dtype)


def can_add(result: Tensor, p: Tensor, q: Tensor) -> bool:
    """Whether `add` takes these without a product of the size of `result`."""
    if result.dtype == p.dtype == q.dtype:
        return result.is_contiguous()
    return _are_taken(result, q.shape[-1], p.shape[-1], p, q)


def add(result: Tensor, p: Tensor, q: Tensor, in_place: bool = True) -> Tensor:
    """`result + p · q` in the precision of `result`; without a record for gradients.

    Args:
        result: Of as many elements as the product, in its order, contiguous.
        p: `[n, rows, k]` or `[rows, k]`.
        q: `[n, k, columns]` or `[k, columns]`.
        in_place: Whether it is to be in the memory of `result`.
    """
    if result.dtype == p.dtype == q.dtype and in_place:
        product = result.view(*p.shape[:-1], q.shape[-1])
        product.addmm_(p, q) if p.dim() == 2 else product.baddbmm_(p, q)
        return result
    if not _is_recorded(result, p, q) and _are_taken(result, q.shape[-1], p.shape[-1], p, q):
        return _kernels().up(result, p, q, result if in_place else torch.empty_like(result))
    product = (p @ q).view(result.shape)
    return result.add_(product) if in_place else (result + product).to(result.dtype)


def scaled(h: Tensor, scale: float | Tensor) -> Tensor:
    """`h · scale`, without a kernel where the scale is one."""
    return h if isinstance(scale, (int, float)) and scale == 1 else h * scale


class _Down(torch.autograd.Function):
    """`down` in mixed precision."""

    @staticmethod
    def forward(ctx: Any, wide: Tensor, thin: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(wide, thin)
        ctx.scale = scale
        return down(wide, thin, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wide, thin = ctx.saved_tensors
        return (
            up(scaled(gradient, ctx.scale), thin.mT, wide) if ctx.needs_input_grad[0] else None,
            across(gradient, wide, ctx.scale).mT if ctx.needs_input_grad[1] else None,
            None,
        )


def _are_mixed(wide: Tensor, thin: Tensor) -> bool:
    return wide.dtype in _HALF and thin.dtype is torch.float32 and not is_autocast(wide)


def _are_taken(wide: Tensor, length: int, width: int, *thin: Tensor) -> bool:
    """Whether kernels take a product of these, in which rows of the wide matrix have a length and
    those of the thin one a width.
    """
    if width > _WIDEST or wide.dtype not in _HALF or wide.numel() < _LEAST:
        return False
    device = wide.device
    for tensor in thin:
        if (
            tensor.dtype is not torch.float32
            or type(tensor) not in _PLAIN
            or tensor.device != device
        ):
            return False
    return (
        type(wide) in _PLAIN
        and wide.is_contiguous()
        and not is_batched(wide)
        and _are_there(device)
        and agrees(*_case(length, width, wide.dtype), device)
    )


def _are_there(device: torch.device) -> bool:
    return has_triton(device)


def _is_recorded(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@functools.cache
def _kernels() -> Any:
    from . import mixed_precision_triton as kernels

    return kernels


@functools.lru_cache(1024)
def _case(length: int, width: int, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    return _case_of_blocks(*_kernels().blocks(length, width), dtype)


@functools.cache
def _case_of_blocks(length: int, width: int, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """The kernels, the same in plain operations, and an example for both."""
    rows, length, width = (
        500,
        2 * length if length == 256 else length,
        width // 2,
    )  # several steps of each kernel's loop

    def ours(
        x: Tensor, first: Tensor, h: Tensor, p: Tensor, q: Tensor, one: Tensor
    ) -> tuple[Tensor, ...]:
        kernels = _kernels()
        found = (
            kernels.down(x, first, 0.5),
            kernels.across(h, x, 2.0),
            kernels.up(x, p, q, torch.empty_like(x)),
        )
        return tuple(one * tensor.float() for tensor in found)

    def plain(
        x: Tensor, first: Tensor, h: Tensor, p: Tensor, q: Tensor, one: Tensor
    ) -> tuple[Tensor, ...]:
        found = (
            (x.double() @ first.double()) * 0.5,
            (h.double().mT @ x.double()) * 2,
            x.float() + p @ q,
        )
        return tuple(one * tensor.float() for tensor in found)

    def example(device: torch.device) -> tuple[Tensor, ...]:
        """Results of about one, and whole numbers where they are rounded, so that rounding can't
        differ.
        """
        x = torch.randint(-3, 4, (rows, length), device=device).to(dtype)
        p, q = (
            torch.randint(-1, 2, shape, device=device).float()
            for shape in ((rows, width), (width, length))
        )
        first, h = (
            torch.randn(width, length, device=device).mT / 16,
            torch.randn(rows, width, device=device) / 16,
        )
        return x, first, h, p, q, torch.ones((), device=device, requires_grad=True)

    return ours, plain, example
