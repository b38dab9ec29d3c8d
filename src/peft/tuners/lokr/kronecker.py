# SPDX-License-Identifier: Apache-2.0
"""Structured Kronecker products: the math of LoKr in pure functions of tensors.

`ΔW = scale · (W1 ⊗ W2)` with `W1 [a, b]`, `W2 [c, d, *kernel]`, `out = a·c`, `in = b·d` (a
convolution's `in` is its `in_channels // groups`), and
`ΔW[i·c + p, j·d + q] = scale · W1[i, j] · W2[p, q]`.

Each side of the product is a sequence of small linear maps `[to, from]`, the first applied first;
one map of `W2` may have a kernel:

    W1             [a, b]                                b -> a
    W1 low rank    w1_b [r, b], w1_a [a, r]              b -> r -> a
    W2             [c, d, *kernel]                       d -> c
    W2 low rank    w2_b [r, d, *kernel], w2_a [c, r]     d -> r -> c
    W2 Tucker      w2_b [r, d], t2 [r, r, *kernel], w2_aᵀ [c, r]     d -> r -> r -> c

The maps of a side multiply to its small dense matrix. To apply the product to an input, its
channels are read as a grid `[b, d]`; the maps of `W1` apply along `b`, those of `W2` along `d`. The
two sides commute, so the maps may alternate in any order; `contraction_order` finds the order with
the fewest multiplications. No tensor of size `out x in` is allocated.

Source: arXiv:2309.14859, eq. 4 and appendix B.3 (LoKr); arXiv:2212.10650 (KronA)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base.tracing import shapes
from ...ops.fused_linear import Chain
from ...ops.mixed_precision import widened
from .blocks import BLOCKS
from .order import Contraction, State, contraction_order

Maps: TypeAlias = tuple[Tensor, ...]
"""Maps `[to, from]` of one side of the product, the first applied first."""

MapShapes: TypeAlias = tuple[Sequence[int], ...]

Pair: TypeAlias = tuple[int, int]

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class KroneckerFactors(NamedTuple):
    """Tensors of one adapter on one layer; those that it does not use are None.

    Attributes:
        w1: `[a, b]`, or None when low rank.
        w1_a, w1_b: `[a, r]` and `[r, b]`, with `W1 = w1_a · w1_b`.
        w2: `[c, d, *kernel]`, or None when low rank.
        w2_a, w2_b: `[c, r]` and `[r, d · prod(kernel)]`, with `W2 = w2_a · w2_b`; beside `t2`:
            `[r, c]` and `[r, d]`.
        t2: `[r, r, *kernel]` (one-dimensional kernels are stored `[r, r, k, 1]`), with
            `W2[p, q, κ] = Σ_ij t2[i, j, κ] · w2_a[i, p] · w2_b[j, q]`.

    Source: arXiv:2309.14859, eq. 4; `t2`: arXiv:2108.06098, proposition 3
    """

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensors."""
        return next(tensor.dtype for tensor in self if tensor is not None)


def dense_left(f: KroneckerFactors) -> Tensor:
    """Return the small dense `W1 [a, b]`; a low-rank pair costs `a·r·b` multiplications.

    Source: arXiv:2309.14859, eq. 4
    """
    return multiply(left_maps(f))


def dense_right(f: KroneckerFactors, kernel: Sequence[int] = ()) -> Tensor:
    """Return the small dense `W2 [c, d, *kernel]`; a low-rank pair costs `c·r·d·taps`
    multiplications, Tucker `(c + r)·r·d·taps`, with `taps = prod(kernel)`.

    Source: arXiv:2309.14859, eq. 4; arXiv:2108.06098, proposition 3
    """
    return multiply(right_maps(f, kernel))


