# SPDX-License-Identifier: Apache-2.0
"""`bank.compose_factors` as one Triton kernel, and one for its gradient.

A program of the kernel makes one tile: it finds the top-k of the tile's logits, computes their
softmax and writes the weighted sum of the vectors to its place in the factor. Products and sums are
in float32; each result is rounded once.

Source: arXiv:2405.15179, section 3
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.triton_support import on_device_of

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_LARGEST_ROW, _LARGEST_TILE = 16384, 8192
"""Largest number of elements in one program: logits of a tile, entries of its selected vectors."""


def fits(logits_A: Tensor, logits_B: Tensor, bank: Tensor, topk: int) -> bool:
    """Return whether the kernels support tensors of these dtypes and sizes."""
    is_contiguous = logits_A.is_contiguous() and logits_B.is_contiguous() and bank.is_contiguous()
    if torch.are_deterministic_algorithms_enabled() or not is_contiguous:
        return False
    if not {bank.dtype, logits_A.dtype} <= _DTYPES or logits_A.dtype != logits_B.dtype:
        return False
    sizes = _kernel_options(*bank.shape, logits_A.shape[0], topk)
    return sizes["BLOCK_N"] <= _LARGEST_ROW and sizes["BLOCK_K"] * sizes["BLOCK_V"] <= _LARGEST_TILE


def forward(logits_A: Tensor, logits_B: Tensor, bank: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return `A [r, in]` and the transpose of `B`, `[r, out]`, in one launch.

    Among equal logits the lowest index is selected first.
    """
    (r, columns, _), rows, length = logits_A.shape, logits_B.shape[0], bank.shape[1]
    A, B = bank.new_empty(r, columns * length), bank.new_empty(r, rows * length)
    with on_device_of(bank):
        _compose_kernel[((columns + rows) * r,)](
            logits_A, logits_B, bank, A, B, columns * r, rows,
            **_kernel_options(*bank.shape, r, topk),
        )  # fmt: skip
    return A, B


