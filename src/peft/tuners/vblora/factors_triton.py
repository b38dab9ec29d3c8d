# SPDX-License-Identifier: Apache-2.0
"""`factors.compose_factors` as one kernel, and one for its gradient, where Triton is (see
`_kernels.py`).

A program makes one tile: it finds the top-k of its row of logits, takes the softmax of those and
writes their mixture into the factor's memory. Products and sums are in float32; each result is
rounded once.

Source: arXiv:2405.15179
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.derivatives import gradients_again
from ...ops.dispatch import is_batched
from ...ops.triton_support import on_device_of
from .bank import compose_in_full

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_LARGEST_ROW, _LARGEST_CHOICE = 16384, 8192
"""Numbers that one program holds at most: a row of logits, the vectors of one position."""


def fits(logits_A: Tensor, logits_B: Tensor, bank: Tensor, topk: int) -> bool:
    """Whether the kernels are made for such tensors."""
    if (
        bank.dtype not in _DTYPES
        or logits_A.dtype not in _DTYPES
        or logits_A.dtype != logits_B.dtype
    ):
        return False
    sizes = _sizes(*bank.shape, logits_A.shape[0], topk)
    return (
        sizes["BLOCK_N"] <= _LARGEST_ROW and sizes["BLOCK_K"] * sizes["BLOCK_V"] <= _LARGEST_CHOICE
    )


def compose_factors(
    logits_A: Tensor, logits_B: Tensor, bank: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """`factors.compose_factors` in one launch.

    Among equal logits the vector of the lowest number is chosen first. The gradient of the bank is
    summed in no fixed order.

    Args:
        logits_A: `[r, in / vector_length, num_vectors]`.
        logits_B: `[out / vector_length, r, num_vectors]`, of the same dtype.
        bank: `[num_vectors, vector_length]`.
        topk: Vectors mixed per position.

    Returns:
        `A [r, in]` and `B [out, r]`, which is a contiguous `[r, out]` seen transposed.

    Source: arXiv:2405.15179
    """
    sources = logits_A, logits_B, bank
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        A, B = _Compose.apply(*sources, topk)
    else:
        A, B, _ = _composed(*sources, topk, keep=False)
    return A, B.T


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_A: Tensor, logits_B: Tensor, bank: Tensor, topk: int
    ) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        A, B, chosen = _composed(logits_A, logits_B, bank, topk, keep=True)
        ctx.save_for_backward(logits_A, logits_B, bank, chosen)
        ctx.topk = topk
        return A, B

    @staticmethod
    def backward(ctx: Any, of_A: Tensor, of_B: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *sources, bank, chosen = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(of_A) or is_batched(of_B):
            plain = functools.partial(compose_in_full, topk=ctx.topk)
            return *gradients_again(
                plain, (*sources, bank), ctx.needs_input_grad[:3], (of_A, of_B.T)
            ), None
        (shape_A, shape_B), dtype = (logits.shape for logits in sources), sources[0].dtype
        for_logits, for_bank = (
            ctx.needs_input_grad[0] or ctx.needs_input_grad[1],
            ctx.needs_input_grad[2],
        )
        of_logits_A = bank.new_empty(shape_A if for_logits else (), dtype=dtype)
        of_logits_B = bank.new_empty(shape_B if for_logits else (), dtype=dtype)
        of_bank = bank.new_zeros(bank.shape if for_bank else (), dtype=torch.float32)
        (r, tiles_A, _), (tiles_B, _, _) = shape_A, shape_B
        pointers = (
            of_A.contiguous(),
            of_B.contiguous(),
            bank,
            chosen,
            of_logits_A,
            of_logits_B,
            of_bank,
        )
        with on_device_of(bank):
            _distribute_kernel[((tiles_A + tiles_B) * r,)](
                *pointers,
                tiles_A * r,
                tiles_B,
                for_logits,
                for_bank,
                **_sizes(*bank.shape, r, chosen.shape[1]),
            )
        return (
            of_logits_A if ctx.needs_input_grad[0] else None,
            of_logits_B if ctx.needs_input_grad[1] else None,
            of_bank.to(bank.dtype) if for_bank else None,
            None,
        )


def _composed(
    logits_A: Tensor, logits_B: Tensor, bank: Tensor, topk: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`A [r, in]`, `B` transposed, `[r, out]`, and what was chosen, `[positions, topk]`, if that is
    to be kept.
    """
    (r, tiles_A, _), tiles_B, length = logits_A.shape, logits_B.shape[0], bank.shape[1]
    A, B = bank.new_empty(r, tiles_A * length), bank.new_empty(r, tiles_B * length)
    positions = (tiles_A + tiles_B) * r
    chosen = bank.new_empty(positions if keep else 0, topk, dtype=torch.int64)
    with on_device_of(bank):
        _compose_kernel[(positions,)](
            logits_A,
            logits_B,
            bank,
            A,
            B,
            chosen,
            tiles_A * r,
            tiles_B,
            keep,
            **_sizes(*bank.shape, r, topk),
        )
    return A, B, chosen


