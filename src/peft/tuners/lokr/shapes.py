# SPDX-License-Identifier: Apache-2.0
"""Shapes of LoKr's factors: `out = a·c`, `in = b·d`, `W1 [a, b]`, `W2 [c, d, *kernel]`."""

import math
from collections.abc import Mapping, Sequence

Shapes = dict[str, tuple[int, ...]]
"""Shapes of an adapter's tensors by field of `KroneckerFactors`."""

# Names of the tensors that `W1` and `W2` consist of.
FACTOR_NAMES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Split a dimension into two factors `m · k = dimension`.

    A `factor` that divides `dimension` is taken as `m`, also above the square root. Otherwise `m`
    is the largest divisor not above `factor` (-1: no limit) nor above the square root, so `m <= k`.

    Args:
        dimension: The size to split, at least 1.
        factor: Wanted `m`; -1 asks for the pair nearest to the square root. Other values below 1
            give `m = 1`.

    Returns:
        The pair `(m, k)`.

    Example:
        >>> factorization(128), factorization(128, 4), factorization(127), factorization(128, 16)
        ((8, 16), (4, 32), (1, 127), (16, 8))

    Source: arXiv:2309.14859, eq. 5; a factor above the square root as Hugging Face PEFT reads it
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    m = next((m for m in range(limit, 1, -1) if dimension % m == 0), 1)
    return m, dimension // m


def factor_shapes(
    out_features: int,
    in_features: int,
    kernel: Sequence[int] = (),
    *,
    r: int,
    decompose_both: bool = False,
    decompose_factor: int | Sequence[int] = -1,
    use_effective_conv2d: bool = False,
    full_matrix: bool = False,
    unbalanced_factorization: bool = False,
) -> Shapes:
    """Return the shapes of a new adapter's tensors.

    `(a, c)` and `(b, d)` are the factorizations of `out` and `in`. `W1` is low rank iff
    `decompose_both` and `r < max(a, b) / 2`, `W2` iff `r < max(c, d) / 2`; a low-rank `W2` with a
    kernel of more than one tap is Tucker iff `use_effective_conv2d`.

    Args:
        out_features: `out`: features, or output channels of a convolution.
        in_features: `in`: features, or `in_channels // groups` of a convolution.
        kernel: Kernel size of a convolution, one number per spatial dimension; empty for a linear
            layer.
        r: Rank, at least 1.
        decompose_both: Let `W1` be low rank too. Off by default, since `W1` is the small side.
        decompose_factor: `factor` of `factorization`; or the pair `(a, b)`, which divides
            `(out, in)`.
        use_effective_conv2d: Use Tucker factors where they apply.
        full_matrix: Make both sides full matrices for any rank.
        unbalanced_factorization: Give `W1` the larger factor of `out`, `W2` the smaller.

    Example:
        >>> factor_shapes(32, 16, (3, 3), r=2, use_effective_conv2d=True)
        {'w1': (4, 4), 'w2_a': (2, 8), 'w2_b': (2, 4), 't2': (2, 2, 3, 3)}
        >>> factor_shapes(32, 16, r=1, decompose_factor=(2, 8), full_matrix=True)
        {'w1': (2, 8), 'w2': (16, 2)}

    Source: arXiv:2309.14859, eq. 4; arXiv:2108.06098, proposition 3
    """
    if isinstance(decompose_factor, int):
        a, c = factorization(out_features, decompose_factor)
        b, d = factorization(in_features, decompose_factor)
        a, c = (c, a) if unbalanced_factorization else (a, c)
    else:
        a, b = decompose_factor
        c, d = out_features // a, in_features // b
    kernel, taps = tuple(kernel), math.prod(kernel)
    shapes: Shapes = {"w1": (a, b)}
    if decompose_both and 2 * r < max(a, b) and not full_matrix:
        shapes = {"w1_a": (a, r), "w1_b": (r, b)}
    if 2 * r >= max(c, d) or full_matrix:
        shapes |= {"w2": (c, d, *kernel)}
    elif use_effective_conv2d and taps > 1:
        shapes |= {"w2_a": (r, c), "w2_b": (r, d), "t2": (r, r, *tucker_kernel(kernel))}
    else:
        shapes |= {"w2_a": (c, r), "w2_b": (r, d * taps)}
    return shapes


