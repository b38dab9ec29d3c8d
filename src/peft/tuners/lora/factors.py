# SPDX-License-Identifier: Apache-2.0
"""The math of LoRA and DoRA: pure functions of a weight `W [out, in]` and two factors `A [r, in]`,
`B [out, r]`.

A convolution's kernel belongs to the columns: its weight is read as `[out, in · taps]`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...ops.dispatch import without_autocast


class Factors(NamedTuple):
    """`A [r, in]` and `B [out, r]` of a product `B·A`."""

    A: Tensor
    B: Tensor


def row_norms(W: Tensor, A: Tensor, B: Tensor, scale: float | Tensor) -> Tensor:
    """Return the norms of the rows of `W + s·B·A`, without building it and without a gradient.

    `‖w + s·b·A‖² = ‖w‖² + b·(2s·A·w + s²·(A·Aᵀ)·b)` for each row `w` of `W` and `b` of `B`, at
    `in·out·r` multiplications and two readings of `W`.

    Args:
        W: `[out, in]`, of any floating-point format.
        A: `[r, in]`.
        B: `[out, r]`.
        scale: `s`.

    Returns:
        `[out]`, above zero, in float32 or wider.

    Example:
        >>> W, A, B = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0]])
        >>> row_norms(W, A, B, 2.0)  # of (3, 4)
        tensor([5.])

    Source: arXiv:2402.09353, eq. 5
    """
    W, A, B = W.detach(), A.detach(), B.detach()
    wide = torch.promote_types(W.dtype, torch.float32)
    with without_autocast(W):
        squares = torch.linalg.vector_norm(W, dim=1, dtype=wide).square()
        overlap = (A.to(W.dtype) @ W.mT).to(wide)  # [r, out]
        A, B = A.to(wide), B.mT.to(wide)
        squares = squares + (B * (2 * scale * overlap + scale * scale * ((A @ A.mT) @ B))).sum(0)
    return squares.clamp_min(torch.finfo(wide).tiny).sqrt()


def grouped_row_norms(W: Tensor, A: Tensor, B: Tensor, scale: float | Tensor) -> Tensor:
    """Return the norms that the interface uses in place of `row_norms` for a convolution in groups.

    Its factors make a delta across groups, which has no place in `W`. Other implementations add to
    `W` the product of the factors read as `[out / groups, r]` and `[r, in · taps]`, in the order of
    its elements; files mean the same only if this does too.

    Args:
        W: `[out, in / groups, *kernel]`.
        A: `[r, in, *kernel]`.
        B: `[out, r / groups, *1]`.
        scale: `s`.
    """
    W, A, B = W.detach(), A.detach(), B.detach()
    wide = torch.promote_types(W.dtype, torch.float32)
    product = B.to(wide).reshape(-1, A.shape[0]) @ A.to(wide).flatten(1)
    lengths = torch.linalg.vector_norm(
        (W.to(wide) + scale * product.reshape(W.shape)).flatten(1), dim=1
    )
    return lengths.clamp_min(torch.finfo(wide).tiny)


@torch.no_grad()
def draw(A: Tensor, B: Tensor, how: bool | str) -> None:
    """Initialize the factors of a linear or convolutional layer.

    Args:
        A: `[r, in, *kernel]`.
        B: `[out, r, *1]`.
        how: True or "gaussian" for `B·A = 0` with `B` zero, "orthogonal" for `B·A = 0` with neither
            zero, False for any.

    Source: arXiv:2106.09685, section 4.1
    """
    if how == "orthogonal":
        for target, start in zip(
            (A, B), orthogonal(A.shape[0], A.shape[1], B.shape[0], A.device), strict=True
        ):
            target.copy_(start)
        return
    if how == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    nn.init.zeros_(B) if how else nn.init.kaiming_uniform_(B, a=math.sqrt(5))


@torch.no_grad()
def draw_for_embedding(A: Tensor, B: Tensor, how: bool | str) -> None:
    """Initialize the factors of an embedding: `A [r, tokens]` zero unless `how` is False, `B [dim,
    r]` normal.
    """
    nn.init.zeros_(A) if how else nn.init.normal_(A)
    nn.init.normal_(B)


def orthogonal(
    r: int, in_features: int, out_features: int, device: torch.device | None = None
) -> Factors:
    """Return factors whose product is zero though neither is: the rows of `A` lie in half of an
    `r`-dimensional space, those of `B` in the other.

    Args:
        r: An even rank.
        in_features: Columns of `A`.
        out_features: Rows of `B`.
        device: Device of the factors.
    """
    Q = torch.linalg.qr(torch.randn(r, r))[0].to(device)
    spread = 0.1  # small beside the weights of a trained layer
    A = spread * Q[:, ::2] @ torch.randn(r // 2, in_features, device=device)
    B = spread * torch.randn(out_features, r // 2, device=device) @ Q[:, 1::2].mT
    return Factors(A, B)
