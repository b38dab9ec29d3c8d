# SPDX-License-Identifier: Apache-2.0
"""Structured Kronecker products: the pure maths of LoKr.

`ΔW = scale · (W1 ⊗ W2)` with `W1 [a, b]`, `W2 [c, d, *kernel]`, `out = a·c`, `in = b·d` (a
convolution's `in` is its `in_channels // groups`), and
`ΔW[i·c + p, j·d + q] = scale · W1[i, j] · W2[p, q]`.

One picture serves everything here. Each side of the product is a *chain* of small linear maps
`[to, from]`, the first applied first; one map of `W2` may carry a kernel:

    W1             [a, b]                                b -> a
    W1 low rank    w1_b [r, b], w1_a [a, r]              b -> r -> a
    W2             [c, d, *kernel]                       d -> c
    W2 low rank    w2_b [r, d, *kernel], w2_a [c, r]     d -> r -> c
    W2 Tucker      w2_b [r, d], t2 [r, r, *kernel], w2_aᵀ [c, r]     d -> r -> r -> c

Composing a chain gives the small dense matrix. Applying the product means reading the input's
channels as a grid `b x d` and walking the left chain down one side of it and the right chain along
the other. Every order of these moves gives the same result; `contraction_order` picks the cheapest.
Nothing of size `out x in` exists on the way.

Source: arXiv:2309.14859, eq. 4 and appendix B.3 (LoKr); arXiv:2212.10650 (KronA)
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.dispatch import shapes
from ...ops.fused_linear import Ends, FunctionChain, Middle
from ...ops.mixed_precision import widened
from .order import State, contraction_order

Chain = tuple[Tensor, ...]
Shapes = tuple[Sequence[int], ...]
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class KroneckerFactors(NamedTuple):
    """One adapter's tensors on one layer; those it does not use are `None`.

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


def left(f: KroneckerFactors) -> Tensor:
    """Return the small dense `W1 [a, b]`; a low-rank pair costs `a·r·b` multiplications. Source:
    arXiv:2309.14859
    """
    return _compose(_left_chain(f))


def right(f: KroneckerFactors, kernel: Sequence[int] = ()) -> Tensor:
    """Return the small dense `W2 [c, d, *kernel]`, at `c·r·d·taps` multiplications, Tucker
    `(c + r)·r·d·taps`.

    Source: arXiv:2309.14859, eq. 4; arXiv:2108.06098, proposition 3
    """
    return _compose(_right_chain(f, kernel))


def kronecker_weight(
    f: KroneckerFactors, kernel: Sequence[int] = (), scale: float | Tensor = 1.0
) -> Tensor:
    """Return the dense `ΔW = scale · (W1 ⊗ W2)`, for merging:
    `ΔW[i·c + p, j·d + q] = scale · W1[i, j] · W2[p, q]`.

    Args:
        f: The adapter's tensors.
        kernel: Kernel size of a convolution; empty for a linear layer.
        scale: A number or a zero-dimensional tensor.

    Returns:
        `[a·c, b·d, *kernel]`, at one multiplication per element.

    Source: arXiv:2309.14859, eq. 4
    """
    return _kron(left(f) * scale, right(f, kernel))


def flat_kronecker_weight(
    f: KroneckerFactors, kernel: Sequence[int], scale: float | Tensor = 1.0
) -> Tensor:
    """Return the dense `scale · (W2 ⊗ W1)`: `kronecker_weight` with the two sides swapped.

    Hugging Face PEFT 0.21.2 computes `torch.kron(W1, W2).reshape(out, in, k)` for a full
    three-dimensional `W2` (`nn.Conv1d`). The missing axis of `W1` is added in front, which pairs
    `a` with `d` and `b` with `k`; read back in memory order the result is
    `ΔW[p·a + i, q·b + j] = scale · W1[i, j] · W2[p, q]`. So such a file is a true Kronecker product
    too, in the other order, and every fast path holds for it (`kronecker_conv(flat=True)`).

    Args:
        f: The adapter's tensors.
        kernel: Kernel size of the convolution.
        scale: A number or a zero-dimensional tensor.

    Returns:
        `[c·a, d·b, *kernel]`, at one multiplication per element.

    Source: arXiv:2309.14859, eq. 4, with the order of files written by Hugging Face PEFT
    """
    return _kron(right(f, kernel), left(f) * scale)


