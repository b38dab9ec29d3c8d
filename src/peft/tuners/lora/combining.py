# SPDX-License-Identifier: Apache-2.0
"""Combine LoRA adapters: exact sums, their best approximations, and heuristics of model merging.

Below, `f = w·s` is an adapter's weight times its scaling; the result has scaling 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base.errors import PeftValueError
from ...base.progress import track
from ...core.combining import Combination, Combined
from ...ops import task_vectors as merge_utils
from ...ops.low_rank import kept, norm, product_svd, tail
from .base import lora_tensors
from .config import LoraConfig
from .layer import LoraLayer

_BY_ELEMENT = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
KINDS = ("svd", "linear", "cat", *_BY_ELEMENT, *(f"{kind}_svd" for kind in _BY_ELEMENT))


class Term(NamedTuple):
    """An adapter in one layer.

    Attributes:
        weight: `w`, of any sign.
        scale: `s`.
        A: `[r, in · taps]`.
        B: `[out, r]`.
    """

    weight: float
    scale: float
    A: Tensor
    B: Tensor


class Factors(NamedTuple):
    """A combination's factors in one layer, and their distance from the sum if approximated."""

    A: Tensor
    B: Tensor
    error: float | None = None


def concatenated(terms: Sequence[Term]) -> Factors:
    """Return `Σ f_i · B_i·A_i` exactly: the ranks side by side."""
    A = torch.cat([term.A * (term.weight * term.scale) for term in terms])
    return Factors(A, torch.cat([term.B for term in terms], dim=1), 0.0)


def by_factor(terms: Sequence[Term], request: Combination) -> Factors:
    """Combine the `A` and the `B`, with weights `±√|f_i|` and `√|f_i|`. The rank is that of one
    adapter; the result is not the sum of the deltas, since each `B_i` multiplies all `A_j`.
    """
    roots = [math.sqrt(abs(term.weight * term.scale)) for term in terms]
    signed = [
        math.copysign(root, term.weight * term.scale)
        for root, term in zip(roots, terms, strict=True)
    ]
    A = _by_element([term.A for term in terms], signed, request)
    return Factors(A, _by_element([term.B for term in terms], roots, request))


def approximated(terms: Sequence[Term], rank: int) -> Factors:
    """Return the best approximation of `Σ f_i · B_i·A_i` of a rank, from the factors."""
    whole = concatenated(terms)
    U, S, V = product_svd(whole.B, whole.A)
    k = kept(S, rank)
    return Factors(V[:, :k].mT, U[:, :k] * S[:k], tail(S, k))


def by_delta(terms: Sequence[Term], request: Combination, rank: int, transposed: bool) -> Factors:
    """Combine the deltas element by element, and approximate the result by a dense decomposition.

    `transposed` combines deltas as `[in, out]`; this decides the random number of each element.
    """
    deltas = [term.B @ term.A * term.scale for term in terms]
    combined = _by_element(
        [delta.mT if transposed else delta for delta in deltas],
        [term.weight for term in terms],
        request,
    )
    combined = combined.mT if transposed else combined
    U, S, Vh = torch.linalg.svd(
        combined.to(torch.promote_types(combined.dtype, torch.float32)),
        full_matrices=request.svd_full_matrices,
        driver=request.svd_driver if combined.is_cuda else None,
    )
    k = kept(S, rank)
    B, A = U[:, :k] * S[:k], Vh[:k]
    if request.svd_clamp is not None:
        bound = torch.quantile(torch.cat([B.flatten(), A.flatten()]), request.svd_clamp)
        B, A = B.clamp(-bound, bound), A.clamp(-bound, bound)
    if request.kind != "svd":
        return Factors(A, B)
    whole = norm(combined.flatten())
    return Factors(A, B, norm((combined - B @ A).flatten()) / whole if whole else 0.0)


