# SPDX-License-Identifier: Apache-2.0
"""The config of an adapter whose factors are given: a LoKr file lacks most of its fields."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

from ....core.targets import exactly, patterns
from ..config import LoKrConfig
from ..layer_options import shapes_by_rule
from ..shapes import sides
from .placement import Placement

T = TypeVar("T")


def infer_config(placement: Placement) -> LoKrConfig:
    """Return a config that describes a placement. LoKr's rules give the shapes of as many layers as
    possible; `tensor_shapes` lists those of the others.
    """
    placed = placement.placed
    ranks, alphas = {p.path: p.r for p in placed}, {p.path: p.alpha for p in placed}
    r, alpha = most_common(ranks), most_common(alphas)
    shapes = {p.path: p.module.shapes for p in placed}
    rules = LoKrConfig(
        decompose_both=any("w1_a" in own for own in shapes.values()),
        use_effective_conv2d=any("t2" in own for own in shapes.values()),
        full_matrix=all(p.module.rank is None and p.module.saved is None for p in placed),
    )
    regular = [p for p in placed if p.piece.row_offset is None]
    # The rows of W1 in any layer may be the `decompose_factor` of all.
    rows = {sides(shapes[p.path], math.prod(p.size.kernel_size))[0][0] for p in regular}
    listed: dict[int, dict[str, dict[str, list[int]] | None]] = {}
    for factor in (-1, *sorted(rows)):
        expected = {p.path: shapes_by_rule(rules, p.size, p.r, factor) for p in regular}
        listed[factor] = {
            path: None if own == expected.get(path) else {k: list(v) for k, v in own.items()}
            for path, own in shapes.items()
        }
    factor = min(listed, key=lambda factor: sum(own is not None for own in listed[factor].values()))
    targets, excluded = exactly(list(ranks), placement.paths)
    return LoKrConfig(
        r=r,
        alpha=alpha,
        rank_pattern=patterns(ranks, r),
        alpha_pattern=patterns(alphas, alpha),
        target_modules=targets,
        exclude_modules=excluded,
        decompose_factor=factor,
        tensor_shapes=patterns(listed[factor], None),
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