def tucker_kernel(kernel: Sequence[int]) -> tuple[int, ...]:
    """Return the kernel axes of `t2`; a one-dimensional kernel has a second axis of size one."""
    return (*kernel, 1) if len(kernel) == 1 else tuple(kernel)


def sides(
    shapes: Mapping[str, Sequence[int]], taps: int = 1
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return `(a, b)` and `(c, d)` of an adapter with tensors of these shapes.

    Example:
        >>> sides({"w1": (4, 4), "w2_a": (8, 2), "w2_b": (2, 36)}, taps=9)
        ((4, 4), (8, 4))
    """
    ab = tuple(shapes["w1"]) if "w1" in shapes else (shapes["w1_a"][0], shapes["w1_b"][1])
    if "w2" in shapes:
        cd = shapes["w2"][0], shapes["w2"][1]
    elif "t2" in shapes:
        cd = shapes["w2_a"][1], shapes["w2_b"][1]
    else:
        cd = shapes["w2_a"][0], shapes["w2_b"][1] // taps
    return (ab[0], ab[1]), cd


def shape_problems(
    shapes: Mapping[str, Sequence[int]],
    out_features: int,
    in_features: int,
    kernel: Sequence[int] = (),
    row_offset: int | None = None,
) -> str | None:
    """Return the reason why tensors of these shapes do not fit a layer; None if they fit.

    `row_offset` is the first row of the product that the layer's delta has; None for all rows.

    Example:
        >>> shape_problems({"w1": (2, 2), "w2": (4, 4)}, 8, 10)
        'its factors make a weight of 8 x 8, the layer has 8 x 10'
    """
    names, taps = set(shapes), math.prod(kernel)
    full = "w1" in names, "w2" in names
    wanted = {"w1"} if full[0] else {"w1_a", "w1_b"}
    wanted |= {"w2"} if full[1] else {"w2_a", "w2_b"} | ({"t2"} & names)
    if names != wanted:
        found = ", ".join(sorted(names)) or "none"
        return f"tensors {found} are not those of one adapter; {', '.join(sorted(wanted))} would be"
    kernels = {"w2": tuple(kernel), "t2": tucker_kernel(kernel)}
    dimensions = {name: 2 + len(kernels.get(name, ())) for name in names}
    for name, shape in shapes.items():
        if len(shape) != dimensions[name] or tuple(shape[2:]) != kernels.get(name, ()):
            return (
                f"{name} is of shape {list(shape)}, which does not fit a kernel of {list(kernel)}"
            )
    ranks = [
        (n, shapes[f"{n}_a"], shapes[f"{n}_b"])
        for n, is_full in zip(("w1", "w2"), full, strict=True)
        if not is_full
    ]
    for name, left, right in ranks:
        tucker = name == "w2" and "t2" in names
        if (left[0] if tucker else left[1]) != right[0] or (
            tucker and tuple(shapes["t2"][:2]) != (left[0], right[0])
        ):
            pair = f"{name}_a {list(left)} and {name}_b {list(right)}"
            return f"the shapes of {pair} do not fit together"
        if name == "w2" and not tucker and right[1] % taps:
            return f"w2_b is of shape {list(right)}, which does not fit a kernel of {list(kernel)}"
    (a, b), (c, d) = sides(shapes, taps)
    rows = a * c
    if b * d != in_features or (
        rows != out_features if row_offset is None else rows < row_offset + out_features
    ):
        sizes = f"{rows} x {b * d}, the layer has {out_features} x {in_features}"
        return f"its factors make a weight of {sizes}"
    return None
