# SPDX-License-Identifier: Apache-2.0
"""Cost and rank of an adapter on one layer, from shapes alone."""

from __future__ import annotations

from typing import NamedTuple

from ..base.geometry import Geometry, columns


class AdapterCost(NamedTuple):
    """An adapter's cost on a layer.

    Attributes:
        multiplications: For each row of the layer's input, or position of its output, in addition
            to the layer's own.
        rank: The largest rank its delta can have.
        remarks: Sentences on settings that may be mistakes.
    """

    multiplications: int
    rank: int
    remarks: tuple[str, ...] = ()


def thin_cost(size: Geometry, r: int) -> AdapterCost:
    """Return the cost of factors `[out, r]` and `[r, in · taps]`.

    Example:
        >>> thin_cost(Geometry(8, 4), 2)
        AdapterCost(multiplications=24, rank=2, remarks=())
    """
    most = min(size.out_features, columns(size))
    remark = f"`r`={r} is above the weight's own rank, {most}." if r > most else None
    return AdapterCost(
        r * (size.out_features + columns(size)), min(r, most), (remark,) if remark else ()
    )
