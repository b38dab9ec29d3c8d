# SPDX-License-Identifier: Apache-2.0
"""Cost of LoKr on a layer, from the shapes of its factors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ...base.geometry import Geometry
from ...core.method_info import AdapterCost
from .kronecker import KroneckerFactors, cheapest_order, left_maps, multiply, right_maps
from .shapes import Shapes, sides


def multiplications(shapes: Shapes, size: Geometry, positions: int = 1) -> int:
    """Return the multiplications per output position in the cheapest order, with `positions` input
    positions (`prod(stride)`) for each.

    Example:
        >>> shapes = {"w1": (4, 4), "w2_a": (1024, 8), "w2_b": (8, 1024)}
        >>> multiplications(shapes, Geometry(4096, 4096))
        65664

    Source: arXiv:2309.14859, appendix B.3
    """
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    f = KroneckerFactors(**tensors)
    w1s, w2s = left_maps(f), right_maps(f, size.kernel_size)
    if not size.kernel_size:  # a linear layer multiplies a low-rank `W1` first
        w1s = (multiply(w1s),)
    # Exact if each group has full blocks of rows; else an upper bound.
    parts = size.groups if w1s[-1].shape[0] % size.groups == 0 else 1
    return parts * cheapest_order(w1s, w2s, (parts, 1), positions).multiplications


def largest_rank(shapes: Shapes, size: Geometry) -> int:
    """Return the largest rank of the product, that of `W1` times that of `W2`."""
    taps = math.prod(size.kernel_size)
    (a, b), (c, d) = sides(shapes, taps)
    first = min(a, b) if "w1" in shapes else min(a, b, shapes["w1_a"][1])
    second = min(c, d * taps) if "w2" in shapes else min(c, d * taps, shapes["w2_b"][0])
    return min(first * second, size.out_features, size.columns)


def parameter_count(shapes: Shapes) -> int:
    """Return the number of parameters in tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes.values())


def cost(
    shapes: Shapes,
    size: Geometry,
    r: int,
    by_rule: Callable[[int], Shapes] | None,
    positions: int = 1,
) -> AdapterCost:
    """Return the cost of an adapter, with remarks on its config. `by_rule` returns the shapes for a
    `decompose_factor`; None if they do not follow from it, or `full_matrix` is set.
    """
    remarks = []
    (a, b), (c, d) = sides(shapes, math.prod(size.kernel_size))
    if by_rule is not None:
        if "w2" in shapes:
            half = f"`r`={r} is at least half of {max(c, d)}"
            remarks.append(f"{half}, so W2 is a full matrix; `r` only divides the scale.")
        count = parameter_count(shapes)
        better = [
            (parameter_count(by_rule(factor)), factor)
            for factor in _divisors(size)
            if factor > max(a, b)
        ]
        if better and min(better)[0] < count:
            fewest, factor = min(better)
            remarks.append(
                f"a larger factor takes fewer parameters: `decompose_factor`={factor} {fewest:,} "
                f"in place of {count:,}."
            )
    return AdapterCost(
        multiplications(shapes, size, positions), largest_rank(shapes, size), tuple(remarks)
    )


def _divisors(size: Geometry) -> list[int]:
    """Return the numbers that divide either size of a layer."""
    sizes = size.out_features, size.in_features
    roots = {f for n in sizes for f in range(1, math.isqrt(n) + 1) if n % f == 0}
    return sorted(roots | {n // f for n in sizes for f in roots if n % f == 0})
