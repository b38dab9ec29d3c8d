# SPDX-License-Identifier: Apache-2.0
"""Layers with LoKr adapters: they hold the factors; the maths is in `kronecker.py`."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._accumulate import Steps
from .._geometry import Placement, conv_options, pad_input
from .._holder import AdapterParameterDict
from .._lowrank import LowRank
from ..lycoris_utils import LycorisLayer
from .kronecker import (
    KroneckerFactors,
    factor_shapes,
    factorization,
    flat_kronecker_weight,
    kronecker_conv,
    kronecker_linear,
    kronecker_steps,
    kronecker_weight,
)
from .lowrank import kronecker_low_rank

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Linear", "LoKrLayer", "factorization"]


class LoKrLayer(LycorisLayer):
    """A layer with LoKr adapters, `ΔW = (alpha / r) · (W1 ⊗ W2)`.

    Args:
        base_layer: The layer to adapt.
        adapter_name: The first adapter's name.
        config: Its config.
        **options: As for `update_layer`.

    Attributes:
        lokr_w1: `[a, b]`; where decomposed `lokr_w1_a [a, r]`, `lokr_w1_b [r, b]`.
        lokr_w2: `[c, d, *kernel]`; where decomposed `lokr_w2_a [c, r]`, `lokr_w2_b [r, d·∏kernel]`; in Tucker's form
            `lokr_t2 [r, r, *kernel]`, `lokr_w2_a [r, c]`, `lokr_w2_b [r, d]`.

    Source: arXiv:2309.14859, section 3.2
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = tuple(f"lokr_{name}" for name in KroneckerFactors._fields)
    other_param_names: ClassVar[tuple[str, ...]] = (*LycorisLayer.other_param_names, "flat_layout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **options: Any) -> None:
        super().__init__(base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, AdapterParameterDict())
        self.flat_layout: dict[str, bool] = {}
        self.update_layer(adapter_name, config, **options)
        self.set_adapter(adapter_name)

    def update_layer(
        self,
        adapter_name: str,
        config: Any,
        r: int | None = None,
        alpha: float | None = None,
        placement: Placement | None = None,
        initialise: bool = True,
    ) -> None:
        """Make an adapter's factors.

        Args:
            adapter_name: The adapter's name.
            config: Its config.
            r: Rank, by default the config's.
            alpha: Alpha, by default the config's.
            placement: Device and dtype, by default the base layer's.
            initialise: False leaves the memory as it is.
        """
        self.set_hyperparameters(adapter_name, config, r or config.r, config.alpha if alpha is None else alpha)
        size = self.geometry
        shapes = factor_shapes(
            size.out_features,
            size.in_features,
            size.kernel_size,
            r=self.r[adapter_name],
            decompose_both=config.decompose_both,
            decompose_factor=config.decompose_factor,
            use_effective_conv2d=config.use_effective_conv2d,
        )
        self.flat_layout[adapter_name] = len(shapes.get("w2", ())) == 3 and config.kronecker_layout == "flat"
        device, dtype = self._placement(placement)
        for name, shape in shapes.items():
            container: AdapterParameterDict = getattr(self, f"lokr_{name}")
            container[adapter_name] = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if initialise:
            self.reset_adapter_parameters(adapter_name, config.init_weights)

    @torch.no_grad()
    def reset_adapter_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Draw the factors anew: `kaiming_uniform_(a=√5)`, one of them zero so that the adapter starts without effect."""
        zero: tuple[str, ...] = ()
        if init_weights:
            zero = ("w2", "w2_b") if init_weights == "lycoris" else ("w1", "w1_a")
        for name, factor in self.factors(adapter_name)._asdict().items():
            if factor is not None:
                nn.init.zeros_(factor) if name in zero else nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def factors(self, adapter_name: str) -> KroneckerFactors:
        """An adapter's factors."""
        containers = (getattr(self, name) for name in self.adapter_layer_names)
        return KroneckerFactors(*(c(adapter_name) if adapter_name in c else None for c in containers))

    def get_delta_weight(self, adapter_name: str, **options: Any) -> Tensor:
        """ΔW in the base weight's layout: the dense product, which only merging needs."""
        product = flat_kronecker_weight if self.flat_layout[adapter_name] else kronecker_weight
        delta = product(self.factors(adapter_name), self.geometry.kernel_size, self.scaling[adapter_name])
        return self.geometry.as_stored(delta)

    def low_rank_factors(self, adapter_name: str, rank: int | float | None = None, **options: Any) -> LowRank:
        """ΔW as `B·A`, without building ΔW; exact of rank `rank(W1) · rank(W2)`."""
        kernel, flat = self.geometry.kernel_size, self.flat_layout[adapter_name]
        return kronecker_low_rank(self.factors(adapter_name), kernel, float(self.scaling[adapter_name]), rank, flat)

    def delta_activations(self, adapter_name: str, x: Tensor) -> Tensor:
        """`ΔW x`, without building ΔW."""
        factors = self.factors(adapter_name)
        dtype = next(factor.dtype for factor in factors if factor is not None)
        delta = self.apply_product(adapter_name, self._cast_input_dtype(x, dtype), factors)
        return self.drop(adapter_name, delta, -1 - len(self.geometry.kernel_size))

    def apply_product(self, adapter_name: str, x: Tensor, factors: KroneckerFactors) -> Tensor:
        """`ΔW x` for this kind of layer."""
        raise NotImplementedError


class Linear(LoKrLayer):
    """A linear layer (`nn.Linear`, `Conv1D`, quantised) with LoKr adapters."""

    def apply_product(self, adapter_name: str, x: Tensor, factors: KroneckerFactors) -> Tensor:  # noqa: D102
        return kronecker_linear(x, factors, self.scaling[adapter_name])

    def delta_steps(self, adapter_name: str, x: Tensor) -> Steps | None:  # noqa: D102
        if self.drops(adapter_name):
            return None
        factors = self.factors(adapter_name)
        dtype = next(factor.dtype for factor in factors if factor is not None)
        return kronecker_steps(self._cast_input_dtype(x, dtype), factors, self.scaling[adapter_name])


class _Conv(LoKrLayer):
    """A convolution with LoKr adapters."""

    def apply_product(self, adapter_name: str, x: Tensor, factors: KroneckerFactors) -> Tensor:
        return kronecker_conv(
            pad_input(self.base_layer, x),
            factors,
            kernel=self.geometry.kernel_size,
            scale=self.scaling[adapter_name],
            flat=self.flat_layout[adapter_name],
            **conv_options(self.base_layer),
        )


class Conv1d(_Conv):
    """`nn.Conv1d` with LoKr adapters."""


class Conv2d(_Conv):
    """`nn.Conv2d` with LoKr adapters."""


class Conv3d(_Conv):
    """`nn.Conv3d` with LoKr adapters."""
