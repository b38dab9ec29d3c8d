# SPDX-License-Identifier: Apache-2.0
"""The fused path of a layer: its delta as a chain of products, computed together with the base
layer's product.

Reading or writing an activation once more costs more on a wide layer than an adapter's few
multiplications. So the chain's last product is added into the memory of the base layer's output,
and its gradient for the input into that of the base layer.

`dispatch` chooses between this path, the base layer's output with the chain added to it, and the
plain path, `base(x) + chain.delta()`.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.errors import PeftRuntimeError
from . import mixed_precision
from .derivatives import gradients_again
from .dispatch import is_batched, owns_output, shapes
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
itself, in the order of the output's elements.
"""


class InPlaceMiddle(ABC):
    """A `Middle` that computes a whole chain of one dtype with little memory beside the layer's."""

    @abstractmethod
    def __call__(self, product: Tensor, *factors: Tensor) -> Ends | Tensor:
        """Return the chain's ends, or the delta."""

    @abstractmethod
    def add(
        self, result: Tensor, x: Tensor, down: Tensor | None, *factors: Tensor, beta: int
    ) -> None:
        """Write `beta · result` plus the delta into `result`; all activations are contiguous."""

    @abstractmethod
    def gradients(
        self,
        x: Tensor,
        gradient: Tensor,
        wanted: Sequence[bool],
        down: Tensor | None,
        *factors: Tensor,
    ) -> list[Tensor | None]:
        """Return the gradients for `x`, in new memory, `down` and the factors: those wanted."""


class LowRankChain(NamedTuple):
    """A delta of two products, `Δ = scale · (x · down) · up`.

    Attributes:
        x: The layer's input in the adapter's precision.
        down: `[in, r]`, or `[n, in, r]` with `x` read as `[n, rows, in]`.
        up: `[r, out]`, or `[n, r, out]`.
        scale: A number, or a tensor without a gradient: of no dimensions, or `[rows, 1]` with a
            scale for each row of `x` for `down [in, r]`.

    Example:
        >>> LowRankChain(torch.ones(1, 2), torch.ones(2, 1), torch.ones(1, 3), scale=0.5).delta()
        tensor([[1., 1., 1.]])
    """

    x: Tensor
    down: Tensor
    up: Tensor
    scale: float | Tensor = 1.0

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors after the first product."""
        return (self.up,)

    def delta(self) -> Tensor:
        """Return the delta, `[rows, out]` for `down [in, r]`, else `[n, rows, out]`."""
        return scaled(_first_product(self.x, self.down), self.scale) @ self.up


class FunctionChain(NamedTuple):
    """A delta of a first product, a function and a last product: `Δ = p · up` with
    `p, up = middle(x · down, *factors)`.

    Attributes:
        x: The layer's input in the adapter's precision.
        factors: Its other arguments, all that it depends on.
        down: `[k, m]` with `x` read as `[rows, k]`, or `[n, k, m]` with `x` read as `[n, rows, k]`;
            None where `middle` takes `x` itself.
    """

    x: Tensor
    middle: Middle
    factors: tuple[Tensor, ...]
    down: Tensor | None = None

    def delta(self) -> Tensor:
        """Return the delta; its elements are in the output's order, but its shape may differ."""
        ends = self.middle(_first_product(self.x, self.down), *self.factors)
        return ends if isinstance(ends, Tensor) else ends.p @ ends.up


Chain: TypeAlias = LowRankChain | FunctionChain


def linear_with_chain(layer: nn.Module, x: Tensor, chain: Chain) -> Tensor:
    """Return `layer(x) + Δ` for a layer that `dispatch.can_fuse`."""
    _check_values(chain)
    weight, bias = cast(Tensor, layer._parameters["weight"]), layer._parameters["bias"]
    middle, scale = _middle(chain)
    if chain.x is x and torch.is_grad_enabled():
        return _LinearWithChain.apply(x, weight, bias, middle, scale, chain.down, *chain.factors)
    in_place = _in_place(middle, x, chain.factors)
    if in_place is not None and not torch.is_grad_enabled():
        return _linear_in_place(in_place, x, weight, bias, chain.down, chain.factors)
    return _add_chain(chain, F.linear(x, weight, bias), in_place=True)


def add_to_output(layer: nn.Module, chain: Chain, result: Tensor) -> Tensor:
    """Return a base layer's output plus a chain's delta, in place if nothing else can hold it."""
    _check_values(chain)
    return _add_chain(chain, result, owns_output(layer))