def kronecker_linear(x: Tensor, f: KroneckerFactors, scale: float | Tensor = 1.0) -> Tensor:
    """Apply `y = scale · (W1 ⊗ W2) x`, that is `Y = scale · W1 · X · W2ᵀ` with `X = x` read as
    `[b, d]`.

    Multiplications per row, both sides full: `min(b·d·c + b·c·a, b·d·a + d·a·c)` in place of
    `a·b·c·d`; low-rank sides are walked or multiplied out, whichever `contraction_order` finds
    cheaper.

    Args:
        x: `[..., in]`.
        f: The adapter's tensors, in the dtype of `x` (or under autocast).
        scale: A number or a zero-dimensional tensor; it goes into the smallest factor.

    Returns:
        `[..., out]`.

    Example:
        >>> f = KroneckerFactors(w1=torch.tensor([[2.0]]), w2=torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
        >>> kronecker_linear(torch.tensor([[1.0, 2.0]]), f)
        tensor([[ 6., 12.]])

    Source: arXiv:2212.10650; arXiv:2309.14859, eq. 4
    """
    w1s, w2s = _left_chain(f), _right_chain(f, ())
    (a, _), (c, _) = shapes(w1s[-1], w2s[-1])
    return kronecker_chain(x, f, scale).delta().reshape(*x.shape[:-1], a * c)


def kronecker_chain(x: Tensor, f: KroneckerFactors, scale: float | Tensor = 1.0) -> FunctionChain:
    """Return `kronecker_linear` as a chain: first `x.view(rows·b, d)` times `[d, k]`, where the
    cheapest order begins with the right side, and last `[rows·a, k]` times `[k, c]`, where it ends
    with that, or `[a, k]` times `[rows, k, c]`.

    Source: arXiv:2309.14859, eq. 4
    """
    w1s, w2s = _fold_scale(_left_chain(f), _right_chain(f, ()), scale)
    # The compiler warns about caches.
    plan = _plan if torch.compiler.is_compiling() else _cached_plan
    begun, middle = plan(tuple(shapes(*w1s)), tuple(shapes(*w2s)))
    down = (w2s[0] if begun == 1 else _compose(w2s[:begun])).T if begun else None
    x = widened(x, w1s[0].dtype) if down is None else x
    return FunctionChain(x, middle, (*w1s, *w2s[begun:]), down)


def _plan(left: Shapes, right: Shapes) -> tuple[int, Middle]:
    """Return how many maps of the right chain are the first product, and the function of it that
    gives the last product.
    """
    order = _order_of_shapes(left, right)
    begun, (i, j), n_left = order[0][1], order[-2], len(left)
    a, b, k = left[-1][0], left[0][1], (*(shape[1] for shape in right), right[-1][0])[begun]
    # A last product with the left side forms that one's gradient for each row before summing: only
    # where it is no larger than the output.
    apart = j < len(right) or a <= right[-1][0]
    path = tuple([(to_i, to_j - begun) for to_i, to_j in order[begun > 0 : len(order) - apart]])
    left_alone = path == ((n_left, 0),)

    def middle(z: Tensor, *maps: Tensor) -> Ends | Tensor:
        w1s, w2s = maps[:n_left], maps[n_left:]
        if left_alone and not (torch.is_grad_enabled() or torch.jit.is_tracing()):
            grid = _compose(w1s) @ z.reshape(-1, b, k)
        else:
            grid = _walk(z.reshape(-1, 1, b, 1, k), w1s, w2s, path)
        if not apart:
            return grid.flatten(1)
        if j - begun < len(w2s):
            return Ends(grid.reshape(-1, grid.shape[-1]), _compose(w2s[j - begun :]).T)
        w1 = _compose(w1s[i:])
        ends = (
            w1.expand(grid.shape[0], *w1.shape),
            grid.reshape(grid.shape[0], w1.shape[1], grid.shape[-1]),
        )
        return Ends(*ends)

    return begun, middle