def kronecker_weight(
    f: KroneckerFactors,
    kernel: Sequence[int] = (),
    scale: float | Tensor = 1.0,
    flat: bool = False,
) -> Tensor:
    """Return the dense `ΔW = scale · (W1 ⊗ W2)` for merging:
    `ΔW[i·c + p, j·d + q] = scale · W1[i, j] · W2[p, q]`.

    With `flat` it is `scale · (W2 ⊗ W1)`: `ΔW[p·a + i, q·b + j] = scale · W1[i, j] · W2[p, q]`.
    Files of Hugging Face PEFT 0.21.2 mean that product for a full three-dimensional `W2`
    (`nn.Conv1d`), since it computes `torch.kron(W1, W2).reshape(out, in, k)`: `torch.kron` adds the
    missing axis of `W1` in front, which pairs `a` with `d` and `b` with `k`.

    Args:
        f: The adapter's tensors.
        kernel: Kernel size of a convolution; empty for a linear layer.
        scale: A number or a zero-dimensional tensor.
        flat: Swap the two sides.

    Returns:
        `[a·c, b·d, *kernel]`, at one multiplication per element.

    Source: arXiv:2309.14859, eq. 4
    """
    W1, W2 = dense_left(f) * scale, dense_right(f, kernel)
    major, minor = (W2, W1) if flat else (W1, W2)
    return torch.einsum("ab...,cd...->acbd...", major, minor).flatten(0, 1).flatten(1, 2)


def kronecker_linear(x: Tensor, f: KroneckerFactors, scale: float | Tensor = 1.0) -> Tensor:
    """Apply `y = scale · (W1 ⊗ W2) x`, which is `Y = scale · W1 · X · W2ᵀ` with `x` read as
    `X [b, d]`.

    Multiplications per row, both sides full: `min(b·d·c + b·c·a, b·d·a + d·a·c)` in place of
    `a·b·c·d`. The maps of a low-rank `W2` are applied one by one or multiplied first, whichever
    `contraction_order` finds cheaper; those of `W1`, which is small, are multiplied first.

    Args:
        x: `[..., in]`.
        f: The adapter's tensors, in the dtype of `x` (or under autocast).
        scale: A number or a zero-dimensional tensor; multiplied into the smallest factor.

    Returns:
        `[..., out]`.

    Example:
        >>> w1, w2 = torch.tensor([[2.0]]), torch.tensor([[1.0, 1.0], [0.0, 3.0]])
        >>> f = KroneckerFactors(w1=w1, w2=w2)
        >>> kronecker_linear(torch.tensor([[1.0, 2.0]]), f)
        tensor([[ 6., 12.]])

    Source: arXiv:2212.10650; arXiv:2309.14859, eq. 4
    """
    (a, _), (c, _) = shapes(left_maps(f)[-1], right_maps(f, ())[-1])
    return kronecker_chain(x, f, scale).delta().reshape(*x.shape[:-1], a * c)


def kronecker_chain(x: Tensor, f: KroneckerFactors, scale: float | Tensor = 1.0) -> Chain:
    """Return `kronecker_linear` as a chain of products, for `ops.fused_linear`.

    Its steps are a product `x [rows·b, d]` with maps of `W2`, the blocks' product with `W1`, and a
    product with the other maps of `W2`. Whichever takes fewer multiplications, all maps of `W2`
    come before `W1`, after it, or `W1` between two of them.

    Args:
        x: `[..., in]`.
        f: The adapter's tensors.
        scale: A number or a zero-dimensional tensor; multiplied into the smallest factor.

    Source: arXiv:2309.14859, eq. 4
    """
    w1s, w2s = _fold_scale(left_maps(f), right_maps(f, ()), scale)
    w1 = multiply(w1s)
    # Of two equally cheap orders, the one that begins with `W1` has fewer products in backward; the
    # other one begins with a product, which can read an input in another precision.
    order = cheapest_order((w1,), w2s, left_first=x.dtype == w1.dtype).states
    n = next(j for i, j in order if i == 1)
    up = (multiply(w2s[n:]).T,) if n < len(w2s) else ()
    if n == 0:
        return Chain(widened(x, w1.dtype), None, (w1, *up), BLOCKS)
    return Chain(x, multiply(w2s[:n]).T, (w1, *up), BLOCKS)


