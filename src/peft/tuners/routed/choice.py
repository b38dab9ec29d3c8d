# SPDX-License-Identifier: Apache-2.0
"""The choice among experts: scores of an input for each expert, and the weights of the best. Pure
functions of tensors.

    s_e = |p_e · x|                        arrow: p_e is the first right singular vector of ΔW_e
    s_e = cos(p_e, x)                      activation: p_e is a mean input
    s_e = LN(v_e) · LN(x) / √in            phatgoose: v_e is a trained gate, LN standardizes
    s_e = v_e · x                          input: v_e is trained

    w = softmax over the k largest of s / temperature; for input the k largest of softmax(s / t)

Source: arXiv:2405.11157, section 3.2 (Arrow); arXiv:2402.05859, section 3 (PHATGOOSE);
arXiv:2101.03961, section 2.1 (weights that train with any k)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base.tracing import shapes
from ...ops.low_rank import LowRank, product_svd, wide

_EPS = 1e-5
# Kinds whose gates `prepared` changes.
PREPARED = ("activation", "phatgoose")


class Choice(NamedTuple):
    """Weights of the experts that were chosen.

    Attributes:
        weights: `[..., k]`.
        experts: Their indices, `[..., k]`; None for all experts in order.
    """

    weights: Tensor
    experts: Tensor | None = None


def prepared(kind: str, gates: Tensor) -> Tensor:
    """Return prototypes or gates `[experts, in]` as `scores` multiplies them."""
    if kind == "activation":
        return F.normalize(gates, dim=-1)
    return F.layer_norm(gates, gates.shape[-1:], eps=_EPS) if kind == "phatgoose" else gates


def scores(kind: str, x: Tensor, gates: Tensor) -> Tensor:
    """Return the score of each expert, `[..., experts]`, in float32 at least.

    Args:
        kind: "arrow", "activation", "phatgoose" or "input".
        x: `[..., in]`.
        gates: `[experts, in]`, `prepared`.

    Source: arXiv:2405.11157, section 3.2; arXiv:2402.05859, section 3
    """
    products = F.linear(x, gates)
    products = products.to(torch.promote_types(products.dtype, torch.float32))
    if kind == "arrow":
        return products.abs()
    if kind == "input":
        return products
    x = x.to(products.dtype)
    if kind == "activation":
        return products / x.norm(dim=-1, keepdim=True).clamp(min=_EPS)
    # Standardized gates sum to zero, so that the mean of `x` drops out of their product.
    variance = x.var(dim=-1, keepdim=True, correction=0)
    return products * ((variance + _EPS) * x.shape[-1]).rsqrt()


def choose(kind: str, scores: Tensor, top_k: int | None, temperature: float) -> Choice:
    """Return the weights of the experts with the largest scores.

    Args:
        scores: `[..., experts]`.
        top_k: Number of experts, None for all.
        temperature: Divides the scores.

    Example:
        >>> choose("arrow", torch.tensor([1.0, 3.0, 3.0]), 2, 1.0)
        Choice(weights=tensor([0.5000, 0.5000]), experts=tensor([1, 2]))
    """
    if top_k is None or top_k >= shapes(scores)[0][-1]:
        return Choice((scores / temperature).softmax(-1))
    if kind == "input":
        values, experts = (scores / temperature).softmax(-1).topk(top_k, dim=-1)
        return Choice(values, experts)
    values, experts = scores.topk(top_k, dim=-1)
    return Choice((values / temperature).softmax(-1), experts)


def arrow_prototypes(deltas: Sequence[LowRank], general: LowRank | None = None) -> Tensor:
    """Return the first right singular vector of each `ΔW_e - ΔW_general`, `[experts, in]`, in
    float64 where the device has it; zeros for a delta that is zero. Their signs are arbitrary.

    Deltas of one rank are decomposed together, from their factors.

    Source: arXiv:2405.11157, section 3.2
    """
    by_rank: dict[int, list[int]] = {}
    for i, delta in enumerate(deltas):
        by_rank.setdefault(delta.rank, []).append(i)
    found = wide(deltas[0].A).new_zeros(len(deltas), deltas[0].A.shape[1])
    for same in by_rank.values():
        B, A = torch.stack([deltas[i].B for i in same]), torch.stack([deltas[i].A for i in same])
        if general is not None:
            B = torch.cat([B, -general.B.to(B).expand(len(same), -1, -1)], dim=2)
            A = torch.cat([A, general.A.to(A).expand(len(same), -1, -1)], dim=1)
        triples = product_svd(B, A)
        found[same] = torch.where(triples.S[:, :1] > 0, triples.V[:, :, 0], 0)
    return found


def gate_weights(x: Tensor, gates: Tensor) -> Tensor:
    """Return the weight `σ(v · x)` with which a PHATGOOSE gate is trained, `[samples, tokens, 1]`.

    Args:
        x: `[samples, tokens, in]`.
        gates: The gate of each sample's own expert, `[samples, in]`.

    Source: arXiv:2402.05859, section 3.1
    """
    return torch.bmm(x, gates.unsqueeze(-1)).sigmoid()
