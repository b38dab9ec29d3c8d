# SPDX-License-Identifier: Apache-2.0
"""Adding an adapter's last matrix product to the base layer's output where that lies, without memory for the product.

An activation read or written once more is what an adapter costs on a wide layer, much more than its few multiplications.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Layers whose output is made anew by every call and kept by nobody for backward.
_FRESH: tuple[type, ...] = (nn.Linear,)


def may_write_to_output(base_layer: nn.Module) -> bool:
    """Whether a layer's output belongs to its caller alone: hooks may have kept it, and other kinds of layers themselves."""
    return type(base_layer) in _FRESH and not (base_layer._forward_hooks or nn.modules.module._global_forward_hooks)


def add_product(result: Tensor, p: Tensor, q: Tensor, in_place: bool) -> Tensor:
    """`result + p @ q`.

    Args:
        result: Of as many elements as the product, in its order.
        p: `[n, rows, k]`, or `[rows, k]`.
        q: `[n, k, columns]`, or `[k, columns]`.
        in_place: Whether `result` may be overwritten. It is if that is possible: in eager mode, where all are of one dtype.

    Returns:
        In the shape of `result`. Backward keeps `p` and `q` and nothing of the size of `result`.
    """
    same = result.dtype == p.dtype == q.dtype and result.is_contiguous()
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None
    if traced or not (in_place and same):
        return result + (p @ q).view(result.shape)
    if torch.is_grad_enabled():
        return _AddProduct.apply(result, p, q)
    return _add(result, p, q)


def _add(result: Tensor, p: Tensor, q: Tensor) -> Tensor:
    product = result.view(*p.shape[:-1], q.shape[-1])
    product.addmm_(p, q) if p.dim() == 2 else product.baddbmm_(p, q)
    return result


class _AddProduct(torch.autograd.Function):
    """`result += p @ q`."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, p: Tensor, q: Tensor) -> Tensor:
        ctx.save_for_backward(p, q)
        ctx.mark_dirty(result)
        return _add(result, p, q)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        p, q = ctx.saved_tensors
        rows = gradient.reshape(*p.shape[:-1], q.shape[-1])
        return (
            gradient if ctx.needs_input_grad[0] else None,
            rows @ q.mT if ctx.needs_input_grad[1] else None,
            p.mT @ rows if ctx.needs_input_grad[2] else None,
        )