def kronecker_conv(
    x: Tensor,
    f: KroneckerFactors,
    *,
    kernel: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    scale: float | Tensor = 1.0,
    flat: bool = False,
) -> Tensor:
    """Convolve with `scale · (W1 ⊗ W2)`, without bias:
    `Y[i] = scale · Σ_j W1[i, j] · conv(X[j], W2)`.

    Blocks of `d` channels are convolved with the block index in the batch. Only the map with the
    kernel is a convolution; all others are pointwise. Multiplications per output position, both
    sides full: `min(b·c·(d·taps) + b·c·a, σ·b·d·a + a·c·(d·taps))` in place of `a·b·c·d·taps`, with
    `taps = prod(kernel)` and `σ = prod(stride)`.

    With groups, `ΔW` is `[out, in // groups, *kernel]` and each group has an equal share of its
    rows, in order. If `groups` divides `a`, a group has whole blocks of `c` rows: the left side is
    grouped. If `a` divides `groups`, a block has whole groups: the right side is grouped too.
    Otherwise each group is cut into equal parts that read the same input until `a` divides their
    number. A depthwise `ΔW` has one input column per row and is no larger than an activation, so it
    is built.

    Args:
        x: `[batch, in_channels, *space]` or `[in_channels, *space]`, 1 to 3 spatial dimensions.
        f: The adapter's tensors, in the dtype of `x` (or under autocast).
        kernel: Kernel size, one number per spatial dimension.
        stride, padding, dilation, groups: As in `torch.nn.functional.conv2d`; padding is with
            zeros.
        scale: A number or a zero-dimensional tensor; multiplied into the smallest factor.
        flat: Swap the two sides, as in `kronecker_weight`.

    Returns:
        `[batch, out, *space']` or `[out, *space']`.

    Source: arXiv:2309.14859, eq. 4; arXiv:2108.06098, proposition 3
    """
    conv = functools.partial(_CONV[len(kernel)], stride=stride, padding=padding, dilation=dilation)
    w1s, w2s = _fold_scale(left_maps(f), right_maps(f, kernel), scale)
    (a, *_), (_, b, *_), (c, *_), (_, d, *_) = shapes(w1s[-1], w1s[0], w2s[-1], w2s[0])
    if b * d == 1:
        return conv(x, kronecker_weight(f, kernel, scale, flat), groups=groups)
    batched = x if x.dim() == len(kernel) + 2 else x[None]
    # The slower index of the output channels; groups divide it.
    major, grid_shape = (c, (d, b)) if flat else (a, (b, d))
    if major % groups and groups % major:
        parts = major // math.gcd(major, groups)
        batched = batched.unflatten(1, (groups, -1)).repeat_interleave(parts, dim=1).flatten(1, 2)
        groups *= parts
    shared = math.gcd(major, groups)
    grid = batched.unflatten(1, (shared, groups // shared, *grid_shape)).movedim(2, 3)
    positions = stride ** len(kernel) if isinstance(stride, int) else math.prod(stride)
    grid = grid.movedim((1, 2), (3, 4)) if flat else grid
    (_, left_groups, _, right_groups, *_), *_ = shapes(grid)
    order = cheapest_order(w1s, w2s, (left_groups, right_groups), positions).states
    y = _apply_maps(grid, w1s, w2s, order, conv)
    y = (y.movedim((1, 2), (3, 4)) if flat else y).flatten(1, 4)
    return y if x.dim() == y.dim() else y[0]


def left_maps(f: KroneckerFactors) -> Maps:
    """Return the maps of `W1`."""
    if f.w1 is not None:
        return (f.w1,)
    assert f.w1_a is not None and f.w1_b is not None
    return f.w1_b, f.w1_a


def right_maps(f: KroneckerFactors, kernel: Sequence[int]) -> Maps:
    """Return the maps of `W2`; the one with the kernel is `[to, from, *kernel]`."""
    if f.w2 is not None:
        return (f.w2.reshape(*f.w2.shape[:2], *kernel) if kernel else f.w2,)
    assert f.w2_a is not None and f.w2_b is not None
    if f.t2 is not None:
        return f.w2_b, f.t2.reshape(*f.t2.shape[:2], *kernel), f.w2_a.T
    return f.w2_b.reshape(f.w2_b.shape[0], -1, *kernel) if kernel else f.w2_b, f.w2_a


def multiply(maps: Maps) -> Tensor:
    """Multiply consecutive maps into one `[to, from, *kernel]`."""
    first = maps[0]
    for then in maps[1:]:
        first = torch.einsum("tm...,ms...->ts...", then, first)
    return first


def _fold_scale(w1s: Maps, w2s: Maps, scale: float | Tensor) -> tuple[Maps, Maps]:
    """Multiply the smallest of all maps by `scale`."""
    if not isinstance(scale, Tensor) and scale == 1:
        return w1s, w2s
    maps = [*w1s, *w2s]
    sizes = [math.prod(shape) for shape in shapes(*maps)]
    smallest = sizes.index(min(sizes))
    maps[smallest] = maps[smallest] * scale
    return tuple(maps[: len(w1s)]), tuple(maps[len(w1s) :])


def cheapest_order(
    w1s: Maps, w2s: Maps, groups: Pair = (1, 1), positions: int = 1, left_first: bool = False
) -> Contraction:
    """Return the cheapest order of contraction, for the groups of both sides; `positions` is inputs
    per output position.
    """
    # `torch.compile` warns about cached functions.
    find = _contraction if torch.compiler.is_compiling() else _cached_contraction
    return find(tuple(shapes(*w1s)), tuple(shapes(*w2s)), groups, positions, left_first)


def _contraction(
    left: MapShapes, right: MapShapes, groups: Pair, positions: int, left_first: bool
) -> Contraction:
    spatial = next((j for j, shape in enumerate(right) if len(shape) > 2), -1)
    return contraction_order(
        (*(shape[1] for shape in left), left[-1][0] // groups[0]),
        (*(shape[1] for shape in right), right[-1][0] // groups[1]),
        spatial=spatial,
        taps=math.prod(right[spatial][2:]),
        stride=positions,
        left_first=left_first,
    )


_cached_contraction = functools.cache(_contraction)


def _apply_maps(
    z: Tensor,
    w1s: Maps,
    w2s: Maps,
    order: Sequence[State],
    conv: Callable[..., Tensor],
) -> Tensor:
    """Apply the maps of both sides to `z [n, g1, b, g2, d, *space]` in an order, which gives
    `[n, g1, a // g1, g2, c // g2, *space']` at its end.

    The `g1` groups of the left side share all its maps but the last, whose rows they divide; so do
    the `g2` groups of the right side. `conv` convolves with the map that has the kernel.
    """
    i = j = 0
    (_, left_groups, _, right_groups, *_), *_ = shapes(z)
    for to_i, to_j in order:
        if to_i > i:
            z = _pointwise(z, multiply(w1s[i:to_i]), 2, left_groups if to_i == len(w1s) else 1)
        else:
            w, groups = multiply(w2s[j:to_j]), right_groups if to_j == len(w2s) else 1
            z = _pointwise(z, w, 4, groups) if w.dim() == 2 else _spatial(z, w, groups, conv)
        i, j = to_i, to_j
    return z


def _pointwise(z: Tensor, w: Tensor, axis: int, groups: int) -> Tensor:
    """Apply `w [groups · to, from]` along `axis` of `z`; the axis before it indexes the groups."""
    y = torch.matmul(w.reshape(groups, -1, w.shape[1]), z.flatten(axis + 1))
    return y.unflatten(-1, z.shape[axis + 1 :])


def _spatial(z: Tensor, w: Tensor, groups: int, conv: Callable[..., Tensor]) -> Tensor:
    """Convolve `z [n, g1, s1, g2, from, *space]` with `w [groups · to, from, *kernel]`, with the
    axes before `from` in the batch.
    """
    batch = z.shape[:3] if groups > 1 else z.shape[:4]
    flat = z.flatten(0, len(batch) - 1).flatten(1, -w.dim() + 1)
    y = conv(flat, w, groups=groups)
    return y.reshape(*z.shape[:4], w.shape[0] // groups, *y.shape[2:])
