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

    @property
    def factor(self) -> float:
        """`f = w·s`."""
        return self.weight * self.scale


class CombinedFactors(NamedTuple):
    """A combination's factors in one layer, and their relative error; None if they are not meant
    to be the sum.
    """

    A: Tensor
    B: Tensor
    error: float | None = None


def concatenated(terms: Sequence[Term]) -> CombinedFactors:
    """Return `Σ f_i · B_i·A_i` exactly: the ranks side by side."""
    A = torch.cat([term.A * term.factor for term in terms])
    return CombinedFactors(A, torch.cat([term.B for term in terms], dim=1), 0.0)


def by_factor(terms: Sequence[Term], request: Combination) -> CombinedFactors:
    """Combine the `A` and the `B`, with weights `±√|f_i|` and `√|f_i|`. The rank is that of one
    adapter; the result is not the sum of the deltas, since each `B_i` multiplies all `A_j`.
    """
    roots = [math.sqrt(abs(term.factor)) for term in terms]
    signed = [math.copysign(root, term.factor) for root, term in zip(roots, terms, strict=True)]
    A = _by_element([term.A for term in terms], signed, request)
    return CombinedFactors(A, _by_element([term.B for term in terms], roots, request))


def approximated(terms: Sequence[Term], rank: int) -> CombinedFactors:
    """Return the best approximation of `Σ f_i · B_i·A_i` of a rank, from the factors."""
    whole = concatenated(terms)
    U, S, V = product_svd(whole.B, whole.A)
    k = kept(S, rank)
    return CombinedFactors(V[:, :k].mT, U[:, :k] * S[:k], tail(S, k))


def by_delta(
    terms: Sequence[Term], request: Combination, rank: int, transposed: bool
) -> CombinedFactors:
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
        return CombinedFactors(A, B)
    whole = norm(combined.flatten())
    return CombinedFactors(A, B, norm((combined - B @ A).flatten()) / whole if whole else 0.0)


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
    ranks = {path: {term.A.shape[0] for term in of_layer} for path, of_layer in terms.items()}
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
    combined = {
        path: _combined(of_layer, request, rank, layers[path].geometry.transposed)
        for path, of_layer in track(terms.items(), "Combining")
    }
    r = rank
    if not request.kind.endswith("svd"):
        r = max(factors.A.shape[0] for factors in combined.values())
    config = configs[request.adapters[0]]
    start = True if config.starts_from_weight else config.init_lora_weights
    plain = replace(config, use_rslora=False, init_lora_weights=start)
    result = Combined(replace(plain, r=r, lora_alpha=r, rank_pattern={}, alpha_pattern={}))
    for path, layer in layers.items():
        A, B, error = combined[path]
        missing = r - A.shape[0]
        A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
        B = B if layer.unit_scale == 1 else B / layer.unit_scale
        result.tensors |= {
            f"{path}.{end}": tensor for end, tensor in lora_tensors(layer, A, B).items()
        }
        if error is not None:
            result.errors[path] = error
    return result


def _combined(
    terms: Sequence[Term], request: Combination, rank: int, transposed: bool
) -> CombinedFactors:
    if request.kind == "cat":
        return concatenated(terms)
    if not request.kind.endswith("svd"):
        return by_factor(terms, request)
    if request.kind == "svd" and request.svd_clamp is None:
        return approximated(terms, rank)
    return by_delta(terms, request, rank, transposed)


def _terms(path: str, layer: LoraLayer, request: Combination) -> list[Term]:
    """Return the adapters that a layer has, with their factors; refuse more than two factors."""
    present = [(name, weight) for name, weight in request.terms() if name in layer.scaling]
    unfit = [name for name, _ in present if not layer.is_product(name)]
    if unfit:
        raise PeftValueError(
            f"`{path}`: adapter {unfit[0]} is more than a product of two factors (`use_dora`, "
            "`lora_bias`, or a convolution in groups); such adapters can't be combined."
        )
    return [
        Term(weight, float(layer.scaling[name]), *layer.factors(name)) for name, weight in present
    ]


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
