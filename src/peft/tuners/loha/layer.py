# SPDX-License-Identifier: Apache-2.0
"""Layers with LoHa adapters. They hold the factors; the math is in `hadamard.py`."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...base.geometry import Geometry, Placement
from ...base.tensors import check_values
from ...core.adapters import AdapterParameterDict, read_optional
from ...core.base_layer import conv_options, pad_input
from ...core.method_info import AdapterCost, low_rank_cost
from ...ops.exact_merge import Recipe
from ...ops.fused_linear import Chain
from ...ops.low_rank import LowRank, approximate, cut, product_svd
from ..lycoris_utils import LycorisLayer
from .config import LoHaConfig
from .hadamard import (
    HadamardFactors,
    factor_shapes,
    hadamard_conv,
    hadamard_linear,
    hadamard_weight,
    is_low_rank,
    low_rank_pair,
)

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Linear", "LoHaLayer"]


class LoHaLayer(LycorisLayer):
    """A layer with LoHa adapters, `ΔW = (alpha / r) · (w1_a·w1_b) ∘ (w2_a·w2_b)`.

    Attributes:
        hada_w1_a, hada_w2_a: `[out, r]` by adapter name; in Tucker's form `[r, out]`.
        hada_w1_b, hada_w2_b: `[r, in·∏kernel]`; in Tucker's form `[r, in]`.
        hada_t1, hada_t2: `[r, r, *kernel]` in Tucker's form.

    Source: arXiv:2108.06098, section 2.2
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = tuple(
        f"hada_{name}" for name in HadamardFactors._fields
    )

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoHaConfig, **options: Any
    ) -> None:
        super().__init__(base_layer)
        self.update_layer(adapter_name, config, **options)
        self.set_adapter(adapter_name)

    def update_layer(
        self,
        adapter_name: str,
        config: LoHaConfig,
        r: int | None = None,
        alpha: float | None = None,
        placement: Placement | None = None,
        initialize: bool = True,
    ) -> None:
        """Make an adapter's factors. What is not given is the config's or the base layer's."""
        self.set_hyperparameters(
            adapter_name, config, r or config.r, config.alpha if alpha is None else alpha
        )
        size, (device, dtype) = self.geometry, self._placement(placement)
        shapes = factor_shapes(
            size.out_features,
            size.in_features,
            size.kernel_size,
            r=self.r[adapter_name],
            use_effective_conv2d=config.use_effective_conv2d,
        )
        for name, shape in shapes.items():
            container: AdapterParameterDict = getattr(self, f"hada_{name}")
            container[adapter_name] = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if initialize:
            self.reset_adapter_parameters(adapter_name, config.init_weights)

    @torch.no_grad()
    def reset_adapter_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Draw the factors, `kaiming_uniform_(a=√5)`, with `w2_b` zero: no effect at the start."""
        for name, factor in self.factors(adapter_name)._asdict().items():
            if factor is not None and init_weights and name == "w2_b":
                nn.init.zeros_(factor)
            elif factor is not None:
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def factors(self, adapter_name: str) -> HadamardFactors:
        """Return an adapter's factors."""
        containers = [self._modules[name] for name in self.adapter_layer_names]
        return HadamardFactors(*read_optional(adapter_name, containers))  # type: ignore[arg-type]

    def delta_recipe(self, adapter_name: str, **options: object) -> Recipe:
        """Return ΔW as a function of its factors."""
        return Recipe(
            _dense, (self.geometry, self.factors(adapter_name), self.scaling[adapter_name])
        )

    def low_rank_factors(
        self, adapter_name: str, rank: int | float | None = None, **options: object
    ) -> LowRank:
        """Return ΔW as `B·A` without building it, exact of rank `r²` or the weight's own."""
        pair = low_rank_pair(self.factors(adapter_name), self.scaling[adapter_name])
        A, B = (factor.detach() for factor in pair)
        if rank is None and A.shape[0] > min(A.shape[1], B.shape[0]):
            return cut(product_svd(B, A), None, A.dtype)
        return approximate(B.contiguous(), A.contiguous(), rank)

    def adapter_cost(self, adapter_name: str, config: LoHaConfig) -> AdapterCost:
        """Return the cost of factors of rank `r²` or the dense product, whichever is cheaper."""
        factors, r, size = self.factors(adapter_name), self.r[adapter_name], self.geometry
        if is_low_rank(factors):
            return low_rank_cost(size, r * r)._replace(remarks=())
        whole = size.out_features * size.columns
        remark = (
            f"`r`={r}: factors of rank {r * r} are no cheaper than the full product, which is "
            "built in each forward."
        )
        return AdapterCost(whole, min(r * r, size.out_features, size.columns), (remark,))

    def product(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return `ΔW x`, by factors of rank `r²` or the dense product, whichever is cheaper."""
        factors, scale, size = self.factors(adapter_name), self.scaling[adapter_name], self.geometry
        check_values(factors.w1_a, x)
        x = self._cast_input_dtype(x, factors.w1_a.dtype)
        if not size.is_conv:
            return hadamard_linear(x, factors, scale)
        return hadamard_conv(
            pad_input(self.base_layer, x),
            factors,
            kernel=size.kernel_size,
            scale=scale,
            **conv_options(self.base_layer),
        )


class Linear(LoHaLayer):
    """A linear layer (`nn.Linear`, `Conv1D`, quantized) with LoHa adapters."""

    def delta_chain(self, adapter_name: str, x: Tensor) -> Chain | None:
        """Return the product of factors of rank `r²`, where they are the cheaper way."""
        factors = self.factors(adapter_name)
        if (self.training and self.drops(adapter_name)) or not is_low_rank(factors):
            return None
        A, B = low_rank_pair(factors, self.scaling[adapter_name])
        return Chain(self._chain_input(x, factors.w1_a.dtype), A.mT, (B.mT,))


class Conv1d(LoHaLayer):
    """`nn.Conv1d` with LoHa adapters."""


class Conv2d(LoHaLayer):
    """`nn.Conv2d` with LoHa adapters."""


class Conv3d(LoHaLayer):
    """`nn.Conv3d` with LoHa adapters."""


def _dense(geometry: Geometry, factors: HadamardFactors, scale: float | Tensor) -> Tensor:
    """Return ΔW in the base weight's layout."""
    delta = hadamard_weight(factors, scale)
    return geometry.as_stored(delta.view(delta.shape[0], -1, *geometry.kernel_size))
