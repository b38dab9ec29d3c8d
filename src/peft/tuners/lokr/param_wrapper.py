# SPDX-License-Identifier: Apache-2.0
"""`ParamWrapper`: LoKr on a parameter that is a matrix or a stack of experts' matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.parameter_layer import stored
from ...ops.exact_merge import Recipe
from ...ops.grouped import GroupedRows
from ..lycoris_utils import LycorisParameters
from .kronecker import KroneckerFactors, Maps, left_maps, right_maps
from .layer import LoKrLayer


class ParamWrapper(LycorisParameters, LoKrLayer):  # type: ignore[misc]
    """A layer around a module with LoKr on one of its parameters. The factors of a stack are
    `lokr_w1 [experts, a, b]`, `lokr_w2 [experts, c, d]`, and so on.

    Source: arXiv:2309.14859, section 3.2
    """

    def scale(self, adapter_name: str, scaling: float | Tensor | None = None) -> float | Tensor:
        """Return `scaling`, by default the adapter's, times the trained scalar of each expert,
        `[experts, 1, 1]`.
        """
        scaling = self.scaling[adapter_name] if scaling is None else scaling
        scalars = self.lokr_scalar
        if adapter_name not in scalars:
            return scaling
        return scaling * scalars(adapter_name).unsqueeze(-1)

    def delta_recipe(self, adapter_name: str, **options: object) -> Recipe:
        """Return ΔW as a function of its factors."""
        factors, scale = self.factors(adapter_name), self.scale(adapter_name)
        return Recipe(_dense, (factors, scale, self.geometry.transposed))

    def expert_product(self, adapter_name: str, x: Tensor, rows: GroupedRows) -> Tensor:
        """Return `(W1[e] ⊗ W2[e]) x` for rows that are sorted by expert, without building it: with
        a row read as `[b, d]`, `W1·x·W2ᵀ`.
        """
        W1, W2 = (side.to(x.dtype) for side in _sides(self.factors(adapter_name)))
        scale = self.scale(adapter_name)
        W1 = W1 * (scale if not isinstance(scale, Tensor) else scale.to(x.dtype))
        (a, b), (c, d), n = W1.shape[1:], W2.shape[1:], x.shape[0]
        half = rows.product(x.reshape(n * b, d), W2.mT, b)
        half = half.view(n, b, c).transpose(1, 2).reshape(n * c, b)
        return rows.product(half, W1.mT, c).view(n, c, a).transpose(1, 2).reshape(n, a * c)


def _sides(f: KroneckerFactors) -> tuple[Tensor, Tensor]:
    """Return `W1 […, a, b]` and `W2 […, c, d]`."""
    return _multiply(left_maps(f)), _multiply(right_maps(f, ()))


def _multiply(maps: Maps) -> Tensor:
    """Multiply maps `[…, to, from]` into one."""
    first = maps[0]
    for then in maps[1:]:
        first = then @ first
    return first


def _dense(factors: KroneckerFactors, scale: float | Tensor, transposed: bool) -> Tensor:
    """Return ΔW in the parameter's layout."""
    W1, W2 = _sides(factors)
    delta = torch.einsum("...ab,...cd->...acbd", W1 * scale, W2)
    return stored(delta.flatten(-2).flatten(-3, -2), transposed)
