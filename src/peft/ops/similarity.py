# SPDX-License-Identifier: Apache-2.0
"""Inner products of deltas `ΔW = B·A` from their factors, and the cosines and distances that follow
from them. No delta is built where its factors are cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from .low_rank import LowRank, finite

# Largest sum of ranks, and number of elements, in a block of deltas: some hundred megabytes.
_RANKS, _ELEMENTS = 2**12, 2**25


def inner_products(rows: Sequence[LowRank], columns: Sequence[LowRank]) -> Tensor:
    """Return the Frobenius inner products of all pairs of deltas of one layer.

    `⟨B_i·A_i, B_j·A_j⟩ = Σ (B_iᵀ·B_j) ∘ (A_i·A_jᵀ)`: with the factors side by side, two products
    give the terms of all pairs at once. Their cost is `R·C·(in + out)` multiplications, where `R`
    and `C` are the ranks of all rows and of all columns together. Deltas of so high a rank that
    their elements cost less (`(R + C + n·m)·in·out`) are multiplied as matrices.

    Args:
        rows: `n` deltas of one shape.
        columns: `m` deltas of that shape.

    Returns:
        `[n, m]`, in float64 where the device has it.

    Raises:
        PeftValueError: A factor has values that are NaN or infinite.

    Example:
        >>> delta = LowRank(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]]), 0.0, 10.0)
        >>> inner_products([delta], [delta])
        tensor([[100.]], dtype=torch.float64)

    Source: arXiv:2405.11157, section 3 (similarity of adapters)
    """
    out, taps = rows[0].B.shape[0], rows[0].A.shape[1]
    R, C = (sum(delta.rank for delta in deltas) for deltas in (rows, columns))
    by_element = (R + C + len(rows) * len(columns)) * out * taps < R * C * (out + taps)
    below, right = (_blocks(deltas, by_element, out * taps) for deltas in (rows, columns))
    block = _of_elements if by_element else _of_factors
    if columns is not rows:
        return torch.cat([torch.cat([block(one, other) for other in right], 1) for one in below])
    parts = [[block(one, other) for other in below[: i + 1]] for i, one in enumerate(below)]
    for i, j in combinations(range(len(below)), 2):
        parts[i].append(parts[j][i].mT)
    return torch.cat([torch.cat(row, 1) for row in parts])


def _blocks(deltas: Sequence[LowRank], by_element: bool, size: int) -> list[Sequence[LowRank]]:
    """Return the deltas in blocks of at most `_RANKS` or `_ELEMENTS`, one delta at the least."""
    if by_element:
        count = max(_ELEMENTS // size, 1)
        return [deltas[i : i + count] for i in range(0, len(deltas), count)]
    blocks: list[list[LowRank]] = [[]]
    taken = 0
    for delta in deltas:
        if blocks[-1] and taken + delta.rank > _RANKS:
            blocks.append([])
            taken = 0
        blocks[-1].append(delta)
        taken += delta.rank
    return list(blocks)


def _of_factors(rows: Sequence[LowRank], columns: Sequence[LowRank]) -> Tensor:
    left_A, left_B = _side_by_side(rows)
    right_A, right_B = (left_A, left_B) if columns is rows else _side_by_side(columns)
    terms = (left_B.mT @ right_B).mul_(left_A @ right_A.mT)  # [R, C]
    by_row = terms.new_zeros(len(rows), terms.shape[1]).index_add_(0, _owners(rows, terms), terms)
    return by_row.new_zeros(len(rows), len(columns)).index_add_(1, _owners(columns, terms), by_row)


def _of_elements(rows: Sequence[LowRank], columns: Sequence[LowRank]) -> Tensor:
    left = _elements(rows)
    return left @ (left if columns is rows else _elements(columns)).mT


def norms(products: Tensor) -> Tensor:
    """Return the norms `[n]` of vectors with inner products `[n, n]`."""
    return products.diagonal().clamp(min=0).sqrt()


def cosines(products: Tensor) -> Tensor:
    """Return the cosines of vectors with inner products `[n, n]`, 0 where one of them is zero."""
    length = norms(products)
    scale = length.outer(length)
    return (products / scale.masked_fill(scale == 0, 1)).clamp(-1, 1)


def distances(products: Tensor) -> Tensor:
    """Return the Euclidean distances of vectors with inner products `[n, n]`.

    Of two that are equal to rounding the distance is 0: a difference of squares has no digits left.

    Example:
        >>> distances(torch.tensor([[4.0, 0.0], [0.0, 9.0]]))[0, 1]  # of (2, 0) and (0, 3)
        tensor(3.6056)
    """
    squares = products.diagonal()
    both = squares.unsqueeze(1) + squares
    gap = both - products - products.mT
    return gap.masked_fill(gap < 8 * torch.finfo(gap.dtype).eps * both, 0).sqrt()


def _side_by_side(deltas: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """Return `A [R, in · taps]` and `B [out, R]` of all deltas."""
    A = torch.cat([finite(delta.A) for delta in deltas])
    return A, torch.cat([finite(delta.B) for delta in deltas], 1)


def _elements(deltas: Sequence[LowRank]) -> Tensor:
    """Return the deltas as rows `[n, out · in · taps]`."""
    return torch.stack([(finite(delta.B) @ finite(delta.A)).flatten() for delta in deltas])


def _owners(deltas: Sequence[LowRank], like: Tensor) -> Tensor:
    """Return the number of the delta that each rank belongs to."""
    ranks = torch.tensor([delta.rank for delta in deltas], device=like.device)
    return torch.arange(len(deltas), device=like.device).repeat_interleave(ranks)
