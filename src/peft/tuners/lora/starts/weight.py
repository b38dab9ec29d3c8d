# SPDX-License-Identifier: Apache-2.0
"""PiSSA and OLoRA: factors from a decomposition of the base weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ....ops.low_rank import subspace_svd
from ..factors import Factors


@torch.no_grad()
def pissa(W: Tensor, r: int, scale: float, niter: int | None = None) -> Factors:
    """Return the largest singular values of a weight as a product, `s·B·A ≈ W`, split evenly
    between both factors.

    Args:
        W: `[out, in]`.
        r: How many.
        scale: `s`.
        niter: Rounds of randomised subspace iteration, None for an exact decomposition. A weight
            has the same result each time.

    Source: arXiv:2404.02948, eq. 2 to 4; arXiv:0909.4061, algorithms 4.4 and 5.1
    """
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = subspace_svd(W, r, niter)
        Vh = V.mT
    root = (S[:r] / scale).sqrt()
    return Factors(root.unsqueeze(1) * Vh[:r], U[:, :r] * root)


@torch.no_grad()
def olora(W: Tensor, r: int) -> Factors:
    """Return the first `r` orthonormal columns of a weight's QR decomposition as `B`, the first
    rows of its triangle as `A`.

    Source: arXiv:2406.01775, algorithm 1
    """
    Q, R = torch.linalg.qr(W.to(torch.promote_types(W.dtype, torch.float32)))
    return Factors(R[:r].contiguous(), Q[:, :r].contiguous())
