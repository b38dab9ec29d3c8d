# SPDX-License-Identifier: Apache-2.0
"""`mixing.mix` as one kernel, and one for its gradient, where Triton is (see
`ops/triton_support.py`).

As products of matrices the mixing has as many rows as there are samples, a shape that libraries
have nothing good for. Here each number of a skill is read once for a few samples, and each gradient
once for a few skills.

Source: arXiv:2202.13914, arXiv:2211.03831
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.dispatch import is_batched
from ...ops.triton_support import on_device_of

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_MOST_SKILLS, _MOST_SAMPLES = 256, 1024

_AS_IS: tl.constexpr = tl.constexpr(0)
_BY_RANK: tl.constexpr = tl.constexpr(1)
_TURNED: tl.constexpr = tl.constexpr(2)
"""Orders of a sample's factor, see `_place`."""

_PIECE = 128
"""Numbers of a skill that a program has. It is a single warp, which sums by itself and waits for no
other.
"""
_SKILLS, _SKILLS_BACKWARD, _PAIRS = 4, 8, 16
"""Skills, and pairs of a skill and a sample, that a program has at most at a time: forward reads
skills again for more samples, and backward gradients again for more skills.
"""


def fits(weights: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> bool:
    """Whether the kernels are made for such tensors."""
    (batch, _, n_skills), dtypes = weights.shape, {weights.dtype, A.dtype, B.dtype}
    if not (dtypes <= _DTYPES and A.dtype == B.dtype and A.numel() and B.numel()):
        return False
    return 0 < batch <= _MOST_SAMPLES and n_skills <= _MOST_SKILLS


def mix(weights: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """`mixing.mix` in one launch, two with the sum of the weights' gradients in backward.

    Sums are in float32, and always in the same order.

    Args:
        weights: `[batch, n_splits, n_skills]`.
        A: `[n_splits, n_skills, in // n_splits, r]`.
        B: `[n_splits, n_skills, r, out // n_splits]`, of the same dtype.
        scale: Factor on `B_w`.

    Returns:
        `A_w [batch, in, r]` and `B_w [batch, r, out]`, contiguous, of the skills' dtype; under
        autocast of autocast's.

    Source: arXiv:2211.03831
    """
    device = A.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else A.dtype
    if torch.is_grad_enabled() and (weights.requires_grad or A.requires_grad or B.requires_grad):
        return _Mix.apply(weights, A, B, float(scale), dtype)
    return _mixed(weights, A, B, float(scale), dtype)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(weights, A, B)
        ctx.scale = scale
        return _mixed(weights, A, B, scale, dtype)

    @staticmethod
    def backward(ctx: Any, of_A_w: Tensor, of_B_w: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weights, A, B = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(of_A_w) or is_batched(of_B_w):
            return *_gradients(weights, A, B, ctx.scale, of_A_w, of_B_w), None, None
        for_weights, for_A, for_B, _, _ = ctx.needs_input_grad
        (batch, n_splits, n_skills), r = weights.shape, A.shape[3]
        is_turned = of_A_w.mT.is_contiguous()  # as a product with the input leaves it
        of_A_w, order_A = (
            (of_A_w, _TURNED.value) if is_turned else (of_A_w.contiguous(), _AS_IS.value)
        )
        sizes, pieces = _sizes(n_splits, n_skills, r, batch, _SKILLS_BACKWARD), _pieces(A, B)
        of_A, of_B = (
            torch.empty_like(A if for_A else A[:0]),
            torch.empty_like(B if for_B else B[:0]),
        )
        parts = A.new_empty((pieces if for_weights else 0, *weights.shape), dtype=torch.float32)
        grid = pieces, n_splits, triton.cdiv(n_skills, sizes["BLOCK_S"])
        pointers = weights, A, B, of_A_w, of_B_w.contiguous(), of_A, of_B, parts
        with on_device_of(A):
            _unmix_kernel[grid](
                *pointers,
                batch,
                A.shape[2],
                B.shape[3],
                ctx.scale,
                for_weights,
                for_A,
                for_B,
                order_A,
                **sizes,
                num_warps=1,
            )
        return (
            parts.sum(0).to(weights.dtype) if for_weights else None,
            of_A if for_A else None,
            of_B if for_B else None,
            None,
            None,
        )


def _gradients(
    weights: Tensor, A: Tensor, B: Tensor, scale: float, of_A_w: Tensor, of_B_w: Tensor
) -> tuple[Tensor, ...]:
    """The gradients in plain operations, which can be differentiated again."""
    of_A_w, of_B_w = (
        of_A_w.float().unflatten(1, (A.shape[0], -1)),
        of_B_w.float().unflatten(2, (A.shape[0], -1)) * scale,
    )
    of_weights = torch.einsum("bqdr,qsdr->bqs", of_A_w, A.float()) + torch.einsum(
        "brqd,qsrd->bqs", of_B_w, B.float()
    )
    of_A = torch.einsum("bqs,bqdr->qsdr", weights.float(), of_A_w)
    of_B = torch.einsum("bqs,brqd->qsrd", weights.float(), of_B_w)
    return of_weights.to(weights.dtype), of_A.to(A.dtype), of_B.to(B.dtype)


def _mixed(
    weights: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    (batch, n_splits, n_skills), (width, r), out = weights.shape, A.shape[2:], B.shape[3]
    A_w, B_w = (
        A.new_empty((batch, n_splits * width, r), dtype=dtype),
        B.new_empty((batch, r, n_splits * out), dtype=dtype),
    )
    sizes = _sizes(n_splits, n_skills, r, batch, _SKILLS)
    with on_device_of(A):
        _mix_kernel[(_pieces(A, B), n_splits, triton.cdiv(batch, sizes["BLOCK_B"]))](
            weights, A, B, A_w, B_w, batch, width, out, scale, **sizes, num_warps=1
        )
    return A_w, B_w


def _pieces(A: Tensor, B: Tensor) -> int:
    """Into how many pieces a skill of one split falls: those of `A` come first, then those of `B`."""
    r = A.shape[3]
    return triton.cdiv(A.shape[2] * r, _PIECE) + triton.cdiv(B.shape[3] * r, _PIECE)


@functools.cache
def _sizes(n_splits: int, n_skills: int, r: int, batch: int, most_skills: int) -> dict[str, int]:
    """What a kernel is compiled for."""
    skills = min(triton.next_power_of_2(n_skills), most_skills)
    samples = min(triton.next_power_of_2(batch), _PAIRS // skills)
    return {
        "Q": n_splits,
        "S": n_skills,
        "R": r,
        "BLOCK_B": samples,
        "BLOCK_S": skills,
        "BLOCK": _PIECE,
    }


@triton.jit(do_not_specialize=["batch", "scale"])
def _mix_kernel(
    weights,
    A,
    B,
    A_w,
    B_w,
    batch,
    width,
    out,
    scale,
    Q: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A piece of one split's factor, for a few samples."""
    piece, pieces_A = tl.program_id(0), tl.cdiv(width * R, BLOCK)
    if piece < pieces_A:
        _mix_piece(
            weights, A, A_w, piece, batch, width, 1.0, _AS_IS, Q, S, R, BLOCK_B, BLOCK_S, BLOCK
        )
    else:
        _mix_piece(
            weights,
            B,
            B_w,
            piece - pieces_A,
            batch,
            out,
            scale,
            _BY_RANK,
            Q,
            S,
            R,
            BLOCK_B,
            BLOCK_S,
            BLOCK,
        )


@triton.jit
def _mix_piece(
    weights,
    skills,
    mixed,
    piece,
    batch,
    width,
    scale,
    ORDER: tl.constexpr,
    Q: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split, size = tl.program_id(1), width * R
    number = piece * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    own = skills + split.to(tl.int64) * S * size
    total = tl.zeros([BLOCK_B, BLOCK], tl.float32)
    for first in range(0, S, BLOCK_S):
        skill = first + tl.arange(0, BLOCK_S)
        real = (skill < S)[:, None] & (number < size)[None, :]
        values = tl.load(own + skill[:, None] * size + number[None, :], mask=real, other=0.0).to(
            tl.float32
        )
        shares = _load_weights(weights, sample, skill, split, batch, Q, S)
        total += tl.sum(shares[:, :, None] * values[None, :, :], 1)
    real = (sample < batch)[:, None] & (number < size)[None, :]
    place = (
        sample.to(tl.int64)[:, None] * (Q * size)
        + _place(number, split, width, size, ORDER, Q, R)[None, :]
    )
    tl.store(mixed + place, (total * scale).to(mixed.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["batch", "scale"])
def _unmix_kernel(
    weights,
    A,
    B,
    of_A_w,
    of_B_w,
    of_A,
    of_B,
    parts,
    batch,
    width,
    out,
    scale,
    FOR_WEIGHTS: tl.constexpr,
    FOR_A: tl.constexpr,
    FOR_B: tl.constexpr,
    ORDER_A: tl.constexpr,
    Q: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With `g` the gradient of a piece: `sum_b w[b, s] g[b]` for a few skills, and
    `g[b] . skill[s]`, its part of the weights'.
    """
    piece, pieces_A = tl.program_id(0), tl.cdiv(width * R, BLOCK)
    part = parts + piece.to(tl.int64) * batch * (Q * S)
    if piece < pieces_A:
        _unmix_piece(
            weights,
            A,
            of_A_w,
            of_A,
            part,
            piece,
            batch,
            width,
            1.0,
            FOR_WEIGHTS,
            FOR_A,
            ORDER_A,
            Q,
            S,
            R,
            BLOCK_B,
            BLOCK_S,
            BLOCK,
        )
    else:
        piece -= pieces_A
        _unmix_piece(
            weights,
            B,
            of_B_w,
            of_B,
            part,
            piece,
            batch,
            out,
            scale,
            FOR_WEIGHTS,
            FOR_B,
            _BY_RANK,
            Q,
            S,
            R,
            BLOCK_B,
            BLOCK_S,
            BLOCK,
        )


@triton.jit
def _unmix_piece(
    weights,
    skills,
    of_mixed,
    of_skills,
    part,
    piece,
    batch,
    width,
    scale,
    FOR_WEIGHTS: tl.constexpr,
    FOR_SKILLS: tl.constexpr,
    ORDER: tl.constexpr,
    Q: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split, size = tl.program_id(1), width * R
    number = piece * BLOCK + tl.arange(0, BLOCK)
    skill = tl.program_id(2) * BLOCK_S + tl.arange(0, BLOCK_S)
    place = _place(number, split, width, size, ORDER, Q, R)
    own = (split.to(tl.int64) * S + skill)[:, None] * size + number[None, :]
    real = (skill < S)[:, None] & (number < size)[None, :]
    total = tl.zeros([BLOCK_S, BLOCK], tl.float32)
    if FOR_WEIGHTS:
        values = tl.load(skills + own, mask=real, other=0.0).to(tl.float32) * scale
    for first in range(0, batch, BLOCK_B):
        sample = first + tl.arange(0, BLOCK_B)
        there = (sample < batch)[:, None] & (number < size)[None, :]
        g = tl.load(
            of_mixed + sample.to(tl.int64)[:, None] * (Q * size) + place[None, :],
            mask=there,
            other=0.0,
        ).to(tl.float32)
        if FOR_SKILLS:
            shares = _load_weights(weights, sample, skill, split, batch, Q, S)
            total += tl.sum(shares[:, :, None] * g[:, None, :], 0)
        if FOR_WEIGHTS:
            at = (sample[:, None] * Q + split) * S + skill[None, :]
            products = values[None, :, :] * g[:, None, :]
            tl.store(
                part + at,
                tl.sum(products, 2),
                mask=(sample < batch)[:, None] & (skill < S)[None, :],
            )
    if FOR_SKILLS:
        tl.store(of_skills + own, (total * scale).to(of_skills.dtype.element_ty), mask=real)


@triton.jit
def _load_weights(weights, sample, skill, split, batch, Q: tl.constexpr, S: tl.constexpr):
    """`[samples, skills]`."""
    place = (sample[:, None] * Q + split) * S + skill[None, :]
    return tl.load(
        weights + place, mask=(sample < batch)[:, None] & (skill < S)[None, :], other=0.0
    ).to(tl.float32)


@triton.jit
def _place(number, split, width, size, ORDER: tl.constexpr, Q: tl.constexpr, R: tl.constexpr):
    """Where in a sample's factor a number of a split's skill is.

    The factor is `[Q * width, R]` and the skill `[width, R]`; by rank, they are `[R, Q * width]`
    and `[R, width]`; or the factor is turned, `[R, Q * width]`, and the skill `[width, R]`.
    """
    if ORDER == _TURNED:
        place = (number % R) * (Q * width) + split * width + number // R
    elif ORDER == _BY_RANK and Q > 1:
        place = (number // width) * (Q * width) + split * width + number % width
    else:
        place = split * size + number
    return place
