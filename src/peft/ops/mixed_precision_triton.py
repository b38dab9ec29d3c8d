# SPDX-License-Identifier: Apache-2.0
"""The products of `mixed_precision.py`, one Triton kernel each.

An activation is in bfloat16 or float16 and contiguous, a factor in float32. Shapes are those of
`mixed_precision.py`. The activation is read once as it is, and no copy of it in float32 is made.
This is exact: a bfloat16 number is multiplied by three bfloat16 parts of the float32 number, which
together have all of its 24 bits; a float16 number is exact in TF32, and is multiplied by two TF32
parts. Sums are in float32; long sums are made in parts, which are added up in a fixed order.
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import INTERPRETED
from .triton_support import on_device_of

# The interpreter multiplies the bits of bfloat16 as integers.
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)

Plan: TypeAlias = tuple[int, tuple[int, int], int, dict[str, int]]

LARGEST_RANK = 128
"""Most columns of a factor."""


def down(activation: Tensor, factor: Tensor, scale: float) -> Tensor:
    """Return `scale · activation · factor` in float32."""
    (n, rows, k), m = _shape(activation), factor.shape[-1]
    splits, grid, steps, sizes = _plan_down(n, rows, k, m)
    out = activation.new_empty((splits, *activation.shape[:-1], m), dtype=torch.float32)
    with on_device_of(activation):
        _down_kernel[grid](
            activation, factor, out, float(scale), n, rows, k, m, *_strides(factor), steps, **sizes
        )
    return out[0] if splits == 1 else out.sum(0)


def across(factor: Tensor, activation: Tensor, scale: float) -> Tensor:
    """Return `scale · factorᵀ · activation` in float32."""
    (n, rows, k), m = _shape(activation), factor.shape[-1]
    splits, grid, steps, sizes = _plan_across(n, rows, k, m)
    out = activation.new_empty((splits, *activation.shape[:-2], m, k), dtype=torch.float32)
    with on_device_of(activation):
        _across_kernel[grid](
            factor, activation, out, float(scale), n, rows, k, m, *_strides(factor), steps, **sizes
        )
    return out[0] if splits == 1 else out.sum(0)


def up(base: Tensor | None, p: Tensor, q: Tensor, out: Tensor) -> Tensor:
    """Compute `out = base + p · q`, rounded once. A base of None is zero; `out` may be `base`."""
    (n, rows, k), columns = _shape(p), q.shape[-1]
    grid, sizes = _plan_up(n, rows, k, columns)
    first = out if base is None else base
    with on_device_of(out):
        _up_kernel[grid](
            *(first, p, q, out, rows, columns, k, *_strides(p), *_strides(q)),
            ADDS=base is not None,
            **sizes,
        )
    return out


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tensor.shape if tensor.dim() == 3 else (1, *tensor.shape)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.dim() == 3 else (0, *tensor.stride())


def blocks(length: int, width: int) -> tuple[int, int]:
    """Return the sides of the blocks of an activation and of a factor."""
    return _block(length, 256), _block(width, LARGEST_RANK)


@functools.lru_cache(1024)
def _plan_down(n: int, rows: int, k: int, m: int) -> Plan:
    """Return the number of partial sums, the grid, a program's loop steps, and the constants."""
    block_m = _block(m, LARGEST_RANK)
    is_narrow = block_m < 64
    block_r = _block(rows, 64 if is_narrow else 128)
    block_k = _block(k, 64 if block_m < 128 else 32)
    blocks = n * _ceil(rows, block_r)
    splits = _splits(blocks, _ceil(k, 2 * block_k), 512)
    sizes = _sizes(4 if is_narrow else 8, 3 if is_narrow else 2, R=block_r, K=block_k, M=block_m)
    return splits, (blocks, splits), _ceil(_ceil(k, block_k), splits), sizes


@functools.lru_cache(1024)
def _plan_across(n: int, rows: int, k: int, m: int) -> Plan:
    """Return the same as `_plan_down`."""
    block_m = _block(m, LARGEST_RANK)
    block_k = _block(k, 256 if block_m < 32 else 128 if block_m < 64 else 64)
    warps, stages, programs = 2, 4, 1024
    if block_k >= 128 or block_m > 16:
        warps, stages, programs = (8, 4, 256) if block_k == 256 else (4, 3, 512)
    block_r = _block(rows, 32 if block_k == 256 or block_m > 32 else 64)
    blocks = n * _ceil(k, block_k)
    splits = _splits(blocks, _ceil(rows, 4 * block_r), programs)
    sizes = _sizes(warps, stages, R=block_r, K=block_k, M=block_m)
    return splits, (blocks, splits), _ceil(_ceil(rows, block_r), splits), sizes


