# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for `mixing.mix` and for its gradient.

As a matrix product the mixing has as many rows as there are samples, a shape for which libraries
have no fast kernel. Here each number of a skill is read once for a few samples, and each gradient
once for a few skills.

Source: arXiv:2202.13914, arXiv:2211.03831
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
_MOST_SKILLS, _MOST_SAMPLES = 256, 1024

# Orders of a sample's factor, see `_offset`.
_AS_IS: tl.constexpr = tl.constexpr(0)
_BY_RANK: tl.constexpr = tl.constexpr(1)
_TRANSPOSED: tl.constexpr = tl.constexpr(2)

# Number of elements of a skill that one program computes. A program is a single warp, so its sums
# wait for no other.
_BLOCK = 128
# Largest number of skills, and of pairs of a skill and a sample, in one program. Forward reads the
# skills again for more samples, backward reads the gradients again for more skills.
_SKILLS, _SKILLS_BACKWARD, _PAIRS = 4, 8, 16


def fits(weights: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the kernels support these tensors."""
    (batch, _, n_skills), dtypes = weights.shape, {weights.dtype, A.dtype, B.dtype}
    if not (dtypes <= _DTYPES and A.dtype == B.dtype and A.numel() and B.numel()):
        return False
    if not (weights.is_contiguous() and A.is_contiguous() and B.is_contiguous()):
        return False
    return 0 < batch <= _MOST_SAMPLES and n_skills <= _MOST_SKILLS


def forward(weights: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mix the skills in one launch; sums are in float32 and in a fixed order."""
    (batch, n_splits, n_skills), (width, r), out = weights.shape, A.shape[2:], B.shape[3]
    A_w = A.new_empty((batch, n_splits * width, r), dtype=dtype)
    B_w = B.new_empty((batch, r, n_splits * out), dtype=dtype)
    sizes = _sizes(n_splits, n_skills, r, batch, _SKILLS)
    with on_device_of(A):
        _mix_kernel[(_blocks(A, B), n_splits, triton.cdiv(batch, sizes["BLOCK_B"]))](
            weights, A, B, A_w, B_w, batch, width, out, **sizes, num_warps=1
        )
    return A_w, B_w


def backward(
    weights: Tensor,
    A: Tensor,
    B: Tensor,
    dtype: torch.dtype,
    gradients: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of the tensors in `wanted`, in two launches, one of them to sum the
    weights'.
    """
    for_weights, for_A, for_B = wanted
    (batch, n_splits, n_skills), r, (grad_A_w, grad_B_w) = weights.shape, A.shape[3], gradients
    is_transposed = grad_A_w.mT.is_contiguous()  # as the product with the input returns it
    order_A = (_TRANSPOSED if is_transposed else _AS_IS).value
    grad_A_w = grad_A_w if is_transposed else grad_A_w.contiguous()
    sizes, blocks = _sizes(n_splits, n_skills, r, batch, _SKILLS_BACKWARD), _blocks(A, B)
    grad_A = torch.empty_like(A if for_A else A[:0])
    grad_B = torch.empty_like(B if for_B else B[:0])
    partials = A.new_empty((blocks if for_weights else 0, *weights.shape), dtype=torch.float32)
    grid = blocks, n_splits, triton.cdiv(n_skills, sizes["BLOCK_S"])
    with on_device_of(A):
        _unmix_kernel[grid](
            weights, A, B, grad_A_w, grad_B_w.contiguous(), grad_A, grad_B, partials,
            batch, A.shape[2], B.shape[3], for_weights, for_A, for_B, order_A, **sizes, num_warps=1,
        )  # fmt: skip
    found = [partials.sum(0).to(weights.dtype)] if for_weights else []
    return found + [gradient for gradient, want in ((grad_A, for_A), (grad_B, for_B)) if want]


def _blocks(A: Tensor, B: Tensor) -> int:
    """Return the numbers of blocks of one split's skill: of `A`, and of `B`."""
    r = A.shape[3]
    return triton.cdiv(A.shape[2] * r, _BLOCK) + triton.cdiv(B.shape[3] * r, _BLOCK)


@functools.cache
def _sizes(n_splits: int, n_skills: int, r: int, batch: int, most_skills: int) -> dict[str, int]:
    """Return the sizes that a kernel is compiled for."""
    skills = min(triton.next_power_of_2(n_skills), most_skills)
    samples = min(triton.next_power_of_2(batch), _PAIRS // skills)
    blocks = {"BLOCK_B": samples, "BLOCK_S": skills, "BLOCK": _BLOCK}
    return {"Q": n_splits, "S": n_skills, "R": r, **blocks}


@triton.jit(do_not_specialize=["batch"])
def _mix_kernel(
    weights, A, B, A_w, B_w, batch, width, out,
    Q: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute a block of one split's factor `A_w` or `B_w`, for a few samples."""
    block, blocks_A = tl.program_id(0), tl.cdiv(width * R, BLOCK)
    if block < blocks_A:
        _mix_block(weights, A, A_w, block, batch, width, _AS_IS, Q, S, R, BLOCK_B, BLOCK_S, BLOCK)
    else:
        block -= blocks_A
        _mix_block(weights, B, B_w, block, batch, out, _BY_RANK, Q, S, R, BLOCK_B, BLOCK_S, BLOCK)


@triton.jit
def _mix_block(
    weights, skills, mixed, block, batch, width,
    ORDER: tl.constexpr, Q: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store `Σ_s w[b, s] skill[s]` for a block of the skills and a few samples `b`."""
    split, size = tl.program_id(1), width * R
    number = block * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    own = skills + split.to(tl.int64) * S * size
    total = tl.zeros([BLOCK_B, BLOCK], tl.float32)
    for first in range(0, S, BLOCK_S):
        skill = first + tl.arange(0, BLOCK_S)
        real = (skill < S)[:, None] & (number < size)[None, :]
        values = tl.load(own + skill[:, None] * size + number[None, :], mask=real, other=0.0)
        shares = _load_weights(weights, sample, skill, split, batch, Q, S)
        total += tl.sum(shares[:, :, None] * values.to(tl.float32)[None, :, :], 1)
    real = (sample < batch)[:, None] & (number < size)[None, :]
    offset = _offset(number, split, width, size, ORDER, Q, R)
    at = sample.to(tl.int64)[:, None] * (Q * size) + offset[None, :]
    tl.store(mixed + at, total.to(mixed.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["batch"])
def _unmix_kernel(
    weights, A, B, grad_A_w, grad_B_w, grad_A, grad_B, partials, batch, width, out,
    FOR_WEIGHTS: tl.constexpr, FOR_A: tl.constexpr, FOR_B: tl.constexpr, ORDER_A: tl.constexpr,
    Q: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a block of `A` or `B` for a few skills, and the block's part of the
    gradients of the weights.
    """
    block, blocks_A = tl.program_id(0), tl.cdiv(width * R, BLOCK)
    partial = partials + block.to(tl.int64) * batch * (Q * S)
    if block < blocks_A:
        _unmix_block(
            weights, A, grad_A_w, grad_A, partial, block, batch, width,
            FOR_WEIGHTS, FOR_A, ORDER_A, Q, S, R, BLOCK_B, BLOCK_S, BLOCK,
        )  # fmt: skip
    else:
        block -= blocks_A
        _unmix_block(
            weights, B, grad_B_w, grad_B, partial, block, batch, out,
            FOR_WEIGHTS, FOR_B, _BY_RANK, Q, S, R, BLOCK_B, BLOCK_S, BLOCK,
        )  # fmt: skip


@triton.jit
def _unmix_block(
    weights, skills, grad_mixed, grad_skills, partial, block, batch, width,
    FOR_WEIGHTS: tl.constexpr, FOR_SKILLS: tl.constexpr, ORDER: tl.constexpr,
    Q: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With `g` the gradient of a block of the mixed factor, store `Σ_b w[b, s] g[b]`, and
    `g[b] · skill[s]` as the block's part of the gradients of the weights.
    """
    split, size = tl.program_id(1), width * R
    number = block * BLOCK + tl.arange(0, BLOCK)
    skill = tl.program_id(2) * BLOCK_S + tl.arange(0, BLOCK_S)
    offset = _offset(number, split, width, size, ORDER, Q, R)
    own = (split.to(tl.int64) * S + skill)[:, None] * size + number[None, :]
    real = (skill < S)[:, None] & (number < size)[None, :]
    total = tl.zeros([BLOCK_S, BLOCK], tl.float32)
    if FOR_WEIGHTS:
        values = tl.load(skills + own, mask=real, other=0.0).to(tl.float32)
    for first in range(0, batch, BLOCK_B):
        sample = first + tl.arange(0, BLOCK_B)
        there = (sample < batch)[:, None] & (number < size)[None, :]
        source = sample.to(tl.int64)[:, None] * (Q * size) + offset[None, :]
        g = tl.load(grad_mixed + source, mask=there, other=0.0).to(tl.float32)
        if FOR_SKILLS:
            shares = _load_weights(weights, sample, skill, split, batch, Q, S)
            total += tl.sum(shares[:, :, None] * g[:, None, :], 0)
        if FOR_WEIGHTS:
            at = (sample[:, None] * Q + split) * S + skill[None, :]
            sums = tl.sum(values[None, :, :] * g[:, None, :], 2)
            tl.store(partial + at, sums, mask=(sample < batch)[:, None] & (skill < S)[None, :])
    if FOR_SKILLS:
        tl.store(grad_skills + own, total.to(grad_skills.dtype.element_ty), mask=real)


@triton.jit
def _load_weights(weights, sample, skill, split, batch, Q: tl.constexpr, S: tl.constexpr):
    """Load the weights of some samples and skills, `[samples, skills]`."""
    offset = (sample[:, None] * Q + split) * S + skill[None, :]
    return tl.load(
        weights + offset, mask=(sample < batch)[:, None] & (skill < S)[None, :], other=0.0
    ).to(tl.float32)


@triton.jit
def _offset(number, split, width, size, ORDER: tl.constexpr, Q: tl.constexpr, R: tl.constexpr):
    """Return the offset in a sample's factor of an element of one split's skill.

    The shapes of factor and skill are `[Q·width, R]` and `[width, R]` (as is), `[R, Q·width]` and
    `[R, width]` (by rank), or `[R, Q·width]` and `[width, R]` (transposed).
    """
    if ORDER == _TRANSPOSED:
        offset = (number % R) * (Q * width) + split * width + number // R
    elif ORDER == _BY_RANK and Q > 1:
        offset = (number // width) * (Q * width) + split * width + number % width
    else:
        offset = split * size + number
    return offset
