# SPDX-License-Identifier: Apache-2.0
"""Norms of the rows and columns of `W + s·(W1 ⊗ W2)`, and of the product: pure math on LoKr's
factors.

`‖w + s·δ‖² = ‖w‖² + 2s·⟨w, δ⟩ + s²·‖δ‖²` for each row (or column) `w` of `W` and `δ` of the
product. `‖δ‖²` is a squared norm of `W1` times one of `W2`. `⟨w, δ⟩` reads `W` as
`[a, c, b, d, taps]` and sums it against one factor after the other. The product is not allocated.

Source: arXiv:2402.09353, eq. 5, on the factors of arXiv:2309.14859
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...base.tracing import shapes
from ...ops.dispatch import without_autocast
from .kronecker import KroneckerFactors, dense_left, dense_right

# Sums over `W [a, c, b, d, taps]` for the norms of rows and of columns: with `W1`, then with `W2`.
_ROWS = "acbdt,ab->acdt", "acdt,cdt->ac"
_COLUMNS = "acbdt,ab->cbdt", "cbdt,cdt->bd"


@torch.no_grad()
def weight_norms(
    W: Tensor,
    f: KroneckerFactors,
    kernel: tuple[int, ...] = (),
    scale: float | Tensor = 1.0,
    flat: bool = False,
    row_offset: int = 0,
    by_columns: bool = False,
) -> Tensor:
    """Return the norms of the rows of `W + s·ΔW`, or of its columns, without a gradient. A column
    has all weights of one input feature (or channel of a group).

    Args:
        W: `[out, in, *kernel]`, of any floating-point dtype.
        f: The adapter's tensors.
        kernel: Kernel size of a convolution; empty for a linear layer.
        scale: `s`.
        flat: Swap the two sides of the product, as in `kronecker_weight`.
        row_offset: First row of the product that `ΔW` has.
        by_columns: Return the norms of columns.

    Returns:
        `[out]` or `[in]`, positive, in float32 or wider, at `out · in · taps` multiplications.

    Example:
        >>> f = KroneckerFactors(w1=torch.tensor([[2.0]]), w2=torch.tensor([[0.0, 2.0]]))
        >>> weight_norms(torch.tensor([[3.0, 0.0]]), f)  # of (3, 4)
        tensor([5.])

    Source: arXiv:2402.09353, eq. 5
    """
    wide, taps = torch.promote_types(W.dtype, torch.float32), math.prod(kernel)
    with without_autocast(W):
        # `no_grad` does not stop forward-mode gradients, `detach` does.
        W, W1, W2 = W.detach(), dense_left(f).detach(), dense_right(f, kernel).detach()
        scale = scale.detach() if isinstance(scale, Tensor) else scale
        W2 = W2.flatten(2) if kernel else W2.unsqueeze(-1)
        (a, b), (c, d, _), (out, *_) = shapes(W1, W2, W)
        if a * c != out:  # rows of the product that the layer lacks count as zero
            padded = W.new_zeros(a * c, *W.shape[1:])
            padded[row_offset : row_offset + out] = W
            W = padded
        grid = (
            W.view(c, a, d, b, taps).permute(1, 0, 3, 2, 4) if flat else W.reshape(a, c, b, d, taps)
        )
        if by_columns or flat:
            with_left, with_right = _COLUMNS if by_columns else _ROWS
            partial = torch.einsum(with_left, grid, W1.to(W.dtype)).to(wide)
            overlap = torch.einsum(with_right, partial, W2.to(wide))
        else:
            # `W2` first: a contiguous `W` is not copied for that product.
            right_rows = W2.flatten(1).to(W.dtype).repeat(a, 1).unsqueeze(-1)
            partial = torch.bmm(grid.reshape(a * c, b, d * taps), right_rows).view(a, c, b).to(wide)
            overlap = torch.einsum("acb,ab->ac", partial, W1.to(wide))
        squares1, squares2 = W1.to(wide).square(), W2.to(wide).square()
        if not by_columns:
            squares = squares1.sum(1).outer(squares2.sum((1, 2)))
        elif a * c == out:
            squares = squares1.sum(0).outer(squares2.sum((0, 2)))
        else:
            inside = squares1.new_zeros(a * c)
            inside[row_offset : row_offset + out] = 1
            squares = torch.einsum("ac,ab,cdt->bd", inside.view(a, c), squares1, squares2)
        summed = [0, *range(2, W.dim())] if by_columns else [*range(1, W.dim())]
        base_norms = torch.linalg.vector_norm(W, dim=summed, dtype=wide)
        change = 2 * scale * overlap + scale * scale * squares
        result = base_norms.square() + (change.mT if flat else change).flatten()
        result = result if by_columns else result[row_offset : row_offset + out]
    return result.clamp_min(torch.finfo(wide).tiny).sqrt()


def product_norm(f: KroneckerFactors, kernel: Sequence[int] = ()) -> Tensor:
    """Return the Frobenius norm `‖W1 ⊗ W2‖ = ‖W1‖ · ‖W2‖`, without a gradient, at one
    multiplication per element of `W1` and `W2`.

    Example:
        >>> product_norm(KroneckerFactors(w1=torch.tensor([[2.0]]), w2=torch.tensor([[3.0, 4.0]])))
        tensor(10.)
    """
    W1, W2 = dense_left(f).detach(), dense_right(f, kernel).detach()
    wide = torch.promote_types(W1.dtype, torch.float32)
    return torch.linalg.vector_norm(W1, dtype=wide) * torch.linalg.vector_norm(W2, dtype=wide)
