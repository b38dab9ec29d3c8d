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

from ...ops.dispatch import shapes, without_autocast
from .kronecker import KroneckerFactors, dense_left, dense_right

# Einsum equations: `W` with `W1`, then with `W2`; squares of `W1` and of `W2`, their product.
_EQUATIONS = {
    "rows": ("acbdt,ab->acdt", "acdt,cdt->ac", ("ab->a", "cdt->c", "a,c->ac")),
    "columns": ("acbdt,ab->cbdt", "cbdt,cdt->bd", ("ab->b", "cdt->d", "b,d->bd")),
}


def row_norms(
    W: Tensor,
    f: KroneckerFactors,
    kernel: tuple[int, ...] = (),
    scale: float | Tensor = 1.0,
    flat: bool = False,
    row_offset: int = 0,
) -> Tensor:
    """Return the norms of the rows of `W + s·ΔW`, without a gradient.

    Args:
        W: `[out, in, *kernel]`, of any floating-point dtype.
        f: The adapter's tensors.
        kernel: Kernel size of a convolution; empty for a linear layer.
        scale: `s`.
        flat: Swap the two sides of the product, as in `kronecker_weight`.
        row_offset: First row of the product that `ΔW` has.

    Returns:
        `[out]`, positive, in float32 or wider, at `out · in · taps` multiplications.

    Example:
        >>> f = KroneckerFactors(w1=torch.tensor([[2.0]]), w2=torch.tensor([[0.0, 2.0]]))
        >>> row_norms(torch.tensor([[3.0, 0.0]]), f)  # of (3, 4)
        tensor([5.])

    Source: arXiv:2402.09353, eq. 5
    """
    return _norms("rows", W, f, kernel, scale, flat, row_offset)


def column_norms(
    W: Tensor,
    f: KroneckerFactors,
    kernel: tuple[int, ...] = (),
    scale: float | Tensor = 1.0,
    flat: bool = False,
    row_offset: int = 0,
) -> Tensor:
    """Return the norms of the columns of `W + s·ΔW`, without a gradient. A column has all weights
    of one input feature (or channel of a group).

    Returns:
        `[in]`, positive, in float32 or wider, at `out · in · taps` multiplications.

    Source: arXiv:2402.09353, eq. 5
    """
    return _norms("columns", W, f, kernel, scale, flat, row_offset)


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


@torch.no_grad()
def _norms(
    axis: str,
    W: Tensor,
    f: KroneckerFactors,
    kernel: Sequence[int],
    scale: float | Tensor,
    flat: bool,
    row_offset: int,
) -> Tensor:
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
        by_left, by_right, (square1, square2, both) = _EQUATIONS[axis]
        if axis == "rows" and not flat:
            # `W2` first: `W` is contiguous for that product, so it is not copied.
            right_rows = W2.flatten(1).to(W.dtype).repeat(a, 1).unsqueeze(-1)
            partial = torch.bmm(grid.view(a * c, b, d * taps), right_rows).view(a, c, b).to(wide)
            overlap = torch.einsum("acb,ab->ac", partial, W1.to(wide))
        else:
            partial = torch.einsum(by_left, grid, W1.to(W.dtype)).to(wide)
            overlap = torch.einsum(by_right, partial, W2.to(wide))
        W1, W2 = W1.to(wide), W2.to(wide)
        if axis == "columns" and a * c != out:
            squares = _columns_within(W1, W2, row_offset, out)
        else:
            squares = torch.einsum(
                both, torch.einsum(square1, W1.square()), torch.einsum(square2, W2.square())
            )
        dim = [*range(1, W.dim())] if axis == "rows" else [0, *range(2, W.dim())]
        own = torch.linalg.vector_norm(W, dim=dim, dtype=wide)
        added = 2 * scale * overlap + scale * scale * squares
        result = own.square() + (added.mT if flat else added).flatten()
        result = result[row_offset : row_offset + out] if axis == "rows" else result
    return result.clamp_min(torch.finfo(wide).tiny).sqrt()


def _columns_within(W1: Tensor, W2: Tensor, first: int, count: int) -> Tensor:
    """Return the squared norms `[b, d]` of the product's columns over `count` rows from `first`."""
    a, c = W1.shape[0], W2.shape[0]
    inside = torch.zeros(a * c, device=W1.device, dtype=W1.dtype)
    inside[first : first + count] = 1
    return torch.einsum("ac,ab,cdt->bd", inside.view(a, c), W1.square(), W2.square())
