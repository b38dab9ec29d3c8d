# SPDX-License-Identifier: Apache-2.0
"""Parts of figures that several reports draw, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, _FAINT = "#222222", "#DDDDDD"


def draw_tree(
    axes: Axes, order: Sequence[int], links: Sequence[tuple[int, int, float, int]]
) -> None:
    """Draw a tree, its leaves at the heights of the rows beside it.

    `links` are the tree's steps in the form of scipy's linkage.
    """
    nodes = {leaf: (0.0, float(row)) for row, leaf in enumerate(order)}
    for step, (left, right, distance, _) in enumerate(links):
        (x1, y1), (x2, y2) = nodes[left], nodes[right]
        axes.plot([x1, distance, distance, x2], [y1, y1, y2, y2], color=INK, linewidth=0.9)
        nodes[len(order) + step] = (distance, (y1 + y2) / 2)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.invert_xaxis()
    axes.set_yticks([])
    axes.set_xlabel("1 − cosine", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
