# SPDX-License-Identifier: Apache-2.0
"""An adapter's first and last matrix product, taken together with what the layer below does on the same memory.

An activation read or written once more is what an adapter costs on a wide layer, much more than its few multiplications. So its
last product is added to the base layer's output where that lies, and its gradient for the input to the base layer's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _hooks


class Steps(NamedTuple):
    """How an adapter computes its part, from its first matrix product to its last.

    Attributes:
        x: The layer's input as the adapter takes it.
        first: The first product's other factor: `[k, m]`, with `x` read as `[rows, k]`, or `[n, k, m]`, with `x` read as
            `[n, rows, k]`; None where the part does not begin with such a product.
        then: What follows, a function of the product (of `x` where there is none). It returns `p` and `q` whose product is the
            part, in the output's order of elements; or the part itself, of the output's shape, and None.
    """

    x: Tensor
    first: Tensor | None
    then: Callable[[Tensor], tuple[Tensor, Tensor | None]]

    def part(self) -> Tensor:
        """The part itself, in the order of elements of the output but not in its shape."""
        p, q = self.then(_product(self.x, self.first))
        return p if q is None else p @ q


def add_steps(steps: Steps, result: Tensor, in_place: bool) -> Tensor:
    """`result` and the adapter's part.

    Args:
        steps: How the part is computed.
        result: The base layer's output.
        in_place: Whether that may be overwritten.
    """
    return _add_last(steps, _product(steps.x, steps.first), result, in_place)


def can_share_input(layer: Any, x: Tensor) -> bool:
    """Whether an adapter's first product can be taken in one function with a layer's own: there are gradients to add up, and the
    layer is a plain matrix product of one precision.
    """
    return (
        torch.is_grad_enabled()
        and x.requires_grad
        and is_bare(layer, nn.Linear)
        and type(layer.weight) in (nn.Parameter, Tensor)  # others (quantised, distributed) have products of their own
        and x.dtype == layer.weight.dtype
        and x.is_contiguous()
        and not torch.is_autocast_enabled(x.device.type)
        and is_eager()
    )


def run_with_steps(layer: Any, x: Tensor, steps: Steps) -> Tensor:
    """The output of a layer that `can_share_input`, and the adapter's part."""
    if steps.first is None or steps.x is not x or steps.first.dtype != x.dtype:
        return add_steps(steps, layer(x), in_place=True)
    result, product = _TwoProducts.apply(x, layer.weight, layer.bias, steps.first)
    return _add_last(steps, product, result, in_place=True)


def may_write_to_output(layer: Any) -> bool:
    """Whether a layer's output belongs to its caller alone: hooks may have kept it, and other kinds of layers themselves."""
    return type(layer) is nn.Linear and not (
        layer._forward_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or _hooks._global_forward_hooks
        or _hooks._global_backward_hooks
        or _hooks._global_backward_pre_hooks
    )


def is_bare(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a call of a module does what its class `kind` says and no more: nothing is hooked in, its forward is not replaced."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _hooks._global_forward_hooks
        or _hooks._global_forward_pre_hooks
        or _hooks._global_backward_hooks
        or _hooks._global_backward_pre_hooks
    )


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
    if not (in_place and result.dtype == p.dtype == q.dtype and result.is_contiguous() and is_eager()):
        return result + (p @ q).view(result.shape)
    if torch.is_grad_enabled():
        return _AddProduct.apply(result, p, q)
    return _add(result, p, q)


def scaled(h: Tensor, scale: float | Tensor) -> Tensor:
    """`h · scale`, without a kernel where the scale is one."""
    return h if isinstance(scale, (int, float)) and scale == 1 else h * scale


def is_eager() -> bool:
    """Whether operations run as they are called, and once: no compiler and no transform looks on."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _product(x: Tensor, first: Tensor | None) -> Tensor:
    return x if first is None else _read(x, first) @ first


def _read(x: Tensor, first: Tensor) -> Tensor:
    """`x` as it is multiplied by `first`."""
    if first.dim() == 2:
        return x.reshape(-1, first.shape[0])
    return x.reshape(first.shape[0], math.prod(x.shape[:-1]) // max(first.shape[0], 1), first.shape[1])


def _add_last(steps: Steps, product: Tensor, result: Tensor, in_place: bool) -> Tensor:
    p, q = steps.then(product)
    return result + p if q is None else add_product(result, p, q, in_place)


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


class _TwoProducts(torch.autograd.Function):
    """`x @ Wᵀ + b` and `x @ first`. The gradient for `x` is a sum of two products, of which the second is added to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(x, weight, first)
        result = x.new_empty(*x.shape[:-1], weight.shape[0])  # what `linear` gives may be a view, which could not be written to
        rows, out = x.flatten(0, -2), result.view(-1, weight.shape[0])
        torch.mm(rows, weight.mT, out=out) if bias is None else torch.addmm(bias, rows, weight.mT, out=out)
        return result, _product(x, first)

    @staticmethod
    def backward(ctx: Any, of_output: Tensor, of_product: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, first = ctx.saved_tensors
        for_x, for_weight, for_bias, for_first = ctx.needs_input_grad
        rows = of_output.flatten(0, -2)
        return (
            _add((of_output @ weight).contiguous(), of_product, first.mT) if for_x else None,
            rows.mT @ x.flatten(0, -2) if for_weight else None,
            rows.sum(0) if for_bias else None,
            (of_product.mT @ _read(x, first)).mT if for_first else None,
        )