@functools.cache
def _sizes(num_vectors: int, length: int, r: int, topk: int) -> dict[str, int]:
    """What a kernel is compiled for."""
    sizes = {
        f"BLOCK_{of}": triton.next_power_of_2(n)
        for of, n in (("N", num_vectors), ("V", length), ("K", topk))
    }
    warps = max(sizes["BLOCK_N"], sizes["BLOCK_K"] * sizes["BLOCK_V"]) // 512
    return {
        "N": num_vectors,
        "V": length,
        "R": r,
        "K": topk,
        **sizes,
        "num_warps": min(max(warps, 1), 8),
    }


@triton.jit(do_not_specialize=["positions_A", "tiles_B"])
def _compose_kernel(
    logits_A,
    logits_B,
    bank,
    A,
    B,
    chosen,
    positions_A,
    tiles_B,
    KEEP: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    vector, entry = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
    row, tile = _places(position, logits_A, logits_B, A, B, positions_A, tiles_B, N, V, R)
    value = tl.load(row + vector, mask=vector < N, other=0.0).to(tl.float32)
    packed = tl.where(vector < N, _pack(value, vector), -0x7FFFFFFFFFFFFFFF)
    total = 0.0
    mixed = tl.zeros([BLOCK_V], tl.float32)
    for k in tl.static_range(K):
        best = tl.max(packed, 0)
        packed = tl.where(packed == best, -0x7FFFFFFFFFFFFFFF, packed)
        index, logit = _unpack(best)
        if k == 0:
            highest = logit
        weight = tl.exp(logit - highest)
        total += weight
        mixed += weight * tl.load(bank + index * V + entry, mask=entry < V, other=0.0).to(
            tl.float32
        )
        if KEEP:
            tl.store(chosen + position * K + k, best)
    tl.store(tile + entry, (mixed / total).to(tile.dtype.element_ty), mask=entry < V)


@triton.jit(do_not_specialize=["positions_A", "tiles_B"])
def _distribute_kernel(
    of_A,
    of_B,
    bank,
    chosen,
    of_logits_A,
    of_logits_B,
    of_bank,
    positions_A,
    tiles_B,
    FOR_LOGITS: tl.constexpr,
    FOR_BANK: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """With `g` a tile's gradient and `w` its weights: `w_i g` for the bank; for the logits
    `w_i (d_i - sum_j w_j d_j)`, where `d_i = g . bank_i`, and zero for those not chosen.
    """
    position = tl.program_id(0).to(tl.int64)
    rank, entry = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    row, tile = _places(
        position, of_logits_A, of_logits_B, of_A, of_B, positions_A, tiles_B, N, V, R
    )
    g = tl.load(tile + entry, mask=entry < V, other=0.0).to(tl.float32)
    index, logit = _unpack(tl.load(chosen + position * K + rank, mask=rank < K, other=0x7FFFFFFF))
    logit = tl.where(rank < K, logit, float("-inf"))
    weight = tl.exp(logit - tl.max(logit, 0))
    weight = weight / tl.sum(weight, 0)
    place = index[:, None] * V + entry[None, :]
    real = (rank < K)[:, None] & (entry < V)[None, :]
    if FOR_BANK:
        tl.atomic_add(of_bank + place, weight[:, None] * g[None, :], mask=real, sem="relaxed")
    if FOR_LOGITS:
        dots = tl.sum(tl.load(bank + place, mask=real, other=0.0).to(tl.float32) * g[None, :], 1)
        of_chosen = weight * (dots - tl.sum(weight * dots, 0))
        vector = tl.arange(0, BLOCK_N)
        of_row = tl.zeros([BLOCK_N], tl.float32)
        for k in tl.static_range(K):
            here = tl.sum(tl.where(rank == k, index, 0), 0)
            of_row = tl.where(
                vector == here, tl.sum(tl.where(rank == k, of_chosen, 0.0), 0), of_row
            )
        tl.store(row + vector, of_row.to(row.dtype.element_ty), mask=vector < N)


@triton.jit
def _places(
    position,
    rows_A,
    rows_B,
    tiles_of_A,
    tiles_of_B,
    positions_A,
    tiles_B,
    N: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
):
    """Where a position's row of logits is, and its tile: positions of `A [r, tiles]` come first,
    then those of `B [tiles, r]`.
    """
    if position < positions_A:
        row = rows_A + position * N
        tile = tiles_of_A + position * V
    else:
        at = position - positions_A
        row = rows_B + at * N
        tile = tiles_of_B + ((at % R) * tiles_B + at // R) * V
    return row, tile


@triton.jit
def _pack(value, vector):
    """Integers in the order of values, NaN last as the greatest, and among equal values the lowest
    number last.
    """
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - vector).to(tl.int64)


@triton.jit
def _unpack(packed):
    """The vector's number and its value."""
    order = (packed >> 32).to(tl.int32)
    value = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF), value
