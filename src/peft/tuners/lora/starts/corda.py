# SPDX-License-Identifier: Apache-2.0
"""CorDA: factors from a decomposition of the weight, weighted by the layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....base.errors import PeftValueError
from ..factors import Factors

# Share of the mean variance that is added to the covariance, doubled until its inverse is exact to
# the tolerance.
_DAMPING, _TOLERANCE, _MOST_DOUBLINGS = 0.01, 0.05, 64


@dataclass
class CordaEigens:
    """Components of a weight `W [out, in]`, `Σᵢ Sᵢ · Uᵢ·Vᵢᵀ`, for `r` chosen `i`.

    Args:
        S_WC: `[r]`, singular values of `W·C` with the covariance `C` of the layer's inputs.
        U_WC: `[out, r]`, its left singular vectors.
        V_WC: `[in, r]`, its right singular vectors times `C⁻¹`.
    """

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor

    def factors(self, scale: float) -> Factors:
        """Return `A [r, in]` and `B [out, r]` with `s·B·A` the components."""
        root = (self.S_WC.float() / scale).sqrt()
        return Factors(root.unsqueeze(1) * self.V_WC.float().mT, self.U_WC.float() * root)


def covariance(rows: Tensor) -> Tensor:
    """Return `XᵀX` of rows `X [n, in]` divided by the magnitude of their largest value."""
    rows = rows / rows.max().abs()
    return rows.mT @ rows


@torch.no_grad()
def corda(W: Tensor, C: Tensor, r: int, method: str) -> CordaEigens:
    """Return `r` components of a weight, those that its inputs use most or least.

    `SVD(W·C) = U·S·Vᵀ` gives `W = U·S·(Vᵀ·C⁻¹)`. `C` is damped so that it has an inverse.

    Args:
        W: `[out, in]`.
        C: `[in, in]`.
        r: How many.
        method: "ipm" for the largest singular values, which the inputs use most; "kpm" for the
            smallest, so that what they use is kept.

    Raises:
        PeftValueError: `C` is zero, not finite, or has no inverse.

    Source: arXiv:2406.05223, eq. 3 to 5 and section 3.3
    """
    C = C.float()
    variance, eye = C.diagonal().mean(), torch.eye(len(C), device=C.device)
    if not (torch.isfinite(C).all() and variance > 0):
        raise PeftValueError("the covariance of its inputs is zero or not finite.")
    for doubling in range(_MOST_DOUBLINGS):
        damped = C + eye * (variance * _DAMPING * 2**doubling)
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < _TOLERANCE:
            break
    else:
        raise PeftValueError("the covariance of its inputs has no inverse.")
    U, S, Vh = torch.linalg.svd(W.float() @ damped, full_matrices=False)
    V = (Vh @ inverse).mT
    chosen = slice(0, r) if method == "ipm" else slice(len(S) - r, len(S))
    return CordaEigens(S[chosen].clone(), U[:, chosen].clone(), V[:, chosen].clone())
