# SPDX-License-Identifier: Apache-2.0
"""The `LoKrConfig` of which given factors are the tensors: no LoKr file says all of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from ....core.targets import exactly, patterns
from ..config import LoKrConfig
from ..shapes import factor_shapes, sides
from .placement import Placed, Placement

T = TypeVar("T")


class _Rules(NamedTuple):
    """Options of the config that decide the shapes of all factors."""

    decompose_both: bool
    use_effective_conv2d: bool
    full_matrix: bool


def infer_config(placement: Placement) -> LoKrConfig:
    """Return a config that describes a placement: by the rules of LoKr as far as they lead to its
    shapes, and by `tensor_shapes` for the other layers.
    """
    placed = placement.placed
    ranks, alphas = {p.path: p.r for p in placed}, {p.path: p.alpha for p in placed}
    r, alpha = most_common(ranks), most_common(alphas)
    shapes = {p.path: p.module.shapes for p in placed}
    rules = _Rules(
        decompose_both=any("w1_a" in own for own in shapes.values()),
        use_effective_conv2d=any("t2" in own for own in shapes.values()),
        full_matrix=all(p.module.rank is None and p.module.saved is None for p in placed),
    )
    heights = {  # rows of W1, of which one may be the `decompose_factor`
        sides(shapes[p.path], math.prod(p.size.kernel_size))[0][0]
        for p in placed
        if p.piece.row_offset is None
    }
    factors = -1, *sorted(heights)
    irregular = {factor: _irregular(placed, factor, rules) for factor in factors}
    factor = min(factors, key=lambda factor: len(irregular[factor]))
    listed = {
        path: {name: list(shape) for name, shape in own.items()}
        if path in irregular[factor]
        else None
        for path, own in shapes.items()
    }
    targets, excluded = exactly(list(ranks), placement.paths)
    return LoKrConfig(
        r=r,
        alpha=alpha,
        rank_pattern=patterns(ranks, r),
        alpha_pattern=patterns(alphas, alpha),
        target_modules=targets,
        exclude_modules=excluded,
        decompose_factor=factor,
        tensor_shapes=patterns(listed, None),
        row_offsets=patterns({p.path: p.piece.row_offset for p in placed}, None),
        weight_decompose=any(p.by_rows is not None for p in placed),
        wd_on_output=all(p.by_rows is not False for p in placed),
        kronecker_layout="flat" if placement.flat_layout else "channels",
        decompose_both=rules.decompose_both,
        use_effective_conv2d=rules.use_effective_conv2d,
        full_matrix=rules.full_matrix,
    )


def most_common(values: Mapping[str, T]) -> T:
    """Return the most common value, the first of several."""
    return Counter(values.values()).most_common(1)[0][0]


def _irregular(placed: Sequence[Placed], factor: int, rules: _Rules) -> set[str]:
    """Return the paths of layers whose shapes do not follow from a `decompose_factor`."""
    return {
        p.path
        for p in placed
        if p.piece.row_offset is not None
        or p.module.shapes
        != factor_shapes(
            p.size.out_features,
            p.size.in_features,
            p.size.kernel_size,
            r=p.r,
            decompose_factor=factor,
            decompose_both=rules.decompose_both,
            use_effective_conv2d=rules.use_effective_conv2d,
            full_matrix=rules.full_matrix,
        )
    }
