# SPDX-License-Identifier: Apache-2.0
"""What an adapter costs on one layer, and what it can express: known from shapes alone, before it
is trained.
"""

from __future__ import annotations

from typing import NamedTuple

from ..base.geometry import Geometry, columns


class AdapterCost(NamedTuple):
    """An adapter's cost on a layer.

    Attributes:
        multiplications: For each row of the layer's input, or position of its output, beside the
            layer's own.
        rank: The largest rank its delta can have.
        remarks: What its config may not have been meant to say, a sentence each.
    """

    multiplications: int
    rank: int
    remarks: tuple[str, ...] = ()


def thin_cost(size: Geometry, r: int) -> AdapterCost:
    """The cost of factors `[out, r]` and `[r, in · taps]`.

    Example:
        >>> thin_cost(Geometry(8, 4), 2)
        AdapterCost(multiplications=24, rank=2, remarks=())
    """
    most = min(size.out_features, columns(size))
    remark = f"`r`={r} is above the weight's own rank, {most}." if r > most else None
    return AdapterCost(
        r * (size.out_features + columns(size)), min(r, most), (remark,) if remark else ()
    )
