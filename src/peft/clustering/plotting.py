# SPDX-License-Identifier: Apache-2.0
"""Figures of the similarity of adapters and of their clusters, drawn from arrays. Needs matplotlib,
imported when drawing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..base.figures import INK, draw_tree
from ..ops.clustering import Link

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_similarity(
    names: Sequence[str],
    cosines: Tensor,
    order: Sequence[int],
    links: Sequence[Link] = (),
    by_layer: Mapping[str, float] | None = None,
    clusters: Sequence[int] = (),
) -> Figure:
    """Draw a table of cosines with the tree of adapters beside it, and a bar for each layer.

    Args:
        names: The adapters.
        cosines: `[n, n]`.
        order: The adapters by number, as the rows from top to bottom.
        links: The tree; empty for none.
        by_layer: Mean cosine of all pairs in each layer; None draws no bars.
        clusters: Sizes of clusters that follow one another in `order`, to be framed.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    side = min(max(0.24 * len(names) + 1.5, 3.5), 20)
    bars = min(0.4 + 0.16 * len(by_layer), 12) if by_layer else 0.0
    figure = Figure(figsize=(side + 4.5, side + bars), dpi=120, layout="constrained")
    heights = [side, bars] if by_layer else [side]
    rows = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)
    tree, heat, legend = rows[0, 0].subplots(1, 3, width_ratios=[1, 4, 0.12])
    draw_tree(tree, order, links) if links else tree.remove()
    table = cosines[list(order)][:, list(order)]
    image = heat.imshow(table.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    heat.set_aspect("auto")
    size = 8 if len(names) <= 60 else 4
    shown = [names[i] for i in order]
    heat.set_yticks(range(len(names)), shown, fontsize=size)
    heat.set_xticks(range(len(names)), shown, rotation=90, fontsize=size)
    figure.colorbar(image, cax=legend, label="cosine of deltas")
    begin = 0
    for count in clusters:
        corner = (begin - 0.5, begin - 0.5)
        heat.add_patch(Rectangle(corner, count, count, fill=False, edgecolor=INK, linewidth=1.2))
        begin += count
    if by_layer:
        _draw_layers(rows[1, 0].subplots(), by_layer)
    return figure


def _draw_layers(axes: Axes, by_layer: Mapping[str, float]) -> None:
    """Draw the mean cosine of each layer as a bar."""
    axes.barh(range(len(by_layer)), list(by_layer.values()), height=0.7, color="#0072B2")
    step = -(-len(by_layer) // 80)  # names of 80 layers at most
    axes.set_yticks(range(0, len(by_layer), step), [*by_layer][::step], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("mean cosine of all pairs", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