def _check_values(chain: Chain) -> None:
    """Raise for factors on the meta device: their products have no values, and torch adds them."""
    if chain.factors[-1].is_meta:
        raise PeftRuntimeError(
            "The adapter is on the meta device and has no values yet: load a checkpoint into it, "
            "or run the function that initializes it."
        )


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


def as_operand(x: Tensor, down: Tensor) -> Tensor:
    """Reshape `x` for the product with `down`."""
    if down.dim() == 2:
        return x.reshape(-1, down.shape[0])
    n, k, _ = down.shape
    return x.reshape(n, -1 if math.prod(shapes(x)[0]) else 0, k)


def _add_chain(chain: Chain, result: Tensor, in_place: bool) -> Tensor:
    """Return `result` plus a chain's delta."""
    if isinstance(chain, LowRankChain):
        p, up, scale = _first_product(chain.x, chain.down), chain.up, chain.scale
        if isinstance(scale, Tensor):
            p, scale = p * scale, 1.0
    else:
        ends = chain.middle(_first_product(chain.x, chain.down), *chain.factors)
        if isinstance(ends, Tensor):
            if (
                in_place
                and result.dtype == ends.dtype
                and result.is_contiguous()
                and not torch.is_grad_enabled()
            ):
                result.view(ends.shape).add_(ends)
                return result
            return result + ends.reshape(result.shape)
        (p, up), scale = ends, 1.0
    return add_product(result, p, up, in_place, scale)


def _middle(chain: Chain) -> tuple[Middle | None, float]:
    """Return a chain's function and 1; for a low-rank chain with a number as scale, None and it."""
    if isinstance(chain, FunctionChain):
        return chain.middle, 1.0
    scale = chain.scale
    if isinstance(scale, Tensor):
        return (lambda h, up: Ends(h * scale, up)), 1.0
    return None, scale


def _in_place(middle: Middle | None, x: Tensor, factors: Sequence[Tensor]) -> InPlaceMiddle | None:
    """Return a chain's function if it computes this chain in place."""
    is_one = isinstance(middle, InPlaceMiddle) and factors[0].dtype == x.dtype
    return middle if is_one else None  # type: ignore[return-value]


def _linear_in_place(
    middle: InPlaceMiddle,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    factors: Sequence[Tensor],
) -> Tensor:
    """Return a linear layer's output plus a chain, untracked by autograd. Without a bias the
    layer's product is added to the chain's, since it reads what it adds to at no cost.
    """
    result = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows, out = x.view(-1, x.shape[-1]), result.view(-1, weight.shape[0])
    if bias is not None:
        torch.addmm(bias, rows, weight.mT, out=out)
    middle.add(result, x, down, *factors, beta=0 if bias is None else 1)
    if bias is None:
        out.addmm_(rows, weight.mT)
    return result


def _first_product(x: Tensor, down: Tensor | None) -> Tensor:
    if down is None:
        return x
    rows = as_operand(x, down)
    return rows @ down if x.dtype == down.dtype else mixed_precision.down(rows, down)


def _add(
    result: Tensor, p: Tensor, up: Tensor, in_place: bool = True, scale: float = 1.0
) -> Tensor:
    """Return `result + scale · p · up` in the precision of `result`, untracked by autograd."""
    if not in_place or not (result.dtype == p.dtype == up.dtype):
        return mixed_precision.add(result, scaled(p, scale), up, in_place)
    product = result.view(*p.shape[:-1], up.shape[-1])
    add = product.addmm_ if p.dim() == 2 else product.baddbmm_
    add(p, up, alpha=scale)
    return result


