# SPDX-License-Identifier: Apache-2.0
"""Layers with LoKr adapters. They hold the factors; the math is in `kronecker.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...base.geometry import Geometry, Placement
from ...base.tensors import check_values
from ...core import dora
from ...core.adapters import AdapterParameterDict, read_optional
from ...core.base_layer import conv_options, pad_input
from ...core.method_info import AdapterCost
from ...core.weights import base_weight
from ...integrations.distributed import write_value
from ...ops.exact_merge import Recipe
from ...ops.fused_linear import Chain
from ...ops.low_rank import LowRank, approximate, cut, dense_svd
from ..lycoris_utils import LycorisLayer
from .config import LoKrConfig, shapes_by_rule
from .cost import cost
from .kronecker import (
    KroneckerFactors,
    kronecker_chain,
    kronecker_conv,
    kronecker_linear,
    kronecker_weight,
)
from .lowrank import kronecker_low_rank
from .norms import product_norm, weight_norms
from .shapes import Shapes, factorization

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Linear", "LoKrLayer", "factorization"]

_FACTORS = tuple(f"lokr_{name}" for name in KroneckerFactors._fields)


class LoKrLayer(LycorisLayer):
    """A layer with LoKr adapters, `ΔW = (alpha / r) · (W1 ⊗ W2)`, or decomposed,
    `W' = m ⊙ (W + ΔW) / ‖W + ΔW‖`.

    Attributes:
        lokr_w1: `[a, b]`; if low rank `lokr_w1_a [a, r]`, `lokr_w1_b [r, b]`.
        lokr_w2: `[c, d, *kernel]`; if low rank `lokr_w2_a [c, r]`, `lokr_w2_b [r, d·∏kernel]`;
            in Tucker's form `lokr_t2 [r, r, *kernel]`, `lokr_w2_a [r, c]`, `lokr_w2_b [r, d]`.
        lokr_scalar: `[1]`, a factor on the delta, of adapters with `use_scalar`.
        lokr_magnitude: `m`, `[out]` or `[in]`, of adapters with `weight_decompose`.
        flat_layout, full_matrix, use_rslora, wd_on_output: As in the configs, by adapter name.
        row_offset: By adapter name, the layer's first row in a product for fused layers; None for a
            product of this layer alone.

    Source: arXiv:2309.14859, section 3.2; arXiv:2402.09353, section 4
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = _FACTORS
    container_names: ClassVar[tuple[str, ...]] = (*_FACTORS, "lokr_scalar", "lokr_magnitude")
    value_names: ClassVar[tuple[str, ...]] = (
        *LycorisLayer.value_names, "flat_layout", "full_matrix", "use_rslora", "wd_on_output",
        "row_offset",
    )  # fmt: skip

    lokr_scalar: AdapterParameterDict
    lokr_magnitude: AdapterParameterDict
    flat_layout: dict[str, bool]
    full_matrix: dict[str, bool]
    use_rslora: dict[str, bool]
    wd_on_output: dict[str, bool]
    row_offset: dict[str, int | None]

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoKrConfig, **options: Any
    ) -> None:
        super().__init__(base_layer)
        self.update_layer(adapter_name, config, **options)
        self.set_adapter(adapter_name)

    def update_layer(
        self,
        adapter_name: str,
        config: LoKrConfig,
        r: int | None = None,
        alpha: float | None = None,
        placement: Placement | None = None,
        initialize: bool = True,
        factor: int | Sequence[int] | None = None,
        shapes: Shapes | None = None,
        row_offset: int | None = None,
    ) -> None:
        """Make an adapter's factors. What is not given is the config's or follows from it; `shapes`
        are by name, `row_offset` is the layer's first row in a product for fused layers.
        """
        self.full_matrix[adapter_name] = config.full_matrix
        self.use_rslora[adapter_name] = config.use_rslora
        self.wd_on_output[adapter_name] = config.wd_on_output
        self.row_offset[adapter_name] = row_offset
        self.set_hyperparameters(
            adapter_name, config, r or config.r, config.alpha if alpha is None else alpha
        )
        r = self.r[adapter_name]
        shapes = shapes or shapes_by_rule(config, self.geometry, r, factor)
        self.flat_layout[adapter_name] = (
            len(shapes.get("w2", ())) == 3 and config.kronecker_layout == "flat"
        )
        place = self._placement(placement)
        scalar = {"scalar": (1,)} if config.use_scalar else {}
        for name, shape in {**shapes, **scalar}.items():
            values = torch.empty(shape, device=place.device, dtype=place.dtype)
            self._hold(f"lokr_{name}", adapter_name, values)
        if initialize:
            self.reset_adapter_parameters(adapter_name, config.init_weights)
        if config.weight_decompose:
            size = self.out_features if config.wd_on_output else self.in_features
            norms = partial(self.norms, adapter_name, self.scaling[adapter_name])
            first = dora.first_magnitude(norms if initialize else None, size, place)
            self._hold("lokr_magnitude", adapter_name, first)

    def _hold(self, attribute: str, adapter_name: str, tensor: Tensor) -> None:
        container: AdapterParameterDict = getattr(self, attribute)
        container[adapter_name] = nn.Parameter(tensor)

    @torch.no_grad()
    def reset_adapter_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Draw the factors, `kaiming_uniform_(a=√5)`; one, or the scalar, is zero, if wanted."""
        scalar = adapter_name in self.lokr_scalar
        zero: tuple[str, ...] = ()
        if init_weights and not scalar:
            zero = ("w2", "w2_b") if init_weights == "lycoris" else ("w1", "w1_a")
        for name, factor in self.factors(adapter_name)._asdict().items():
            if factor is not None and name in zero:
                nn.init.zeros_(factor)
            elif factor is not None:
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        if scalar:
            nn.init.constant_(self.lokr_scalar[adapter_name], 0.0 if init_weights else 1.0)

    def base_scaling(self, adapter_name: str) -> float:
        """Return `alpha / r`, `alpha / √r` with `use_rslora`, 1 with `full_matrix` (no rank)."""
        if self.full_matrix[adapter_name]:
            return 1.0
        r = self.r[adapter_name]
        return self.alpha[adapter_name] / (math.sqrt(r) if self.use_rslora[adapter_name] else r)

    def scale(self, adapter_name: str, scaling: float | Tensor | None = None) -> float | Tensor:
        """Return `scaling`, by default the adapter's, times the trained scalar."""
        scaling = self.scaling[adapter_name] if scaling is None else scaling
        scalars = self._modules["lokr_scalar"]
        return scaling * scalars(adapter_name).view(()) if adapter_name in scalars else scaling

    def factors(self, adapter_name: str) -> KroneckerFactors:
        """Return an adapter's factors."""
        modules = self._modules
        return KroneckerFactors(*read_optional(adapter_name, [modules[name] for name in _FACTORS]))

    def product(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return `ΔW x`, without building ΔW."""
        factors, scale = self.factors(adapter_name), self.scale(adapter_name)
        check_values(next(factor for factor in factors if factor is not None), x)
        x, size = self._cast_input_dtype(x, factors.dtype), self.geometry
        if not size.is_conv:
            return self._own_rows(adapter_name, kronecker_linear(x, factors, scale), -1)
        y = kronecker_conv(
            pad_input(self.base_layer, x),
            factors,
            kernel=size.kernel_size,
            scale=scale,
            flat=self.flat_layout[adapter_name],
            **conv_options(self.base_layer),
        )
        return self._own_rows(adapter_name, y, -1 - len(size.kernel_size))

    def _own_rows(self, adapter_name: str, product: Tensor, dim: int) -> Tensor:
        """Return this layer's rows of a product for fused layers."""
        offset = self.row_offset[adapter_name]
        return product if offset is None else product.narrow(dim, offset, self.out_features)

    def apply_adapter(self, adapter_name: str, x: Tensor, result: Tensor) -> Tensor:
        """Return `result + Δ(x)` or, for a decomposed adapter with norms of rows,
        `f ⊙ (result - b + ΔW x) + b`; with norms of columns `(W + ΔW)(f ⊙ x) + b`, which calls the
        base layer once more.

        Source: arXiv:2402.09353, eq. 5 and 11 (the norm has no gradient)
        """
        decomposition = self.decomposition(adapter_name)
        if decomposition is None:
            return super().apply_adapter(adapter_name, x, result)
        factor = decomposition.factor(self.scaling[adapter_name])
        if decomposition.by_columns:
            factor = dora.by_channel(self, factor.repeat(self.geometry.groups))
            more = dora.output_without_bias(self, (x * (factor - 1)).to(x.dtype))
            changed = result + more + self._delta_of_rows(adapter_name, x * factor)
        else:
            changed = dora.rescaled(self, result + self._delta_of_rows(adapter_name, x), factor)
        if not self.training or not self.module_dropout[adapter_name]:
            return changed
        return result + self.drop_module(adapter_name, changed - result)

    def _delta_of_rows(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return `ΔW x`, with rank dropout in training; module dropout is left to the caller."""
        delta = self.product(adapter_name, x)
        return self.drop_rows(adapter_name, delta) if self.training else delta

    def decomposition(self, adapter_name: str) -> dora.Decomposition | None:
        """Return the norms of a decomposed adapter."""
        magnitudes = self._modules["lokr_magnitude"]
        if adapter_name not in magnitudes:
            return None
        return dora.Decomposition(
            partial(magnitudes, adapter_name),
            lambda scaling: self.norms(adapter_name, scaling),
            by_columns=not self.wd_on_output[adapter_name],
        )

    def norms(self, adapter_name: str, scaling: float | Tensor) -> Tensor:
        """Return the norms of the rows of `W + ΔW`, or of its columns."""
        return weight_norms(
            self.geometry.as_stored(base_weight(self)),
            self.factors(adapter_name),
            self.geometry.kernel_size,
            self.scale(adapter_name, scaling),
            self.flat_layout[adapter_name],
            self.row_offset[adapter_name] or 0,
            by_columns=not self.wd_on_output[adapter_name],
        )

    def delta_recipe(self, adapter_name: str, **options: object) -> Recipe:
        """Return ΔW, before the norms of DoRA apply, as a function of its factors."""
        factors, scale = self.factors(adapter_name), self.scale(adapter_name)
        flat, rows = self.flat_layout[adapter_name], self.out_features
        first = self.row_offset[adapter_name]
        return Recipe(_dense, (factors, self.geometry, scale, flat, first, rows))

    @torch.no_grad()
    def low_rank_factors(
        self, adapter_name: str, rank: int | float | None = None, **options: object
    ) -> LowRank:
        """Return ΔW as `B·A` without building ΔW, exact at rank `rank(W1) · rank(W2)`. The change
        of a decomposed adapter, `f ⊙ (W + ΔW) - W`, is approximated by a dense SVD.
        """
        factors = self.factors(adapter_name)
        if adapter_name in self.lokr_magnitude:
            factor = self.merge_factor(adapter_name, self.scaling[adapter_name])
            assert factor is not None
            change = dora.change(base_weight(self), factor, self.get_delta_weight(adapter_name))
            dense = self.geometry.as_stored(change).flatten(1)
            return cut(dense_svd(dense), rank, factors.dtype)
        is_part = self.row_offset[adapter_name] is not None
        exact = kronecker_low_rank(
            factors,
            self.geometry.kernel_size,
            float(self.scale(adapter_name)),
            None if is_part else rank,
            self.flat_layout[adapter_name],
        )
        if not is_part:
            return exact
        return approximate(self._own_rows(adapter_name, exact.B, 0), exact.A, rank)

    def adapter_cost(self, adapter_name: str, config: LoKrConfig) -> AdapterCost:
        """Return the cost of the cheapest order of the factors, with remarks on the config."""
        factors = self.factors(adapter_name)._asdict()
        shapes = {name: tuple(f.shape) for name, f in factors.items() if f is not None}
        r = self.r[adapter_name]
        is_part = self.row_offset[adapter_name] is not None
        is_fixed = config.full_matrix or is_part or bool(config.tensor_shapes)
        rule = None if is_fixed else partial(shapes_by_rule, config, self.geometry, r)
        strides = math.prod(conv_options(self)["stride"]) if self.geometry.is_conv else 1
        return cost(shapes, self.geometry, r, rule, strides)

    @torch.no_grad()
    def clip_norm(self, adapter_name: str, largest: float) -> tuple[float, bool]:
        """Scale factors to `‖ΔW‖ <= largest`; return the new norm, and whether it was larger."""
        norm = float(
            product_norm(self.factors(adapter_name), self.geometry.kernel_size)
            * abs(float(self.scale(adapter_name)))
        )
        if norm <= largest:
            return norm, False
        parameters = [self._modules[name]._parameters.get(adapter_name) for name in _FACTORS]
        factors = [factor for factor in parameters if factor is not None]
        for factor in factors:
            write_value(factor, factor * (largest / norm) ** (1 / len(factors)))
        return largest, True


class Linear(LoKrLayer):
    """A linear layer (`nn.Linear`, `Conv1D`, quantized) with LoKr adapters."""

    def delta_chain(self, adapter_name: str, x: Tensor) -> Chain | None:
        """Return `(W1 ⊗ W2) x` as a chain; None with dropout, norms, or rows of other layers."""
        if (
            (self.training and self.drops(adapter_name))
            or self.row_offset[adapter_name] is not None
            or adapter_name in self._modules["lokr_magnitude"]
        ):
            return None
        factors = self.factors(adapter_name)
        dtype = factors.dtype
        x = x if x.dtype == dtype else self._chain_input(x, dtype)
        return kronecker_chain(x, factors, self.scale(adapter_name))


class Conv1d(LoKrLayer):
    """`nn.Conv1d` with LoKr adapters."""


class Conv2d(LoKrLayer):
    """`nn.Conv2d` with LoKr adapters."""


class Conv3d(LoKrLayer):
    """`nn.Conv3d` with LoKr adapters."""


def _dense(
    factors: KroneckerFactors,
    geometry: Geometry,
    scale: float | Tensor,
    flat: bool,
    first: int | None,
    rows: int,
) -> Tensor:
    """Return ΔW in the base weight's layout; of a product for fused layers, `rows` from `first`."""
    delta = kronecker_weight(factors, geometry.kernel_size, scale, flat)
    return geometry.as_stored(delta if first is None else delta.narrow(0, first, rows))