def backward(
    logits_A: Tensor,
    logits_B: Tensor,
    bank: Tensor,
    topk: int,
    gradients: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of the tensors in `wanted`. The order in which the bank's is summed
    differs from run to run.
    """
    need_A, need_B, need_bank = wanted
    need_logits = need_A or need_B
    grad_logits_A = logits_A.new_empty(logits_A.shape if need_logits else ())
    grad_logits_B = logits_B.new_empty(logits_B.shape if need_logits else ())
    grad_bank = bank.new_zeros(bank.shape if need_bank else (), dtype=torch.float32)
    (r, columns, _), rows = logits_A.shape, logits_B.shape[0]
    grad_A, grad_B = (gradient.contiguous() for gradient in gradients)
    with on_device_of(bank):
        _distribute_kernel[((columns + rows) * r,)](
            grad_A, grad_B, logits_A, logits_B, bank, grad_logits_A, grad_logits_B, grad_bank,
            columns * r, rows, need_logits, need_bank, **_kernel_options(*bank.shape, r, topk),
        )  # fmt: skip
    found = grad_logits_A, grad_logits_B, grad_bank.to(bank.dtype)
    return [gradient for gradient, want in zip(found, wanted, strict=True) if want]


@functools.cache
def _kernel_options(num_vectors: int, length: int, r: int, topk: int) -> dict[str, int]:
    """Return the constants that a kernel is compiled for, and its number of warps."""
    block_n, block_v, block_k = map(triton.next_power_of_2, (num_vectors, length, topk))
    blocks = {"BLOCK_N": block_n, "BLOCK_V": block_v, "BLOCK_K": block_k}
    warps = min(max(max(block_n, block_k * block_v) // 512, 1), 8)
    return {"N": num_vectors, "V": length, "R": r, "K": topk, **blocks, "num_warps": warps}


@triton.jit(do_not_specialize=["tiles_A", "rows_B"])
def _compose_kernel(
    logits_A, logits_B, bank, A, B, tiles_A, rows_B,
    N: tl.constexpr, V: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    vector, entry = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
    logits, factor = _pointers(tile, logits_A, logits_B, A, B, tiles_A, rows_B, N, V, R)
    packed = _load_packed(logits, vector, N)
    total = 0.0
    mixed = tl.zeros([BLOCK_V], tl.float32)
    for k in tl.static_range(K):
        packed, index, logit = _take_best(packed)
        if k == 0:
            highest = logit
        weight = tl.exp(logit - highest)
        total += weight
        row = tl.load(bank + index * V + entry, mask=entry < V, other=0.0)
        mixed += weight * row.to(tl.float32)
    tl.store(factor + entry, (mixed / total).to(factor.dtype.element_ty), mask=entry < V)


@triton.jit(do_not_specialize=["tiles_A", "rows_B"])
def _distribute_kernel(
    grad_A, grad_B, logits_A, logits_B, bank, grad_logits_A, grad_logits_B, grad_bank, tiles_A,
    rows_B,
    FOR_LOGITS: tl.constexpr, FOR_BANK: tl.constexpr,
    N: tl.constexpr, V: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the bank and the logits from the gradient `g` of a tile.

    With weights `w` and `d_i = g . bank_i`: `w_i g` for vector `i` of the bank;
    `w_i (d_i - sum_j w_j d_j)` for a selected logit, zero for the others.
    """
    tile = tl.program_id(0).to(tl.int64)
    rank, entry, vector = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    logits, factor = _pointers(tile, logits_A, logits_B, grad_A, grad_B, tiles_A, rows_B, N, V, R)
    g = tl.load(factor + entry, mask=entry < V, other=0.0).to(tl.float32)
    packed = _load_packed(logits, vector, N)
    index, logit = tl.zeros([BLOCK_K], tl.int64), tl.zeros([BLOCK_K], tl.float32)
    for k in tl.static_range(K):
        packed, index_k, logit_k = _take_best(packed)
        index, logit = tl.where(rank == k, index_k, index), tl.where(rank == k, logit_k, logit)
    logit = tl.where(rank < K, logit, float("-inf"))
    weight = tl.exp(logit - tl.max(logit, 0))
    weight = weight / tl.sum(weight, 0)
    offset = index[:, None] * V + entry[None, :]
    mask = (rank < K)[:, None] & (entry < V)[None, :]
    if FOR_BANK:
        tl.atomic_add(grad_bank + offset, weight[:, None] * g[None, :], mask=mask, sem="relaxed")
    if FOR_LOGITS:
        dots = tl.sum(tl.load(bank + offset, mask=mask, other=0.0).to(tl.float32) * g[None, :], 1)
        grad_selected = weight * (dots - tl.sum(weight * dots, 0))
        grad_logits, _ = _pointers(
            tile, grad_logits_A, grad_logits_B, grad_A, grad_B, tiles_A, rows_B, N, V, R
        )
        grad_row = tl.zeros([BLOCK_N], tl.float32)
        for k in tl.static_range(K):
            index_k = tl.sum(tl.where(rank == k, index, 0), 0)
            grad_k = tl.sum(tl.where(rank == k, grad_selected, 0.0), 0)
            grad_row = tl.where(vector == index_k, grad_k, grad_row)
        tl.store(grad_logits + vector, grad_row.to(grad_logits.dtype.element_ty), mask=vector < N)


@triton.jit
def _pointers(
    tile, logits_A, logits_B, A, B, tiles_A, rows_B,
    N: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Return pointers to a tile's logits and to its entries in the factor. The tiles of
    `A [r, columns]` are numbered first, then those of `B [rows, r]`, stored transposed.
    """
    if tile < tiles_A:
        logits, factor = logits_A + tile * N, A + tile * V
    else:
        tile_B = tile - tiles_A
        logits = logits_B + tile_B * N
        factor = B + ((tile_B % R) * rows_B + tile_B // R) * V
    return logits, factor


@triton.jit
def _pack(value, vector):
    """Return 64-bit integers that sort by value, then by lowest index. NaN is the largest."""
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - vector).to(tl.int64)


@triton.jit
def _load_packed(logits, vector, N: tl.constexpr):
    """Load the logits of a tile, packed; what is beyond them is the least."""
    value = tl.load(logits + vector, mask=vector < N, other=0.0).to(tl.float32)
    return tl.where(vector < N, _pack(value, vector), -0x7FFFFFFFFFFFFFFF)


@triton.jit
def _take_best(packed):
    """Return the packed logits without the best, its index and its value."""
    best = tl.max(packed, 0)
    order = (best >> 32).to(tl.int32)
    value = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    packed = tl.where(packed == best, -0x7FFFFFFFFFFFFFFF, packed)
    return packed, 0x7FFFFFFF - (best & 0x7FFFFFFF), value