class _Context(Protocol):
    """Attributes of the autograd context that this file uses."""

    middle: Middle | None
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
    """Add a chain to a linear layer, and the chain's gradient for the input to the layer's.

    Backward keeps the input, the factors, and the first product where that is small. It runs the
    chain's function again to differentiate it.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        middle: Middle | None,
        scale: float,
        down: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        ctx.middle, ctx.scale = middle, scale
        if (in_place := _in_place(middle, x, factors)) is not None:
            ctx.save_for_backward(x, weight, None, down, *factors)
            return _linear_in_place(in_place, x, weight, bias, down, factors)
        # The output of `linear` may be a view, which could not be written to.
        result = x.new_empty(*x.shape[:-1], weight.shape[0])
        rows, out = x.flatten(0, -2), result.view(-1, weight.shape[0])
        if bias is None:
            torch.mm(rows, weight.mT, out=out)
        else:
            torch.addmm(bias, rows, weight.mT, out=out)
        product = _first_product(x, down)
        small = product.numel() * _SMALL <= x.numel()
        ctx.save_for_backward(x, weight, product if small else None, down, *factors)
        if middle is None:
            (up,) = factors
            return _add(result, product, up, scale=scale)
        # Detached, since `matmul` rounds differently if an operand requires a gradient.
        ends = middle(product.detach(), *[tensor.detach() for tensor in factors])
        if isinstance(ends, Tensor):
            return result.add_(ends.view(result.shape))
        return _add(result, *ends)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, kept, down, *factors = ctx.saved_tensors
        for_x, for_weight, for_bias, _, _, for_down, *for_factors = ctx.needs_input_grad
        if torch.is_grad_enabled() or is_batched(gradient):
            plain = functools.partial(_plain, ctx.middle, ctx.scale)
            of_x, of_weight, *others = gradients_again(
                plain,
                (x, weight, down, *factors),
                (for_x, for_weight, for_down, *for_factors),
                (gradient,),
            )
            of_bias = gradient.reshape(-1, weight.shape[0]).sum(0) if for_bias else None
            return of_x, of_weight, of_bias, None, None, *others
        rows, of_x = gradient.flatten(0, -2), None
        if (in_place := _in_place(ctx.middle, x, factors)) is not None:
            rows = rows.contiguous()
            wanted = (for_x, for_down, *for_factors)
            of_x, *others = in_place.gradients(x, rows, wanted, down, *factors)
            if of_x is not None:
                of_x = of_x.view(-1, x.shape[-1]).addmm_(rows, weight).view(x.shape)
        else:
            product = _first_product(x, down) if kept is None else kept
            through = _through_product if ctx.middle is None else _through_middle
            gradients = through(ctx, gradient, product, factors, (for_x or for_down, *for_factors))
            of_product, *of_factors = cast(list[Tensor], gradients)  # None where none is wanted
            if for_x:
                of_x = (gradient @ weight).contiguous()
                of_x = of_x.add_(of_product) if down is None else _add(of_x, of_product, down.mT)
            of_down = (
                mixed_precision.across(of_product, as_operand(x, down)).mT if for_down else None
            )
            others = [of_down, *of_factors]
        return (
            of_x,
            rows.mT @ x.flatten(0, -2) if for_weight else None,
            rows.sum(0) if for_bias else None,
            None,
            None,
            *others,
        )


def _plain(
    middle: Middle | None,
    scale: float,
    x: Tensor,
    weight: Tensor,
    down: Tensor | None,
    *factors: Tensor,
) -> Tensor:
    """Return a linear layer's output without its bias, plus a chain, by torch's own operations."""
    result = F.linear(x, weight)
    product = _first_product(x, down)
    ends = Ends(scaled(product, scale), *factors) if middle is None else middle(product, *factors)
    delta = ends if isinstance(ends, Tensor) else ends.p @ ends.up
    return (result + delta.reshape(result.shape)).to(result.dtype)


def _through_product(
    ctx: _Context, gradient: Tensor, p: Tensor, factors: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients for `p` and `up` of `scale · p · up`."""
    (up,), (for_p, for_up) = factors, wanted
    rows = gradient.reshape(*p.shape[:-1], up.shape[-1])
    return [
        mixed_precision.down(rows, up.mT, ctx.scale) if for_p else None,
        mixed_precision.across(p, rows, ctx.scale) if for_up else None,
    ]


def _through_middle(
    ctx: _Context,
    gradient: Tensor,
    product: Tensor,
    factors: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Backpropagate to the first product and the factors; return their gradients."""
    sources = [
        tensor.detach().requires_grad_(want)
        for tensor, want in zip((product, *factors), wanted, strict=True)
    ]
    assert ctx.middle is not None
    with torch.enable_grad():
        ends = ctx.middle(*sources)
    of_ends: list[tuple[Tensor, Callable[[], Tensor]]]
    if isinstance(ends, Tensor):
        of_ends = [(ends, lambda: gradient.reshape(ends.shape).to(ends.dtype))]
    else:
        p, up = ends
        rows = gradient.reshape(*p.shape[:-1], up.shape[-1])
        of_ends = [
            (p, lambda: mixed_precision.down(rows, up.mT)),
            (up, lambda: mixed_precision.across(p, rows)),
        ]
    of_ends = [(end, make) for end, make in of_ends if end.requires_grad]
    trained = [tensor for tensor, want in zip(sources, wanted, strict=True) if want]
    if not trained:
        return [None] * len(sources)
    found = iter(
        torch.autograd.grad(
            [end for end, _ in of_ends], trained, [make() for _, make in of_ends], allow_unused=True
        )
    )
    return [next(found) if want else None for want in wanted]