_cached_plan = functools.cache(_plan)


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
    """Convolve with `scale · (W1 ⊗ W2)` (no bias): `Y[i] = scale · Σ_j W1[i, j] · conv(X[j], W2)`.

    The convolution runs on blocks of `d` channels with the block index in the batch, and only the
    map with the kernel sees space; all others are pointwise. Multiplications per output position,
    both sides full: `min(b·c·(d·taps) + b·c·a, σ·b·d·a + a·c·(d·taps))` in place of `a·b·c·d·taps`,
    where `taps = prod(kernel)` and `σ = prod(stride)`.

    With groups, `ΔW` is `[out, in // groups, *kernel]` and its rows are dealt out in order. Groups
    hold whole blocks of `c` rows (`groups` divides `a`: group the left side), or blocks hold whole
    groups (`a` divides `groups`: group the right side too); otherwise each group is cut into equal
    parts that read the same input until that is so. A depthwise `ΔW` has one input column per row,
    no larger than an activation: that one is multiplied out.

    Args:
        x: `[batch, in_channels, *space]` or `[in_channels, *space]`, 1 to 3 spatial dimensions.
        f: The adapter's tensors, in the dtype of `x` (or under autocast).
        kernel: Kernel size, one number per spatial dimension.
        stride, padding, dilation, groups: As in `torch.nn.functional.conv2d`; padding is with
            zeros.
        scale: A number or a zero-dimensional tensor; it goes into the smallest factor.
        flat: Use the weight of `flat_kronecker_weight`.

    Returns:
        `[batch, out, *space']` or `[out, *space']`.

    Source: arXiv:2309.14859, eq. 4; arXiv:2108.06098, proposition 3
    """
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    w1s, w2s = _fold_scale(_left_chain(f), _right_chain(f, kernel), scale)
    (a, *_), (_, b, *_), (c, *_), (_, d, *_) = shapes(w1s[-1], w1s[0], w2s[-1], w2s[0])
    if b * d == 1:
        weight = (flat_kronecker_weight if flat else kronecker_weight)(f, kernel, scale)
        return _CONV[len(kernel)](x, weight, groups=groups, **options)
    batched = x if x.dim() == len(kernel) + 2 else x[None]
    major, sides = (
        (c, (d, b)) if flat else (a, (b, d))
    )  # the slow index of the channels; groups split it
    if major % groups and groups % major:
        parts = major // math.gcd(major, groups)
        batched = batched.unflatten(1, (groups, -1)).repeat_interleave(parts, dim=1).flatten(1, 2)
        groups *= parts
    shared = math.gcd(major, groups)
    grid = batched.unflatten(1, (shared, groups // shared, *sides)).movedim(2, 3)
    positions = stride ** len(kernel) if isinstance(stride, int) else math.prod(stride)
    grid = grid.movedim((1, 2), (3, 4)) if flat else grid
    (_, left_groups, _, right_groups, *_), *_ = shapes(grid)
    order = _order(w1s, w2s, left_groups, right_groups, positions)
    y = _walk(grid, w1s, w2s, order, **options)
    y = (y.movedim((1, 2), (3, 4)) if flat else y).flatten(1, 4)
    return y if x.dim() == y.dim() else y[0]


def _left_chain(f: KroneckerFactors) -> Chain:
    """Maps `[to, from]` of `W1`, the first applied first."""
    if f.w1 is not None:
        return (f.w1,)
    assert f.w1_a is not None and f.w1_b is not None
    return f.w1_b, f.w1_a


def _right_chain(f: KroneckerFactors, kernel: Sequence[int]) -> Chain:
    """Maps `[to, from]` of `W2`, the first applied first; the one with the kernel is
    `[to, from, *kernel]`.
    """
    if f.w2 is not None:
        return (f.w2.reshape(*f.w2.shape[:2], *kernel),)
    assert f.w2_a is not None and f.w2_b is not None
    if f.t2 is not None:
        return f.w2_b, f.t2.reshape(*f.t2.shape[:2], *kernel), f.w2_a.T
    return f.w2_b.reshape(f.w2_b.shape[0], -1, *kernel) if kernel else f.w2_b, f.w2_a


def _compose(chain: Chain) -> Tensor:
    """Multiply neighbouring maps into one `[to, from, *kernel]`."""
    first = chain[0]
    for then in chain[1:]:
        first = torch.einsum("tm...,ms...->ts...", then, first)
    return first


def _fold_scale(w1s: Chain, w2s: Chain, scale: float | Tensor) -> tuple[Chain, Chain]:
    """Multiply the smallest tensor of both chains by `scale`."""
    if not isinstance(scale, Tensor) and scale == 1:
        return w1s, w2s
    maps = [*w1s, *w2s]
    sizes = [math.prod(shape) for shape in shapes(*maps)]
    smallest = sizes.index(min(sizes))
    maps[smallest] = maps[smallest] * scale
    return tuple(maps[: len(w1s)]), tuple(maps[len(w1s) :])


def _kron(major: Tensor, minor: Tensor) -> Tensor:
    """`[a, b]` and `[c, d]`, one of them with `*kernel` behind, to `[a·c, b·d, *kernel]`."""
    return torch.einsum("ab...,cd...->acbd...", major, minor).flatten(0, 1).flatten(1, 2)


def _order(
    w1s: Chain, w2s: Chain, left_groups: int = 1, right_groups: int = 1, positions: int = 1
) -> tuple[State, ...]:
    """The states to pass through, with `positions` input positions per output position."""
    plan = (
        _order_of_shapes if torch.compiler.is_compiling() else _known_order
    )  # the compiler warns about caches
    return plan(tuple(shapes(*w1s)), tuple(shapes(*w2s)), left_groups, right_groups, positions)


def _order_of_shapes(
    left: Shapes, right: Shapes, left_groups: int = 1, right_groups: int = 1, positions: int = 1
) -> tuple[State, ...]:
    spatial = next((j for j, shape in enumerate(right) if len(shape) > 2), -1)
    return contraction_order(
        (*(shape[1] for shape in left), left[-1][0] // left_groups),
        (*(shape[1] for shape in right), right[-1][0] // right_groups),
        spatial=spatial,
        taps=math.prod(right[spatial][2:]),
        stride=positions,
    )[1]


_known_order = functools.cache(_order_of_shapes)


def _walk(z: Tensor, w1s: Chain, w2s: Chain, order: Sequence[State], **conv: Any) -> Tensor:
    """Apply both chains to `[n, g1, b, g2, d, *space]` in an order, giving
    `[n, g1, a // g1, g2, c // g2, *space']` at its end.

    Groups share all maps of a chain but the last, whose rows they divide.
    """
    i = j = 0
    (_, left_groups, _, right_groups, *_), *_ = shapes(z)
    for to_i, to_j in order:
        if to_i > i:
            z = _pointwise(z, _compose(w1s[i:to_i]), 2, left_groups if to_i == len(w1s) else 1)
        else:
            w, groups = _compose(w2s[j:to_j]), right_groups if to_j == len(w2s) else 1
            z = _pointwise(z, w, 4, groups) if w.dim() == 2 else _spatial(z, w, groups, **conv)
        i, j = to_i, to_j
    return z


def _pointwise(z: Tensor, w: Tensor, axis: int, groups: int) -> Tensor:
    """Apply `w [groups · to, from]` along `axis` of `z`; the axis before it indexes the groups."""
    trains = (
        torch.is_grad_enabled() and not torch.jit.is_tracing()
    )  # the tracer compares graphs made with and without gradients
    (_, _, _, _, narrow, *_), (wide, *_) = shapes(z, w)
    if z.dim() == 5 and (axis == 4 or (narrow < wide and trains)):
        # No space: one matrix product. The batched one below is quicker, but forms a weight
        # gradient per row before summing.
        return F.linear(z.transpose(axis, 4), w).transpose(axis, 4)
    y = torch.matmul(w.reshape(groups, -1, w.shape[1]), z.flatten(axis + 1))
    return y.unflatten(-1, z.shape[axis + 1 :])


def _spatial(z: Tensor, w: Tensor, groups: int, **conv: Any) -> Tensor:
    """Convolve `z [n, g1, s1, g2, from, *space]` with `w [groups · to, from, *kernel]`, all before
    `from` as batch.
    """
    batch = z.shape[:3] if groups > 1 else z.shape[:4]
    y = _CONV[w.dim() - 2](
        z.flatten(0, len(batch) - 1).flatten(1, -w.dim() + 1), w, groups=groups, **conv
    )
    return y.reshape(*z.shape[:4], w.shape[0] // groups, *y.shape[2:])
