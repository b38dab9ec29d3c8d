# SPDX-License-Identifier: Apache-2.0
"""An adapter's first and last matrix product, taken together with what the layer below does on the
same memory.

An activation read or written once more is what an adapter costs on a wide layer, much more than its
few multiplications. So its last product is added to the base layer's output where that lies, and
its gradient for the input to the base layer's.

This is the fast road, of `Steps`. It is made for what layers see nearly always, and `is_ordinary`
says what that is. Anything else that the base layer takes goes the plain road,
`base(x) + delta_activations(x)`, which asks no more of an input than the base layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _hooks

from .derivatives import gradients_again
from .dispatch import is_autocast, is_batched, is_eager
from .mixed_precision import across, add, can_add, down, scaled

_PLAIN = nn.Parameter, Tensor

_KEPT = 16
"""A first product is kept for backward if it is at least so many times smaller than the input, else
computed again.
"""


class Steps(NamedTuple):
    """How an adapter computes its part, from its first matrix product to its last.

    Attributes:
        x: The layer's input as the adapter takes it.
        first: The first product's other factor: `[k, m]`, with `x` read as `[rows, k]`, or
            `[n, k, m]`, with `x` read as `[n, rows, k]`; None where the part does not begin with
            such a product.
        parameters: What the part depends on besides; without `then`, the last product's other
            factor.
        then: What follows, a function of the first product (of `x` where there is none) and the
            parameters. It returns `p` and `q` whose product is the part, in the output's order of
            elements; or the part itself, in that order, and None. Where `then` is None, `p` is the
            first product times `scale`, and the parameter is `q`.
        scale: A number.
    """

    x: Tensor
    first: Tensor | None
    parameters: tuple[Tensor, ...]
    then: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    scale: float = 1.0

    def part(self) -> Tensor:
        """The part itself, in the order of elements of the output but not in its shape."""
        p, q = _ends(_product(self.x, self.first), self.parameters, self.then, self.scale)
        return p if q is None else p @ q


def thin_steps(x: Tensor, first: Tensor, last: Tensor, scale: float | Tensor = 1.0) -> Steps:
    """The steps of two products, `scale · (x · first) · last`."""
    if isinstance(scale, Tensor):
        return Steps(x, first, (last,), lambda h, last: (h * scale, last))
    return Steps(x, first, (last,), scale=scale)


def add_steps(steps: Steps, result: Tensor, in_place: bool) -> Tensor:
    """`result` and the adapter's part.

    Args:
        steps: How the part is computed.
        result: The base layer's output.
        in_place: Whether that may be overwritten.
    """
    x, first, parameters, then, scale = steps
    p, q = _ends(_product(x, first), parameters, then, scale)
    return result + p.view(result.shape) if q is None else add_product(result, p, q, in_place)


def is_ordinary(x: Tensor) -> bool:
    """Tell if a layer's input may go the fast road.

    It may if it is a plain tensor of at least two dimensions, with numbers in it that are in
    memory, and if operations run as they are called.
    """
    return (
        type(x) in _PLAIN
        and is_eager()
        and not (x.is_nested or x.is_meta)
        and x.layout is torch.strided
        and x.dim() > 1
        and x.numel() > 0
    )


def is_plain_product(layer: Any, x: Tensor) -> bool:
    """Whether a call of a layer is a matrix product of one precision and no more, so that an
    adapter may take it over.
    """
    return (
        is_bare(layer, nn.Linear)
        and type(layer._parameters.get("weight"))
        in _PLAIN  # others (quantised, distributed) have their own
        and is_ordinary(x)
        and x.dtype == layer._parameters["weight"].dtype
        and x.is_contiguous()
        and not is_autocast(x)
    )


def run_with_steps(layer: Any, x: Tensor, steps: Steps) -> Tensor:
    """The output of a layer whose call `is_plain_product`, and the adapter's part."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    own_x, first, parameters, then, scale = steps
    if own_x is x and torch.is_grad_enabled():
        return _Adapted.apply(x, weight, bias, then, scale, first, *parameters)
    return add_steps(steps, F.linear(x, weight, bias), in_place=True)


def may_write_to_output(layer: Any) -> bool:
    """Return whether a layer's output belongs to its caller alone: a hook, a replaced forward or
    another kind of layer may have kept it.
    """
    return type(layer) is nn.Linear and not (
        "forward" in layer.__dict__
        or layer._forward_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or _hooks._global_forward_hooks
        or _hooks._global_backward_hooks
        or _hooks._global_backward_pre_hooks
    )


