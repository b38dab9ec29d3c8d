# SPDX-License-Identifier: Apache-2.0
"""Cost model of LoKr: the order in which the maps of a Kronecker product are applied."""

from typing import NamedTuple, TypeAlias

State: TypeAlias = tuple[int, int]
"""Number of maps of the left side and of the right side that are applied."""


class Contraction(NamedTuple):
    """Order of contraction and its cost.

    Attributes:
        multiplications: Per output position (and group).
        states: The states to pass through after `(0, 0)`.
    """

    multiplications: int
    states: tuple[State, ...]


def contraction_order(
    left: tuple[int, ...],
    right: tuple[int, ...],
    *,
    spatial: int = -1,
    taps: int = 1,
    stride: int = 1,
    left_first: bool = False,
) -> Contraction:
    """Find the order of contraction with the fewest multiplications.

    After `i` maps of the left side and `j` of the right side the grid has `left[i] · right[j]`
    elements per output position, `stride` times as many before the spatial map. A move applies the
    next map of one side, or several next maps multiplied to one; its cost is the number of elements
    it produces times the number that each is summed from. The multiplications between maps are not
    counted, because they do not grow with the input. So the order depends on the shapes of the
    adapter alone: a new batch size or sequence length does not change it, nor recompile.

    Args:
        left: Sizes along the left side, `(b, a)` or `(b, r, a)`; within one group.
        right: Sizes along the right side, `(d, c)`, `(d, r, c)` or `(d, r, r, c)`; within one
            group.
        spatial: Index of the map of the right side that has the kernel; -1 for none.
        taps: Number of elements of the kernel.
        stride: Input positions per output position.
        left_first: Of equally cheap orders, take one that begins with the left side.

    Returns:
        The order and its cost; found by dynamic programming over at most 3 · 4 states.

    Example:
        >>> contraction_order((4, 4), (1024, 8, 1024))  # down to rank 8, then W1, then up
        Contraction(multiplications=65664, states=((0, 1), (1, 1), (1, 2)))

    Source: arXiv:2309.14859, appendix B.3 (the product as linear layers)
    """

    def multiplications(i: int, j: int, to_i: int, to_j: int) -> int:
        produced = left[to_i] * right[to_j] * (stride if to_j <= spatial else 1)
        summed = left[i] if to_i > i else right[j] * (taps if j <= spatial < to_j else 1)
        return produced * summed

    end = len(left) - 1, len(right) - 1
    cost: dict[State, int] = {end: 0}
    order: dict[State, tuple[State, ...]] = {end: ()}
    for i in range(end[0], -1, -1):
        for j in range(end[1], -1, -1):
            # Among equally cheap orders, longer moves come first for fewer operations.
            right_moves = [(i, to) for to in range(end[1], j, -1)]
            left_moves = [(to, j) for to in range(end[0], i, -1)]
            moves = left_moves + right_moves if left_first else right_moves + left_moves
            if moves:
                totals = [multiplications(i, j, *to) + cost[to] for to in moves]
                cost[i, j] = min(totals)
                best = moves[totals.index(cost[i, j])]
                order[i, j] = (best, *order[best])
    return Contraction(cost[0, 0], order[0, 0])
