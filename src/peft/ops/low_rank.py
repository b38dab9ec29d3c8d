# SPDX-License-Identifier: Apache-2.0
"""A delta as a product of two factors, `ΔW = B·A`, and its best approximation of a smaller rank.

Everything here works on the factors: a QR decomposition of each and the singular values of a small
core give those of the product, which is never built. A convolution's kernel belongs to the columns:
`ΔW` is read as `[out, in · taps]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..base.errors import PeftValueError


class LowRank(NamedTuple):
    """A delta `B·A`, exact or of a smaller rank.

    Attributes:
        A: `[r, in · taps]`.
        B: `[out, r]`.
        error: `‖ΔW − B·A‖ / ‖ΔW‖` in the Frobenius norm, before the factors are rounded to their
            dtype; 0 where `ΔW` is zero.
        norm: `‖ΔW‖`.
    """

    A: Tensor
    B: Tensor
    error: float
    norm: float

    @property
    def rank(self) -> int:
        """The inner size."""
        return self.A.shape[0]


Deltas: TypeAlias = dict[str, LowRank]
"""The factors of an adapter's deltas, by path of the module in the base model."""


class SingularTriples(NamedTuple):
    """`U · diag(S) · Vᵀ` with orthonormal columns `U [m, k]`, `V [n, k]` and `S [k]`, largest
    first.
    """

    U: Tensor
    S: Tensor
    V: Tensor


def check_rank(rank: int | float | None) -> None:
    """Check that a rank is an integer of at least 1, a fraction in (0, 1], or None."""
    if rank is None or (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1):
        return
    if isinstance(rank, float) and 0 < rank <= 1:
        return
    rule = (
        f"`rank`={rank!r} must be an integer of at least 1, the share of energy to keep as a "
        "fraction between 0 and 1, or None for an exact product."
    )
    if rank == 0:
        raise PeftValueError(f"Passing a rank of 0 doesn't make sense: {rule}")
    if isinstance(rank, float):
        raise PeftValueError(
            "If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but "
            f"got {rank}: {rule}"
        )
    raise PeftValueError(rule)


def kept(values: Tensor, rank: int | float | None) -> int:
    """Return the number of singular values to keep, at least one.

    Args:
        values: Singular values, largest first.
        rank: An integer: as many. A fraction: as few as hold that share of the energy, the sum of
            squares. None, or 1.0: all but those that are zero to rounding.
    """
    nonzero = int((values > values[0] * torch.finfo(values.dtype).eps * len(values)).sum())
    if rank is None or (rank == 1.0 and isinstance(rank, float)):
        return max(nonzero, 1)
    if isinstance(rank, int):
        return min(rank, len(values))
    energy = values.square().cumsum(0)
    return max(min(int((energy < rank * energy[-1]).sum()) + 1, nonzero), 1)


def product_svd(B: Tensor, A: Tensor) -> SingularTriples:
    """Return the singular values and vectors of `B·A` without building it.

    Args:
        B: `[m, r]`.
        A: `[r, n]`.

    Returns:
        `min(m, n, r)` of them, in float64 where the device has it, at the cost of `(m + n)·r²`.

    Raises:
        PeftValueError: A factor has values that are NaN or infinite.
    """
    left, R_left = torch.linalg.qr(finite(B))
    right, R_right = torch.linalg.qr(finite(A).mT)
    U, S, Vh = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
    return SingularTriples(left @ U, S, right @ Vh.mT)


def dense_svd(matrix: Tensor) -> SingularTriples:
    """Return the singular values and vectors of a dense matrix, in float64 where the device has it.

    Raises:
        PeftValueError: It has values that are NaN or infinite.
    """
    U, S, Vh = torch.linalg.svd(finite(matrix), full_matrices=False)
    return SingularTriples(U, S, Vh.mT)


