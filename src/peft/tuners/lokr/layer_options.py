# SPDX-License-Identifier: Apache-2.0
"""Rank, alpha and factor sizes that a `LoKrConfig` gives each layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ...base.geometry import Geometry
from ...core.targets import pattern_value
from .config import LoKrConfig
from .shapes import Shapes, factor_shapes, shape_problems


class LayerOptions(NamedTuple):
    """Options of one LoKr layer.

    Attributes:
        r: Rank.
        alpha: The delta is scaled by `alpha / r`.
        factor: `decompose_factor`, or the size `(a, b)` of `W1`.
        shapes: Shapes of all factors, None if they follow from the other options.
        row_offset: First row of the product that is the layer's, None if all rows are.
    """

    r: int
    alpha: float
    factor: int | Sequence[int]
    shapes: Shapes | None
    row_offset: int | None

    def problems(self, size: Geometry, groups: int = 1) -> Iterator[str]:
        """Yield a sentence for each option that does not fit a layer.

        Args:
            size: The layer's size.
            groups: Its groups, if it is a convolution.
        """
        out_features, in_features = size.out_features, size.in_features
        if self.shapes is not None:
            kernel = size.kernel_size
            problem = shape_problems(
                self.shapes, out_features, in_features, kernel, self.row_offset
            )
            if problem:
                yield f"`tensor_shapes`: {problem}."
        elif not isinstance(self.factor, int):
            a, b = self.factor
            if out_features % a or in_features % b:
                yield (
                    f"`factor_pattern`={[a, b]} does not divide its sizes, {out_features} and "
                    f"{in_features}."
                )
        if self.row_offset is not None and (self.shapes is None or groups > 1):
            yield "`row_offsets` needs `tensor_shapes`, and a layer without groups."


def layer_options(config: LoKrConfig, path: str, size: Geometry | None) -> LayerOptions:
    """Return the options of a layer: from the config's patterns, else from its fields for
    convolutions with a kernel, else from its fields for all layers.

    Args:
        config: The adapter's config.
        path: The layer's path in the model.
        size: The layer's size, None if it is unknown.

    Example:
        >>> config = LoKrConfig(r=8, conv_r=4, rank_pattern={"mid.conv": 2})
        >>> conv = Geometry(64, 64, (3, 3))
        >>> [layer_options(config, path, conv).r for path in ("up.conv", "mid.conv")]
        [4, 2]
    """
    r, alpha, factor = config.r, config.alpha, config.decompose_factor
    if size is not None and math.prod(size.kernel_size) > 1:
        r = config.conv_r or r
        alpha = alpha if config.conv_alpha is None else config.conv_alpha
        factor = factor if config.conv_factor is None else config.conv_factor
    listed: Mapping[str, Sequence[int]] | None = pattern_value(config.tensor_shapes, path, None)
    shapes = None
    if listed is not None:
        shapes = {name: tuple(shape) for name, shape in listed.items()}
    return LayerOptions(
        r=pattern_value(config.rank_pattern, path, r),
        alpha=pattern_value(config.alpha_pattern, path, alpha),
        factor=pattern_value(config.factor_pattern, path, factor),
        shapes=shapes,
        row_offset=pattern_value(config.row_offsets, path, None),
    )


def shapes_by_rule(
    config: LoKrConfig, size: Geometry, r: int, factor: int | Sequence[int] | None = None
) -> Shapes:
    """Return the shapes of a layer's factors by the config's rules, without its `tensor_shapes`.

    Args:
        config: The adapter's config.
        size: The layer's size.
        r: The layer's rank.
        factor: `LayerOptions.factor`, by default the config's `decompose_factor`.
    """
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
