# SPDX-License-Identifier: Apache-2.0
"""Layers with LoKr adapters: they hold the factors; the maths is in `kronecker.py` and `norms.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...base.geometry import Geometry, Placement
from ...core.adapters import AdapterParameterDict
from ...core.base_layer import conv_options, pad_input
from ...core.cost import AdapterCost
from ...ops.exact_merge import Recipe
from ...ops.fused_linear import Chain
from ...ops.low_rank import LowRank, approximate, cut, dense_svd, wide
from ..lycoris_utils import LycorisLayer
from .cost import cost
from .kronecker import (
    KroneckerFactors,
    flat_kronecker_weight,
    kronecker_chain,
    kronecker_conv,
    kronecker_linear,
    kronecker_weight,
)
from .lowrank import kronecker_low_rank
from .norms import column_norms, product_norm, row_norms
from .shapes import Shapes, factor_shapes, factorization

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Linear", "LoKrLayer", "factorization"]

_FACTORS = tuple(f"lokr_{name}" for name in KroneckerFactors._fields)


class LoKrLayer(LycorisLayer):
    """A layer with LoKr adapters, `ΔW = (alpha / r) · (W1 ⊗ W2)`, or decomposed,
    `W' = m ⊙ (W + ΔW) / ‖W + ΔW‖`.

    Args:
        base_layer: The layer to adapt.
        adapter_name: The first adapter's name.
        config: Its config.
        **options: As for `update_layer`.

    Attributes:
        lokr_w1: `[a, b]`; where decomposed `lokr_w1_a [a, r]`, `lokr_w1_b [r, b]`.
        lokr_w2: `[c, d, *kernel]`; where decomposed `lokr_w2_a [c, r]`, `lokr_w2_b [r, d·∏kernel]`;
            in Tucker's form `lokr_t2 [r, r, *kernel]`, `lokr_w2_a [r, c]`, `lokr_w2_b [r, d]`.
        lokr_scalar: `[1]`, a factor on the delta, of adapters with `use_scalar`.
        lokr_magnitude: `m`, `[out]` or `[in]`, of adapters with `weight_decompose`.
        flat_layout, full_matrix, use_rslora, wd_on_output: As in the configs, by adapter name.
        row_offset: By adapter name, None, or the first row of the product that is the layer's (of a
            product for fused layers).

    Source: arXiv:2309.14859, section 3.2; arXiv:2402.09353, section 4
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = _FACTORS
    container_names: ClassVar[tuple[str, ...]] = (*_FACTORS, "lokr_scalar", "lokr_magnitude")
    value_names: ClassVar[tuple[str, ...]] = (
        *LycorisLayer.value_names,
        "flat_layout",
        "full_matrix",
        "use_rslora",
        "wd_on_output",
        "row_offset",
    )

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, **options: Any
    ) -> None:
        super().__init__(base_layer)
        for name in self.container_names:
            setattr(self, name, AdapterParameterDict())
        self.flat_layout: dict[str, bool] = {}
        self.full_matrix: dict[str, bool] = {}
        self.use_rslora: dict[str, bool] = {}
        self.wd_on_output: dict[str, bool] = {}
        self.row_offset: dict[str, int | None] = {}
        self.update_layer(adapter_name, config, **options)
        self.set_adapter(adapter_name)

    def update_layer(
        self,
        adapter_name: str,
        config: Any,
        r: int | None = None,
        alpha: float | None = None,
        placement: Placement | None = None,
        initialize: bool = True,
        factor: int | Sequence[int] | None = None,
        shapes: Shapes | None = None,
        row_offset: int | None = None,
    ) -> None:
        """Make an adapter's factors.

        Args:
            adapter_name: The adapter's name.
            config: Its config.
            r: Rank, by default the config's.
            alpha: Alpha, by default the config's.
            placement: Device and dtype, by default the base layer's.
            initialize: False leaves the memory as it is.
            factor: `decompose_factor`, by default the config's.
            shapes: Shapes of the factors by name, by default as the config's rules have them.
            row_offset: Which rows of the product are the layer's; by default it has no others.
        """
        self.full_matrix[adapter_name], self.use_rslora[adapter_name] = (
            config.full_matrix,
            config.use_rslora,
        )
        self.wd_on_output[adapter_name], self.row_offset[adapter_name] = (
            config.wd_on_output,
            row_offset,
        )
        self.set_hyperparameters(
            adapter_name, config, r or config.r, config.alpha if alpha is None else alpha
        )
        shapes = shapes or self.shapes_of(config, self.r[adapter_name], factor)
        self.flat_layout[adapter_name] = (
            len(shapes.get("w2", ())) == 3 and config.kronecker_layout == "flat"
        )
        place = self._placement(placement)
        for name, shape in shapes.items():
            self._hold(
                f"lokr_{name}",
                adapter_name,
                torch.empty(shape, device=place.device, dtype=place.dtype),
            )
        if config.use_scalar:
            self._hold(
                "lokr_scalar", adapter_name, torch.empty(1, device=place.device, dtype=place.dtype)
            )
        if initialize:
            self.reset_adapter_parameters(adapter_name, config.init_weights)
        if config.weight_decompose:
            known = initialize and place.device.type != "meta"
            size = self.out_features if config.wd_on_output else self.in_features
            lengths = self.lengths(adapter_name, self.scale(adapter_name)) if known else None
            self._hold("lokr_magnitude", adapter_name, self.first_lengths(lengths, size, place))

    def shapes_of(self, config: Any, r: int, factor: int | Sequence[int] | None = None) -> Shapes:
        """The factors that a config's rules give this layer."""
        size = self.geometry
        return factor_shapes(
            size.out_features,
            size.in_features,
            size.kernel_size,
            r=r,
            decompose_both=config.decompose_both,
            decompose_factor=config.decompose_factor if factor is None else factor,
            use_effective_conv2d=config.use_effective_conv2d,
            full_matrix=config.full_matrix,
            unbalanced_factorization=config.unbalanced_factorization,
        )

    def _hold(self, attribute: str, adapter_name: str, tensor: Tensor) -> None:
        container: AdapterParameterDict = getattr(self, attribute)
        container[adapter_name] = nn.Parameter(tensor)

    @torch.no_grad()
    def reset_adapter_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Draw the factors anew: `kaiming_uniform_(a=√5)`, one of them zero so that the adapter
        starts without effect; with a scalar it is that which is zero.
        """
        scalar = adapter_name in self.lokr_scalar
        zero: tuple[str, ...] = ()
        if init_weights and not scalar:
            zero = ("w2", "w2_b") if init_weights == "lycoris" else ("w1", "w1_a")
        for name, factor in self.factors(adapter_name)._asdict().items():
            if factor is not None:
                nn.init.zeros_(factor) if name in zero else nn.init.kaiming_uniform_(
                    factor, a=math.sqrt(5)
                )
        if scalar:
            nn.init.constant_(self.lokr_scalar[adapter_name], 0.0 if init_weights else 1.0)

    def base_scaling(self, adapter_name: str) -> float:
        """`alpha / r`, with `use_rslora` over the root of `r`; 1 with `full_matrix`, which has no
        rank.
        """
        if self.full_matrix[adapter_name]:
            return 1.0
        r = self.r[adapter_name]
        return self.alpha[adapter_name] / (math.sqrt(r) if self.use_rslora[adapter_name] else r)

    def scale(self, adapter_name: str) -> Any:
        """The factor on the product: `scaling`, times the trained scalar."""
        scaling = self.scaling[adapter_name]
        scalar = self._modules["lokr_scalar"].get(adapter_name)  # type: ignore[union-attr, operator]
        return scaling if scalar is None else scaling * scalar.view(())

    def factors(self, adapter_name: str) -> KroneckerFactors:
        """An adapter's factors."""
        modules: Any = self._modules
        return KroneckerFactors(*[modules[holder].get(adapter_name) for holder in _FACTORS])

    def get_delta_weight(self, adapter_name: str, **options: Any) -> Tensor:
        """ΔW in the base weight's layout: the dense product, which only merging needs; what a
        decomposed adapter adds before rows or columns get their lengths.
        """
        return self.delta_recipe(adapter_name).weight()

    def delta_recipe(self, adapter_name: str, **options: Any) -> Recipe:
        """The factors of the product."""
        product = flat_kronecker_weight if self.flat_layout[adapter_name] else kronecker_weight
        rows = self.row_offset[adapter_name], self.out_features
        return Recipe(
            _dense,
            (product, self.geometry, self.factors(adapter_name), self.scale(adapter_name), *rows),
        )

    def _own_rows(self, adapter_name: str, product: Tensor, dim: int) -> Tensor:
        """The part of a product for fused layers that is this layer's."""
        offset = self.row_offset[adapter_name]
        return product if offset is None else product.narrow(dim, offset, self.out_features)

    def low_rank_factors(
        self, adapter_name: str, rank: int | float | None = None, **options: Any
    ) -> LowRank:
        """ΔW as `B·A`, without building ΔW; exact of rank `rank(W1) · rank(W2)`. What a decomposed
        adapter does to the weight, `f ⊙ (W + ΔW) - W`, has no such structure and is decomposed
        whole.
        """
        kernel, flat, scale = (
            self.geometry.kernel_size,
            self.flat_layout[adapter_name],
            self.scale(adapter_name),
        )
        if adapter_name in self.lokr_magnitude:
            weight, delta = wide(self.base_weight()), wide(self.get_delta_weight(adapter_name))
            factor = self.merge_factor(adapter_name, self.scaling[adapter_name])
            assert factor is not None
            change = self.geometry.as_stored(wide(factor) * (weight + delta) - weight)
            return cut(dense_svd(change.flatten(1)), rank, self._dtype(adapter_name))
        part = self.row_offset[adapter_name] is not None
        exact = kronecker_low_rank(
            self.factors(adapter_name), kernel, float(scale), None if part else rank, flat
        )
        return (
            approximate(self._own_rows(adapter_name, exact.B, 0), exact.A, rank) if part else exact
        )

    def adapter_cost(self, adapter_name: str, config: Any) -> AdapterCost:
        """That of the cheapest order of the factors, with remarks on what the config makes of this
        layer's sizes.
        """
        shapes = {
            n: tuple(f.shape)
            for n, f in self.factors(adapter_name)._asdict().items()
            if f is not None
        }
        base: Any = self.get_base_layer()
        given = (
            config.full_matrix
            or self.row_offset[adapter_name] is not None
            or bool(config.tensor_shapes)
        )
        rule = None if given else partial(self.shapes_of, config, self.r[adapter_name])
        strides = math.prod(base.stride) if self.geometry.is_conv else 1
        return cost(
            shapes, self.geometry, self.r[adapter_name], rule, getattr(base, "groups", 1), strides
        )

    def _dtype(self, adapter_name: str) -> torch.dtype:
        return next(factor.dtype for factor in self.factors(adapter_name) if factor is not None)

    def delta_activations(self, adapter_name: str, x: Tensor) -> Tensor:
        """`ΔW x`, without building ΔW."""
        factors = self.factors(adapter_name)
        dtype = next(factor.dtype for factor in factors if factor is not None)
        dim = -1 - len(self.geometry.kernel_size)
        product = self.apply_product(adapter_name, self._cast_input_dtype(x, dtype), factors)
        delta = self._own_rows(adapter_name, product, dim)
        if self.training and adapter_name in self.lokr_magnitude:
            return self.drop_rows(adapter_name, delta, dim)
        return self.drop(adapter_name, delta, dim)

    def apply_product(self, adapter_name: str, x: Tensor, factors: KroneckerFactors) -> Tensor:
        """`(W1 ⊗ W2) x` with its scale, for this kind of layer."""
        raise NotImplementedError

    def apply_adapter(self, adapter_name: str, x: Tensor, result: Tensor) -> Tensor:
        """`result` with the adapter's part: a sum or, if it is decomposed,
        `f ⊙ (result - b + ΔW x) + b` with `f = m / ‖W + ΔW‖` for lengths of rows; for those of
        columns `(W + ΔW)(f ⊙ x) + b`, which takes the base layer once more.

        Source: arXiv:2402.09353, eq. 5 and 11 (the length has no gradient)
        """
        if adapter_name not in self.lokr_magnitude:
            return super().apply_adapter(adapter_name, x, result)
        factor = self.magnitude_factor(adapter_name, self.scale(adapter_name))
        if self.wd_on_output[adapter_name]:
            changed = self.rescaled(super().apply_adapter(adapter_name, x, result), factor)
        else:
            factor = self.by_channel(factor.repeat(getattr(self.get_base_layer(), "groups", 1)))
            more = self.without_bias((x * (factor - 1)).to(x.dtype))
            changed = super().apply_adapter(adapter_name, x * factor, result + more)
        if not self.training or not self.module_dropout[adapter_name]:
            return changed
        return result + self.drop_module(adapter_name, changed - result)

    def lengths(self, adapter_name: str, scale: Any) -> Tensor:
        """The lengths of the rows of `W + ΔW`, or of its columns."""
        weight = self.geometry.as_stored(self.base_weight())
        norms = row_norms if self.wd_on_output[adapter_name] else column_norms
        more = self.flat_layout[adapter_name], self.row_offset[adapter_name] or 0
        return norms(weight, self.factors(adapter_name), self.geometry.kernel_size, scale, *more)

    def magnitude_factor(self, adapter_name: str, scale: Any) -> Tensor:
        """What the rows, or the columns, of `W + ΔW` are multiplied by."""
        return self.lokr_magnitude(adapter_name) / self.lengths(adapter_name, scale)

    def is_decomposed(self, adapter_name: str) -> bool:
        """Whether an adapter has lengths."""
        return adapter_name in self.lokr_magnitude

    def is_by_columns(self, adapter_name: str) -> bool:
        """Whether they are of columns."""
        return self.is_decomposed(adapter_name) and not self.wd_on_output[adapter_name]

    @property
    def needs_layer_alone(self) -> bool:
        """Whether there is a decomposed adapter, whose factor would be on what another method adds
        too.
        """
        return len(self.lokr_magnitude) > 0

    def merge_factor(self, adapter_name: str, scale: float) -> Tensor | None:
        """The factor on each row or column, of a decomposed adapter."""
        if adapter_name not in self.lokr_magnitude:
            return None
        if adapter_name in self.lokr_scalar:
            scale = scale * self.lokr_scalar(adapter_name).view(())  # type: ignore[assignment]
        factor = self.magnitude_factor(adapter_name, scale).detach()
        shape = [1] * (2 + len(self.geometry.kernel_size))
        shape[0 if self.wd_on_output[adapter_name] else 1] = -1
        return self.geometry.as_stored(factor.view(shape))

    @torch.no_grad()
    def clip_norm(self, adapter_name: str, largest: float) -> tuple[float, bool]:
        """Scale the factors, all alike, so that `‖ΔW‖` is at most `largest` in the Frobenius norm.

        Returns:
            The norm then, and whether it was larger.
        """
        norm = float(
            product_norm(self.factors(adapter_name), self.geometry.kernel_size)
            * abs(self.scale(adapter_name))
        )
        if norm <= largest:
            return norm, False
        own = [factor for factor in self.factors(adapter_name) if factor is not None]
        for factor in own:
            factor.mul_((largest / norm) ** (1 / len(own)))
        return largest, True


