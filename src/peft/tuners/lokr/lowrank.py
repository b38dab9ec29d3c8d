# SPDX-License-Identifier: Apache-2.0
"""Low-rank approximations of Kronecker products, and of sums of them: pure math on LoKr's factors.

No tensor of size `out x in` is allocated. A convolution's kernel belongs to the columns of `W2`,
read as `[c, d · taps]`: then `W1 ⊗ W2` is `ΔW` read as `[out, in · taps]`, and both have the same
singular values.

Source: Van Loan and Pitsianis, "Approximation with Kronecker products", 1993
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.low_rank import LowRank, SingularTriples, dense_svd, kept, norm, product_svd, tail, wide
from .kronecker import KroneckerFactors, Maps, left_maps, multiply, right_maps


class NearestProduct(NamedTuple):
    """Kronecker product that is nearest to a sum of several.

    Attributes:
        W1: `[a, b]`.
        W2_a, W2_b: `[c, r]` and `[r, d · taps]`, with `W2 = W2_a · W2_b`.
        error: Frobenius norm of the difference from the sum, relative to `norm`.
        norm: Frobenius norm of the sum.
    """

    W1: Tensor
    W2_a: Tensor
    W2_b: Tensor
    error: float
    norm: float


def kronecker_low_rank(
    f: KroneckerFactors,
    kernel: Sequence[int] = (),
    scale: float = 1.0,
    rank: int | float | None = None,
    flat: bool = False,
) -> LowRank:
    """Return the best approximation of `scale · (W1 ⊗ W2)` of rank `k`.

    With `W1 = Σ_i s_i u_i v_iᵀ` and `W2 = Σ_j t_j x_j y_jᵀ`, the singular values of the product are
    all `s_i · t_j`, with singular vectors `u_i ⊗ x_j` and `v_i ⊗ y_j`. So the singular value
    decompositions of the two small matrices give that of the product, and its `k` largest terms are
    kept. A low-rank side has at most `r` singular values.

    Args:
        f: The adapter's tensors.
        kernel: Kernel size of a convolution; empty for a linear layer.
        scale: Factor on the product.
        rank: `k`, or the share of energy to keep, or None for all singular values that are not
            zero, `rank(W1) · rank(W2)`.
        flat: Swap the two sides, as in `kronecker_weight`.

    Returns:
        `A [k, in · taps]` and `B [out, k]` in the factors' dtype, at `k · (in · taps + out)`
        multiplications and two small decompositions.

    Example:
        >>> w1, w2 = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]])
        >>> exact = kronecker_low_rank(KroneckerFactors(w1=w1, w2=w2))
        >>> exact.rank, exact.error, round(exact.norm**2)
        (2, 0.0, 45)

    Source: Van Loan and Pitsianis, 1993, section 1 (singular values of a Kronecker product)
    """
    (U1, S1, V1), (U2, S2, V2) = _svd(left_maps(f)), _svd(right_maps(f, kernel))
    values, order = (S1[:, None] * S2 * abs(scale)).flatten().sort(descending=True)
    k = kept(values, rank)
    i, j = order[:k] // len(S2), order[:k] % len(S2)
    root = values[:k].sqrt()
    taps = math.prod(kernel)
    B = _pairs(U1[:, i], U2[:, j], flat) * math.copysign(1, scale)
    A = _pairs(V1[:, i], V2[:, j].unflatten(0, (-1, taps)), flat)
    B, A = (B * root).to(f.dtype), (A.flatten(0, 1) * root).mT.to(f.dtype)
    return LowRank(A.contiguous(), B.contiguous(), tail(values, k), norm(values))


def nearest_product(
    terms: Sequence[tuple[float, KroneckerFactors]],
    rank: int | None = None,
    kernel: Sequence[int] = (),
) -> NearestProduct:
    """Return the Kronecker product nearest to a weighted sum, `Σ_i f_i · (W1_i ⊗ W2_i)`.

    Rearranged with a row for each element of `W1` and a column for each element of `W2`, a
    Kronecker product is the outer product `vec(W1) · vec(W2)ᵀ`. The rearranged sum is a low-rank
    matrix with the factors `vec(W1_i)` and `vec(W2_i)` as columns. Its first singular vectors are
    the nearest `W1` and `W2`; `W2` is then cut to `rank`.

    Args:
        terms: `f_i` and the tensors of each adapter, all with the same `a`, `b`, `c` and `d`.
        rank: Largest rank of `W2`, None for no limit.
        kernel: Kernel size of a convolution; empty for a linear layer.

    Returns:
        Both sides in the precision of the computation, at `m² · (a·b + c·d·taps)` multiplications
        for `m` terms and two small decompositions.

    Source: Van Loan and Pitsianis, 1993, section 2
    """
    lefts = [multiply(tuple(map(wide, left_maps(f)))) * factor for factor, f in terms]
    rights = [multiply(tuple(map(wide, right_maps(f, kernel)))).flatten(1) for _, f in terms]
    rows = torch.stack([W1.flatten() for W1 in lefts], dim=1)
    columns = torch.stack([W2.flatten() for W2 in rights])
    U, S, V = product_svd(rows, columns)
    W2 = dense_svd(V[:, 0].view_as(rights[0]))
    k = len(W2.S) if rank is None else min(rank, len(W2.S))
    total, root = norm(S), S[0].sqrt()
    # The terms left out of the sum are orthogonal to those cut from `W2`.
    lost = math.hypot(norm(S[1:]), float(S[0]) * norm(W2.S[k:]))
    scale = W2.S[:k].sqrt() * root.sqrt()
    return NearestProduct(
        W1=U[:, 0].view_as(lefts[0]) * root,
        W2_a=W2.U[:, :k] * scale,
        W2_b=(W2.V[:, :k] * scale).mT,
        error=lost / total if total else 0.0,
        norm=total,
    )


def _svd(maps: Maps) -> SingularTriples:
    """Return the singular values and vectors of maps multiplied, `[to, from · taps]`."""
    *first, last = maps
    if not first:
        return dense_svd(last.flatten(1))
    return product_svd(last, multiply(tuple(first)).flatten(1))


def _pairs(first: Tensor, second: Tensor, flat: bool) -> Tensor:
    """Return the Kronecker products of the columns of `[a, k]` and `[c, *taps, k]`,
    `[a·c, *taps, k]`. The index of the first is the slower one, the faster one if `flat`.
    """
    outer = first.reshape(first.shape[0], 1, *[1] * (second.dim() - 2), -1) * second
    return (outer.transpose(0, 1) if flat else outer).flatten(0, 1)
