# SPDX-License-Identifier: Apache-2.0
"""LoRA-GA: factors from the gradient of the base weight, so that the first step of training changes
the weight as a step of full fine-tuning would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....ops.low_rank import subspace_svd
from ..factors import Factors

# Attribute of a base layer with the gradient of its weight.
GRADIENT = "_peft_loraga_grad"
DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")
_ROUNDS = 4  # of subspace iteration


@torch.no_grad()
def gradient_factors(
    G: Tensor,
    W: Tensor,
    r: int,
    scale: float,
    direction: str = "ArB2r",
    how_scaled: str = "stable",
    stable_gamma: float = 16,
) -> Factors:
    """Return `A [r, in]`, right singular vectors of the gradient `G ≈ U·S·Vᵀ`, and `B [out, r]`,
    left singular vectors times their singular values.

    Args:
        G: `[out, in]`.
        W: The weight, `[out, in]`.
        r: Rank; `2r` singular values are used.
        scale: `s` of the adapter.
        direction: The singular values of `A` and of `B`, counted from 0: "ArB2r" the first `r` and
            the next `r`; "A2rBr" the other way round; "ArBr" the odd and the even ones; "random"
            the same `r` of all for both.
        how_scaled: "stable" multiplies `B` by `out^¼ / √γ`; "weight_svd" gives its first column the
            norm of `W`'s largest singular value; "gd_scale" divides both factors by `s`; "unit"
            leaves them.
        stable_gamma: `γ`.

    Source: arXiv:2407.05000, section 3
    """
    G = G.float()
    U, S, V = subspace_svd(G, min(4 * r, *G.shape), _ROUNDS)
    first, second = torch.arange(r), torch.arange(r, 2 * r)
    if direction == "ArBr":
        of_A, of_B = torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)
    elif direction == "random":
        of_A = of_B = torch.randperm(2 * r)[:r]
    else:
        of_A, of_B = (first, second) if direction == "ArB2r" else (second, first)
    of_A, of_B = of_A.to(G.device), of_B.to(G.device)
    A, B = V[:, of_A].mT, U[:, of_B] * S[of_B]
    if how_scaled == "stable":
        B = B * (len(W) ** 0.25 / stable_gamma**0.5)
    elif how_scaled == "weight_svd":
        largest = subspace_svd(W.float(), min(4 * r, *W.shape), _ROUNDS).S[0]
        B = B * torch.where(S[of_B[0]] > 0, largest / S[of_B[0]].clamp_min(1e-30), 1.0)
    elif how_scaled == "gd_scale":
        A, B = A / scale, B / scale
    return Factors(A.contiguous(), B.contiguous())
