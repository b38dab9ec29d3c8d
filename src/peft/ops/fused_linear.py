# SPDX-License-Identifier: Apache-2.0
"""The fused path of a layer: its delta as a chain of products, computed together with the base
layer's product.

Reading or writing an activation once more costs more on a wide layer than an adapter's few
multiplications. So a chain's last product and its base layer's share the memory of the output, and
their gradients for the input that of one of them.

`dispatch` chooses between this path, the base layer's output with the chain added to it, and the
plain path, `base(x) + chain.delta()`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.tensors import check_values
from ..base.tracing import shapes
from . import mixed_precision
from .batched import batched_product
from .derivatives import gradients_again
from .dispatch import is_batched, owns_output
from .mixed_precision import scaled

_SMALL = 16
"""Backward keeps a first product that is at least this many times smaller than the input, and
computes a larger one again.
"""


class Ends(NamedTuple):
    """The last product of a chain, `Δ = p · up`.

    Attributes:
        p: `[rows, k]`, or `[n, rows, k]`.
        up: `[k, columns]`, or `[n, k, columns]`.
    """

    p: Tensor
    up: Tensor


Middle: TypeAlias = Callable[..., Ends | Tensor]
"""A function of a chain's first product and its factors. It returns the chain's ends, or the delta
itself, in the order of the output's elements. If it has a method
`gradients(gradient, product, factors, wanted)`, that returns those of `product`, in new contiguous
memory, and of the factors, None where not wanted; what it gets is contiguous and of their dtype.
"""


class Chain(NamedTuple):
    """A delta as a chain of products, `Δ = scale · p · up` with
    `p, up = middle(x · down, *factors)`.

    Attributes:
        x: The layer's input in the adapter's precision.
        down: `[k, m]` with `x` read as `[rows, k]`, or `[n, k, m]` with `x` read as `[n, rows, k]`;
            None where `middle` takes `x` itself, to multiply it.
        factors: The other tensors that the delta depends on; without a function of its own that is
            `up`, `[m, out]` or `[n, m, out]`.
        middle: A function between the first and the last product.
        scale: A number; or, without a function, a tensor that needs no gradient, of no dimensions
            or `[rows, 1]` with a scale for each row of `x` for `down [k, m]`.

    Example:
        >>> Chain(torch.ones(1, 2), torch.ones(2, 1), (torch.ones(1, 3),), scale=0.5).delta()
        tensor([[1., 1., 1.]])
    """

    x: Tensor
    down: Tensor | None
    factors: tuple[Tensor, ...]
    middle: Middle = Ends
    scale: float | Tensor = 1.0

    def delta(self) -> Tensor:
        """Return the delta; its elements are in the output's order, but its shape may differ."""
        check_values(self.factors[-1], self.x)
        ends = self.middle(_first_product(self.x, self.down), *self.factors)
        return ends if isinstance(ends, Tensor) else scaled(ends.p, self.scale) @ ends.up


def linear_with_chain(layer: nn.Module, x: Tensor, chain: Chain) -> Tensor:
    """Return `layer(x) + Δ` for a layer that `dispatch.can_fuse`."""
    weight, bias = cast(Tensor, layer._parameters["weight"]), layer._parameters["bias"]
    if chain.x is not x or not torch.is_grad_enabled():
        return _add_chain(chain, F.linear(x, weight, bias), in_place=True)
    _, down, factors, middle, scale = _checked(chain)
    return _LinearWithChain.apply(x, weight, bias, middle, scale, down, *factors)


def add_to_output(layer: nn.Module, chain: Chain, result: Tensor) -> Tensor:
    """Return a base layer's output plus a chain's delta, in place if nothing else can hold it."""
    return _add_chain(chain, result, owns_output(layer))