def subspace_svd(W: Tensor, rank: int, rounds: int, seed: int = 0) -> SingularTriples:
    """Return about the largest singular values and vectors of a matrix, by randomized subspace
    iteration. A matrix has the same result each time.

    Args:
        W: `[m, n]`.
        rank: How many.
        rounds: Rounds of iteration; each costs two products with `W`.
        seed: Of the random numbers, which are drawn on the CPU.

    Source: arXiv:0909.4061, algorithms 4.4 and 5.1
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(W.shape[1], rank, generator=generator, dtype=W.dtype)
    Q = torch.linalg.qr(W @ draw.to(W.device))[0]
    for _ in range(rounds):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q)[0])[0]
    U, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    return SingularTriples(Q @ U, S, Vh.mT)


def cut(triples: SingularTriples, rank: int | float | None, dtype: torch.dtype) -> LowRank:
    """Return the best approximation of a rank, with the singular values split evenly between both
    factors.

    Args:
        triples: All singular values and vectors of the delta.
        rank: As for `kept`.
        dtype: Of the factors.

    Source: Eckart and Young, 1936
    """
    U, S, V = triples
    k = kept(S, rank)
    root = S[:k].sqrt()
    A, B = (V[:, :k] * root).mT.to(dtype).contiguous(), (U[:, :k] * root).to(dtype).contiguous()
    return LowRank(A, B, tail(S, k), norm(S))


def approximate(B: Tensor, A: Tensor, rank: int | float | None = None) -> LowRank:
    """Return the best approximation of `B·A` of a rank; the factors as they are if the rank allows
    it.

    Args:
        B: `[out, r]`.
        A: `[r, in · taps]`.
        rank: As for `kept`; None, or an integer of at least `r`, keeps both factors to the bit.

    Example:
        >>> B, A = torch.eye(3, 2), torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
        >>> round(approximate(B, A, 1).error, 4)  # 3 of (3, 4) is lost
        0.6
    """
    if rank is None or (isinstance(rank, int) and rank >= A.shape[0]):
        return LowRank(A, B, 0.0, product_norm(B, A))
    return cut(product_svd(B, A), rank, torch.promote_types(A.dtype, B.dtype))


def weighted_sum(
    deltas: Sequence[LowRank], weights: Sequence[float], rank: int | float | None = None
) -> LowRank:
    """Return `Σ w_i · B_i·A_i`, or its best approximation of a rank.

    The factors of all deltas side by side, `B [out, R]` and `A [R, in · taps]`, are those of the
    sum. Where `R` exceeds the size of the matrix they are reduced to that size, exact to rounding.

    Args:
        deltas: At least one, all of one shape.
        weights: `w_i`, of any sign.
        rank: As for `kept`; None for the exact sum.

    Example:
        >>> delta = LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]]), 0.0, 6.7)
        >>> total = weighted_sum([delta, delta], [1.0, -0.5])
        >>> total.B @ total.A
        tensor([[1.5000, 3.0000],
                [0.0000, 0.0000]])
    """
    dtype = deltas[0].A.dtype
    for delta in deltas:
        dtype = torch.promote_types(torch.promote_types(dtype, delta.A.dtype), delta.B.dtype)
    A = torch.cat([delta.A.to(dtype) * w for delta, w in zip(deltas, weights, strict=True)])
    B = torch.cat([delta.B.to(dtype) for delta in deltas], 1)
    if rank is None and A.shape[0] > min(B.shape[0], A.shape[1]):
        return approximate(B, A, 1.0)
    return approximate(B, A, rank)


def total_error(deltas: Iterable[LowRank]) -> float:
    """Return the relative error of several deltas together, as blocks of one matrix."""
    deltas = list(deltas)
    total = math.hypot(*(delta.norm for delta in deltas))
    return math.hypot(*(delta.error * delta.norm for delta in deltas)) / total if total else 0.0


def product_norm(B: Tensor, A: Tensor) -> float:
    """Return `‖B·A‖` in the Frobenius norm."""
    left, right = finite(B), finite(A)
    return math.sqrt(max(float((left.mT @ left * (right @ right.mT)).sum()), 0.0))


def norm(values: Tensor) -> float:
    """Return the Frobenius norm of a matrix with these singular values."""
    return float(values.square().sum().sqrt())


def tail(values: Tensor, k: int) -> float:
    """Return the share of the norm that is lost with all singular values but the first `k`."""
    total = norm(values)
    return norm(values[k:]) / total if total else 0.0


def wide(tensor: Tensor) -> Tensor:
    """Return `tensor` without its gradient, in float64 where the device has it."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def finite(tensor: Tensor) -> Tensor:
    """Return `wide(tensor)`; raise `PeftValueError` if it has values that are NaN or infinite."""
    if not torch.isfinite(tensor).all():
        raise PeftValueError(
            "The adapter has values that are NaN or infinite, which have no factorization."
        )
    return wide(tensor)
