# SPDX-License-Identifier: Apache-2.0
"""The order in which the factors of a Kronecker product are applied: LoKr's one cost model."""

State = tuple[int, int]


def contraction_order(
    left: tuple[int, ...],
    right: tuple[int, ...],
    *,
    spatial: int = -1,
    taps: int = 1,
    stride: int = 1,
) -> tuple[int, tuple[State, ...]]:
    """Find the order of contraction with the fewest multiplications: the one cost model of this
    file.

    After `i` maps of the left chain and `j` of the right one the grid holds `left[i] · right[j]`
    elements per output position, `stride` times that before the spatial map. A move takes the next
    map of either chain, or several next maps multiplied into one, and costs the elements it
    produces times the elements each is summed from. Multiplying maps together is not counted, as it
    does not grow with the input; hence the order depends on the adapter's shapes alone, and a new
    batch size or sequence length neither changes it nor recompiles.

    Args:
        left: Sizes along the left chain, `(b, a)` or `(b, r, a)`; within one group.
        right: Sizes along the right chain, `(d, c)`, `(d, r, c)` or `(d, r, r, c)`; within one
            group.
        spatial: Which map of the right chain has the kernel; -1 for none.
        taps: Number of elements of the kernel.
        stride: Input positions per output position.

    Returns:
        The multiplications per output position (and group), and the states `(i, j)` to pass through
        after `(0, 0)`.

    Example:
        >>> contraction_order((4, 4), (1024, 8, 1024))  # down to rank 8, then W1, then up
        (65664, ((0, 1), (1, 1), (1, 2)))

    Source: arXiv:2309.14859, appendix B.3 (the product as linear layers); dynamic programming over
    their orders
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
            # Longest moves first: of two equally cheap orders the one with fewer operations wins.
            # Right moves before left ones: the first product is then a plain one, which can be
            # taken together with the base layer's.
            moves = [(i, to) for to in range(end[1], j, -1)] + [
                (to, j) for to in range(end[0], i, -1)
            ]
            if moves:
                totals = [multiplications(i, j, *to) + cost[to] for to in moves]
                cost[i, j] = min(totals)
                best = moves[totals.index(cost[i, j])]
                order[i, j] = (best, *order[best])
    return cost[0, 0], order[0, 0]