def is_bare(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a call of a module does what its class `kind` says and no more: nothing is hooked in,
    its forward is not replaced.
    """
    own = module.__dict__
    return type(module) is kind and not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
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
        in_place: Whether `result` may be overwritten. It is if that is possible: in eager mode,
            where all are of one dtype or kernels take them.

    Returns:
        In the shape of `result`. Backward keeps `p` and `q` and nothing of the size of `result`.
    """
    if not ((in_place or result.dtype != p.dtype) and is_eager() and can_add(result, p, q)):
        return result + (p @ q).view(result.shape)
    return (
        _AddProduct.apply(result, p, q, in_place)
        if torch.is_grad_enabled()
        else add(result, p, q, in_place)
    )


def _product(x: Tensor, first: Tensor | None) -> Tensor:
    return x if first is None else down(_read(x, first), first)


def _read(x: Tensor, first: Tensor) -> Tensor:
    """`x` as it is multiplied by `first`."""
    if first.dim() == 2:
        return x.reshape(-1, first.shape[0])
    return x.reshape(first.shape[0], -1, first.shape[1])


def _ends(
    product: Tensor, parameters: tuple[Tensor, ...], then: Any, scale: float
) -> tuple[Tensor, Tensor | None]:
    """`p` and `q` from the first product."""
    return (scaled(product, scale), parameters[0]) if then is None else then(product, *parameters)


class _AddProduct(torch.autograd.Function):
    """`result + p @ q`."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, p: Tensor, q: Tensor, in_place: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(p, q)
        if in_place:
            ctx.mark_dirty(result)
        return add(result, p, q, in_place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        p, q = ctx.saved_tensors
        rows = gradient.reshape(*p.shape[:-1], q.shape[-1])
        return (
            gradient if ctx.needs_input_grad[0] else None,
            down(rows, q.mT) if ctx.needs_input_grad[1] else None,
            across(p, rows) if ctx.needs_input_grad[2] else None,
            None,
        )


class _Adapted(torch.autograd.Function):
    """A linear layer and an adapter's part, whose gradient for the input is added to the layer's.

    Backward keeps the input and the parameters, and the first product where that is small. What
    lies between the products is done once more in backward, for its own gradient.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        then: Any,
        scale: float,
        first: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        result = x.new_empty(
            *x.shape[:-1], weight.shape[0]
        )  # what `linear` gives may be a view, which could not be written to
        rows, out = x.flatten(0, -2), result.view(-1, weight.shape[0])
        torch.mm(rows, weight.mT, out=out) if bias is None else torch.addmm(
            bias, rows, weight.mT, out=out
        )
        product = _product(x, first)
        small = product.numel() * _KEPT <= x.numel()
        ctx.save_for_backward(x, weight, product if small else None, first, *parameters)
        ctx.then, ctx.scale = then, scale
        # `matmul` looks at who requires a gradient, and would take another way, to other last bits,
        # than where nobody does.
        p, q = _ends(
            product.detach(), tuple([tensor.detach() for tensor in parameters]), then, scale
        )
        return result.add_(p.view(result.shape)) if q is None else add(result, p, q)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, product, first, *parameters = ctx.saved_tensors
        for_x, for_weight, for_bias, _, _, for_first, *for_parameters = ctx.needs_input_grad
        if torch.is_grad_enabled() or is_batched(gradient):
            wanted = for_x, for_weight, for_first, *for_parameters
            plain = functools.partial(_adapted_plainly, ctx.then, ctx.scale)
            of_x, of_weight, *others = gradients_again(
                plain, (x, weight, first, *parameters), wanted, (gradient,)
            )
            return (
                of_x,
                of_weight,
                gradient.reshape(-1, weight.shape[0]).sum(0) if for_bias else None,
                None,
                None,
                *others,
            )
        if product is None:
            product = _product(x, first)
        through = _through_last if ctx.then is None else _through
        of_product, *of_parameters = through(
            ctx, gradient, product, parameters, for_x or for_first, for_parameters
        )
        rows = gradient.flatten(0, -2)
        return (
            _add_first((gradient @ weight).contiguous(), of_product, first) if for_x else None,
            rows.mT @ x.flatten(0, -2) if for_weight else None,
            rows.sum(0) if for_bias else None,
            None,
            None,
            across(of_product, _read(x, first)).mT if for_first else None,
            *of_parameters,
        )


def _adapted_plainly(
    then: Any, scale: float, x: Tensor, weight: Tensor, first: Tensor | None, *parameters: Tensor
) -> Tensor:
    """Return the same, save a bias, by operations that autograd knows."""
    own = F.linear(x, weight)
    return (own + Steps(x, first, parameters, then, scale).part().reshape(own.shape)).to(own.dtype)


def _add_first(of_x: Tensor, of_product: Tensor, first: Tensor | None) -> Tensor:
    """The gradient for the input, the part's added to the layer's."""
    return of_x.add_(of_product) if first is None else add(of_x, of_product, first.mT)


def _through_last(
    ctx: Any, gradient: Tensor, p: Tensor, parameters: Any, for_p: bool, for_q: Any
) -> list[Any]:
    """The gradients for `p` and `q` of their product."""
    (q,) = parameters
    rows = gradient.reshape(*p.shape[:-1], q.shape[-1])
    return [
        down(rows, q.mT, ctx.scale) if for_p else None,
        across(p, rows, ctx.scale) if for_q[0] else None,
    ]


def _through(
    ctx: Any,
    gradient: Tensor,
    product: Tensor,
    parameters: Any,
    for_product: bool,
    for_parameters: Any,
) -> list[Any]:
    """The gradients for the first product and the parameters, through all that follows it."""
    wanted = [for_product, *for_parameters]
    own = [
        tensor.detach().requires_grad_(want)
        for tensor, want in zip((product, *parameters), wanted, strict=True)
    ]
    with torch.enable_grad():
        p, q = ctx.then(*own)
    if q is None:
        ends = [(p, lambda: gradient.reshape(p.shape).to(p.dtype))]
    else:
        rows = gradient.reshape(*p.shape[:-1], q.shape[-1])
        ends = [(p, lambda: down(rows, q.mT)), (q, lambda: across(p, rows))]
    ends = [(end, make) for end, make in ends if end.requires_grad]
    sources = [tensor for tensor, want in zip(own, wanted, strict=True) if want]
    if not sources:
        return [None] * len(own)
    found = iter(
        torch.autograd.grad(
            [end for end, _ in ends], sources, [make() for _, make in ends], allow_unused=True
        )
    )
    return [next(found) if want else None for want in wanted]