def add_product(
    result: Tensor, p: Tensor, up: Tensor, in_place: bool, scale: float = 1.0
) -> Tensor:
    """Return `result + scale · p · up`, in the shape of `result`.

    Backward keeps `p` and `up`, and nothing of the size of `result`.

    Args:
        result: As many elements as the product has, in its order.
        p: `[n, rows, k]`, or `[rows, k]`.
        up: `[n, k, columns]`, or `[k, columns]`.
        in_place: Allow to overwrite `result`. It is overwritten if all are of one dtype or kernels
            support them.
        scale: A number.
    """
    is_one = result.dtype == p.dtype == up.dtype
    fits = result.is_contiguous() if is_one else mixed_precision.can_add(result, p, up)
    if not fits or (is_one and not in_place):
        if torch.is_grad_enabled() and up.device.type == "cpu":
            up = up.contiguous()  # its gradient is then `pᵀ·g`, in half the time of `gᵀ·p`
        return result + (scaled(p, scale) @ up).view(result.shape)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _AddProduct.apply(result, scaled(p, scale), up, in_place)
    return _add(result, p, up, in_place, scale)


def _checked(chain: Chain) -> Chain:
    """Return a chain with a number as scale; raise for factors without values."""
    check_values(chain.factors[-1], chain.x)
    scale = chain.scale
    if not isinstance(scale, Tensor):
        return chain
    return chain._replace(middle=lambda h, up: Ends(h * scale, up), scale=1.0)


def _add_chain(chain: Chain, result: Tensor, in_place: bool) -> Tensor:
    """Return `result` plus a chain's delta."""
    x, down, factors, middle, scale = _checked(chain)
    ends = middle(_first_product(x, down), *factors)
    if isinstance(ends, Tensor):
        return result + ends.reshape(result.shape)
    return add_product(result, *ends, in_place, cast(float, scale))


def _first_product(x: Tensor, down: Tensor | None) -> Tensor:
    if down is None:
        return x
    rows = _as_operand(x, down)
    if x.dtype != down.dtype:
        return mixed_precision.down(rows, down)
    return rows @ down if down.dim() == 2 else batched_product(rows, down)


def _as_operand(x: Tensor, down: Tensor) -> Tensor:
    """Reshape `x` for the product with `down`."""
    if down.dim() == 2:
        return x.reshape(-1, down.shape[0])
    n, k, _ = down.shape
    return x.reshape(n, -1 if math.prod(shapes(x)[0]) else 0, k)


def _add(
    result: Tensor, p: Tensor, up: Tensor, in_place: bool = True, scale: float = 1.0, beta: int = 1
) -> Tensor:
    """Return `beta · result + scale · p · up` in the precision of `result`, untracked by autograd;
    `beta` is 1 unless all are of one dtype.
    """
    if not in_place or not (result.dtype == p.dtype == up.dtype):
        return mixed_precision.add(result, scaled(p, scale), up, in_place)
    product = result.view(*p.shape[:-1], up.shape[-1])
    add = product.addmm_ if p.dim() == 2 else product.baddbmm_
    add(p, up, alpha=scale, beta=beta)
    return result


class _Context(Protocol):
    """Attributes of the autograd context that this file uses."""

    middle: Middle
    scale: float
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_dirty(self, *tensors: Tensor) -> None: ...


class _AddProduct(torch.autograd.Function):
    """`result + p · up`."""

    @staticmethod
    def forward(ctx: _Context, result: Tensor, p: Tensor, up: Tensor, in_place: bool) -> Tensor:
        ctx.save_for_backward(p, up)
        if in_place:
            ctx.mark_dirty(result)
        return _add(result, p, up, in_place)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *mixed_precision.add_backward(ctx, gradient), None