@functools.lru_cache(1024)
def _plan_up(n: int, rows: int, k: int, columns: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid, and the constants that the kernel is compiled for."""
    block_k = _block(k, LARGEST_RANK)
    block_c = _block(columns, 128 if block_k < 64 else 64)
    block_r = _block(rows, 32 if block_c == 128 or block_k == 128 else 64)
    sizes = _sizes(4, 3, R=block_r, C=block_c, K=block_k)
    return (n * _ceil(rows, block_r), _ceil(columns, block_c)), sizes


def _sizes(warps: int, stages: int, **blocks: int) -> dict[str, int]:
    sides = {f"BLOCK_{side}": size for side, size in blocks.items()}
    return {"num_warps": warps, "num_stages": stages, **sides}


def _block(size: int, most: int) -> int:
    """Return the side of a block: a power of two, at least 16 for the matrix units."""
    return min(1 << max(size - 1, 15).bit_length(), most)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _splits(blocks: int, most: int, programs: int) -> int:
    """Return the number of partial sums that gives about `programs`: a few a multiprocessor."""
    return max(min(programs // max(blocks, 1), most), 1)


@triton.jit(do_not_specialize=["n", "rows", "steps"])
def _down_kernel(
    activation, factor, out, scale, n, rows, k, m, stride_n, stride_k, stride_m, steps,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Compute a block of rows of the product, from `steps` blocks of the inner dimension."""
    blocks = tl.cdiv(rows, BLOCK_R)
    sample, first = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * BLOCK_R
    split = tl.program_id(1)
    row, inner, column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    real_row, real_column = (first + row < rows)[:, None], (column < m)[None, :]
    activation += (sample * rows + first) * k
    factor += sample * stride_n
    total = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    for step in range(split * steps, min((split + 1) * steps, tl.cdiv(k, BLOCK_K))):
        at = step * BLOCK_K + inner
        a = tl.load(
            activation + row[:, None] * k + at[None, :],
            mask=real_row & (at < k)[None, :],
            other=0.0,
        )
        b = tl.load(
            factor + at[:, None] * stride_k + column[None, :] * stride_m,
            mask=(at < k)[:, None] & real_column,
            other=0.0,
        )
        total = _add_dot(a, b, total)
    out += ((split.to(tl.int64) * n + sample) * rows + first) * m
    tl.store(out + row[:, None] * m + column[None, :], total * scale, mask=real_row & real_column)


@triton.jit(do_not_specialize=["n", "rows", "steps"])
def _across_kernel(
    factor, activation, out, scale, n, rows, k, m, stride_n, stride_r, stride_m, steps,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Compute a block of the product, from `steps` blocks of the rows that are summed over."""
    blocks = tl.cdiv(k, BLOCK_K)
    sample, first = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * BLOCK_K
    split = tl.program_id(1)
    row, inner, column = tl.arange(0, BLOCK_R), first + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    real_inner, real_column = (inner < k)[None, :], (column < m)[None, :]
    activation += sample * rows * k
    factor += sample * stride_n
    total = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for step in range(split * steps, min((split + 1) * steps, tl.cdiv(rows, BLOCK_R))):
        at = step * BLOCK_R + row
        real_row = (at < rows)[:, None]
        a = tl.load(
            activation + at[:, None].to(tl.int64) * k + inner[None, :],
            mask=real_row & real_inner,
            other=0.0,
        )
        b = tl.load(
            factor + at[:, None].to(tl.int64) * stride_r + column[None, :] * stride_m,
            mask=real_row & real_column,
            other=0.0,
        )
        total = _add_dot(tl.trans(a), b, total)
    out += (split.to(tl.int64) * n + sample) * m * k
    tl.store(
        out + column[None, :] * k + inner[:, None],
        total * scale,
        mask=(inner < k)[:, None] & real_column,
    )


@triton.jit(do_not_specialize=["rows"])
def _up_kernel(
    base, p, q, out, rows, columns, k, p_stride_n, p_stride_r, p_stride_k, q_stride_n,
    q_stride_k, q_stride_c,
    ADDS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(rows, BLOCK_R)
    sample, first = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * BLOCK_R
    row, inner = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real_row, real_column = (first + row < rows)[:, None], (column < columns)[None, :]
    p += sample * p_stride_n + first.to(tl.int64) * p_stride_r
    q += sample * q_stride_n
    a = tl.load(
        p + row[:, None] * p_stride_r + inner[None, :] * p_stride_k,
        mask=real_row & (inner < k)[None, :],
        other=0.0,
    )
    b = tl.load(
        q + inner[:, None] * q_stride_k + column[None, :] * q_stride_c,
        mask=(inner < k)[:, None] & real_column,
        other=0.0,
    )
    total = tl.dot(a, b, input_precision="tf32x3")
    place = (sample * rows + first) * columns + row[:, None] * columns + column[None, :]
    real = real_row & real_column
    if ADDS:
        total += tl.load(base + place, mask=real, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=real)


@triton.jit
def _add_dot(activation, factor, total):
    """Return `total + activation · factor` with all bits of both. Matrix units cut what they add to
    a sum, so the sum of a block is added without them.
    """
    if activation.dtype == tl.bfloat16:
        high = factor.to(tl.bfloat16)
        rest = factor - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        block = tl.zeros_like(total)
        block = _add_product(activation, low, block)
        block = _add_product(activation, middle, block)
        total += _add_product(activation, high, block)
    else:
        total += tl.dot(activation.to(tl.float32), factor, input_precision="tf32x3")
    return total


@triton.jit
def _add_product(a, b, total):
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total)