def combine(
    configs: Mapping[str, LoraConfig], layers: Mapping[str, LoraLayer], request: Combination
) -> Combined:
    """Return a combination of LoRA adapters."""
    invocations = {name: configs[name].alora_invocation_tokens for name in request.adapters}
    if len(set(map(str, invocations.values()))) > 1:
        raise PeftValueError(
            f"The adapters act on different tokens: `alora_invocation_tokens` are {invocations}; "
            "combine adapters with the same."
        )
    terms = {path: _terms(path, layer, request) for path, layer in layers.items()}
    ranks = {path: {term.A.shape[0] for term in own} for path, own in terms.items()}
    if request.kind in ("linear", *_BY_ELEMENT):
        unequal = sorted(path for path, several in ranks.items() if len(several) > 1)
        configured = {configs[name].r for name in request.adapters}
        if unequal or len(configured) > 1:
            raise PeftValueError(
                "All adapters must have the same r value when using combination_type "
                f"{request.kind}; they have "
                f"{sorted(ranks[unequal[0]] if unequal else configured)}. 'cat' and 'svd' take any."
            )
    rank = request.svd_rank or max(max(several) for several in ranks.values())
    made = {
        path: _made(own, request, rank, layers[path].geometry.transposed)
        for path, own in track(terms.items(), "Combining")
    }
    r = rank
    if not request.kind.endswith("svd"):
        r = max(factors.A.shape[0] for factors in made.values())
    config = configs[request.adapters[0]]
    start = True if config.starts_from_weight else config.init_lora_weights
    plain = replace(config, use_rslora=False, init_lora_weights=start)
    result = Combined(replace(plain, r=r, lora_alpha=r, rank_pattern={}, alpha_pattern={}))
    for path, layer in layers.items():
        missing = r - made[path].A.shape[0]
        A, B = F.pad(made[path].A, (0, 0, 0, missing)), F.pad(made[path].B, (0, missing))
        B = B if layer.unit_scale == 1 else B / layer.unit_scale
        result.tensors |= {
            f"{path}.{end}": tensor for end, tensor in lora_tensors(layer, A, B).items()
        }
        error = made[path].error
        if error is not None:
            result.errors[path] = error
    return result


def _made(terms: Sequence[Term], request: Combination, rank: int, transposed: bool) -> Factors:
    if request.kind == "cat":
        return concatenated(terms)
    if not request.kind.endswith("svd"):
        return by_factor(terms, request)
    if request.kind == "svd" and request.svd_clamp is None:
        return approximated(terms, rank)
    return by_delta(terms, request, rank, transposed)


def _terms(path: str, layer: LoraLayer, request: Combination) -> list[Term]:
    """Return the adapters that a layer has, with their factors; refuse more than two factors."""
    own = [(name, weight) for name, weight in request.terms() if name in layer.scaling]
    unfit = [name for name, _ in own if not layer.is_product(name)]
    if unfit:
        raise PeftValueError(
            f"`{path}`: adapter {unfit[0]} is more than a product of two factors (`use_dora`, "
            "`lora_bias`, or a convolution in groups); such adapters can't be combined."
        )
    return [Term(weight, float(layer.scaling[name]), *layer.factors(name)) for name, weight in own]


def _by_element(tensors: list[Tensor], weights: list[float], request: Combination) -> Tensor:
    """Combine tensors of one shape element by element, as the request says."""
    w = torch.tensor(weights, dtype=tensors[0].dtype, device=tensors[0].device)
    kind = request.kind.removesuffix("_svd")
    if kind in ("svd", "linear"):
        return merge_utils.task_arithmetic(tensors, w)
    density = request.density
    assert density is not None  # which was checked
    if kind == "magnitude_prune":
        return merge_utils.magnitude_prune(tensors, w, density)
    if kind == "dare_linear":
        return merge_utils.dare_linear(tensors, w, density)
    elect = merge_utils.ties if kind == "ties" else merge_utils.dare_ties
    sign: Any = request.majority_sign_method
    return elect(tensors, w, density, sign)