class Linear(LoKrLayer):
    """A linear layer (`nn.Linear`, `Conv1D`, quantised) with LoKr adapters."""

    def apply_product(self, adapter_name: str, x: Tensor, factors: KroneckerFactors) -> Tensor:  # noqa: D102
        return kronecker_linear(x, factors, self.scale(adapter_name))

    def delta_chain(self, adapter_name: str, x: Tensor) -> Chain | None:  # noqa: D102
        if (
            self.drops(adapter_name)
            or self.row_offset[adapter_name] is not None
            or adapter_name in self.lokr_magnitude
        ):
            return None
        factors = self.factors(adapter_name)
        dtype = (factors.w2_b if factors.w2 is None else factors.w2).dtype  # type: ignore[union-attr]
        return kronecker_chain(self._input_of_chain(x, dtype), factors, self.scale(adapter_name))


class _Conv(LoKrLayer):
    """A convolution with LoKr adapters."""

    def apply_product(self, adapter_name: str, x: Tensor, factors: KroneckerFactors) -> Tensor:
        return kronecker_conv(
            pad_input(self.base_layer, x),
            factors,
            kernel=self.geometry.kernel_size,
            scale=self.scale(adapter_name),
            flat=self.flat_layout[adapter_name],
            **conv_options(self.base_layer),
        )


class Conv1d(_Conv):
    """`nn.Conv1d` with LoKr adapters."""


class Conv2d(_Conv):
    """`nn.Conv2d` with LoKr adapters."""


class Conv3d(_Conv):
    """`nn.Conv3d` with LoKr adapters."""


def _dense(
    product: Any,
    geometry: Geometry,
    factors: KroneckerFactors,
    scale: Any,
    first: int | None,
    rows: int,
) -> Tensor:
    """ΔW in the base weight's layout; of a product for fused layers the rows from `first` on."""
    delta = product(factors, geometry.kernel_size, scale)
    return geometry.as_stored(delta if first is None else delta.narrow(0, first, rows))