class _LinearWithChain(torch.autograd.Function):
    """A linear layer plus a chain.

    Backward keeps the input, the factors, and the first product where that is small. It runs the
    chain's function again to differentiate it.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        middle: Middle,
        scale: float,
        down: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        product = _first_product(x, down)
        small = product.numel() * _SMALL <= x.numel()
        ctx.save_for_backward(x, weight, product if small else None, down, *factors)
        ctx.middle, ctx.scale = middle, scale
        # Detached, since `matmul` rounds differently if an operand requires a gradient.
        ends = middle(product.detach(), *[tensor.detach() for tensor in factors])
        # The output of `linear` may be a view, which could not be written to.
        result = x.new_empty(*x.shape[:-1], weight.shape[0])
        out, first = result.view(-1, weight.shape[0]), bias
        if bias is None and isinstance(ends, Ends) and ends.p.dtype == x.dtype:
            # The larger product comes last, since it reads what it adds to at no cost.
            _add(result, *ends, scale=scale, beta=0)
            first = out
        rows, beta = x.flatten(0, -2), int(first is not None)
        torch.addmm(out if first is None else first, rows, weight.mT, beta=beta, out=out)
        if isinstance(ends, Tensor):
            result.add_(ends.reshape(result.shape))
        elif first is bias:
            _add(result, *ends, scale=scale)
        return result

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        for_x, for_weight, for_bias, _, _, for_down, *for_factors = ctx.needs_input_grad
        x, weight, product, down, *factors = ctx.saved_tensors
        rows = gradient.reshape(-1, weight.shape[0])
        of_bias = rows.sum(0) if for_bias else None
        if torch.is_grad_enabled() or is_batched(gradient):
            of_x, of_weight, *others = gradients_again(
                functools.partial(_plain, ctx.middle, ctx.scale),
                (x, weight, down, *factors),
                (for_x, for_weight, for_down, *for_factors),
                (gradient,),
            )
            return of_x, of_weight, of_bias, None, None, *others
        product = _first_product(x, down) if product is None else product
        gradients = _through_middle(ctx, rows, product, factors, (for_x or for_down, *for_factors))
        of_product, *of_factors = cast(list[Tensor], gradients)  # None where none is wanted
        of_x = of_down = None
        if for_x:
            if down is not None:
                of_x = mixed_precision.up(of_product, down.mT, x)
            else:
                of_x = of_product.reshape(x.shape)
                if not hasattr(ctx.middle, "gradients"):
                    # Autograd may return the memory of a factor's gradient, or of that given.
                    of_x = of_x.clone(memory_format=torch.contiguous_format)
            of_x.view(-1, x.shape[-1]).addmm_(rows, weight)
        if for_down:
            of_down = mixed_precision.across(of_product, _as_operand(x, down)).mT
        of_weight = rows.mT @ x.flatten(0, -2) if for_weight else None
        return of_x, of_weight, of_bias, None, None, of_down, *of_factors


def _plain(
    middle: Middle, scale: float, x: Tensor, weight: Tensor, down: Tensor | None, *factors: Tensor
) -> Tensor:
    """Return a linear layer's output without its bias, plus a chain, by torch's own operations."""
    result, delta = F.linear(x, weight), Chain(x, down, factors, middle, scale).delta()
    return (result + delta.reshape(result.shape)).to(result.dtype)


def _through_middle(
    ctx: _Context, rows: Tensor, product: Tensor, factors: Sequence[Tensor], wanted: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Return the gradients for a chain's first product and its factors, those wanted, by that for
    the rows of the output.
    """
    gradients = getattr(ctx.middle, "gradients", None)
    if gradients is not None and rows.dtype == factors[0].dtype:
        return gradients(rows.contiguous(), product, factors, wanted)

    def of_ends(p: Tensor, up: Tensor, for_p: bool, for_up: bool) -> list[Tensor | None]:
        gradient = rows.reshape(*p.shape[:-1], up.shape[-1])
        return [
            mixed_precision.down(gradient, up.mT, ctx.scale) if for_p else None,
            mixed_precision.across(p, gradient, ctx.scale) if for_up else None,
        ]

    if ctx.middle is Ends:
        return of_ends(product, factors[0], *wanted)
    if not any(wanted):
        return [None] * len(wanted)
    sources = [
        tensor.detach().requires_grad_(want)
        for tensor, want in zip((product, *factors), wanted, strict=True)
    ]
    with torch.enable_grad():
        ends = ctx.middle(*sources)
    results, of_results = (
        ((ends,), [rows.reshape(ends.shape).to(ends.dtype)])
        if isinstance(ends, Tensor)
        else (ends, of_ends(*ends, ends.p.requires_grad, ends.up.requires_grad))
    )
    pairs = [pair for pair in zip(results, of_results, strict=True) if pair[0].requires_grad]
    computed = iter(
        torch.autograd.grad(
            [result for result, _ in pairs],
            [source for source in sources if source.requires_grad],
            [of_result for _, of_result in pairs],
            allow_unused=True,
        )
    )
    return [next(computed) if want else None for want in wanted]
