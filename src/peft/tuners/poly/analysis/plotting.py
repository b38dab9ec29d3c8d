# SPDX-License-Identifier: Apache-2.0
"""The figure of a routing, drawn from arrays: the tree of tasks, their weights in every layer, and
the use of each skill. Needs matplotlib, imported when drawing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....base.figures import INK, draw_tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_routing(
    tasks: Sequence[str],
    weights: Mapping[str, Tensor],
    usage: Mapping[str, Tensor],
    order: Sequence[int],
    merges: Sequence[tuple[int, int, float, int]],
) -> Figure:
    """Draw the weights of tasks in all layers, without the global state of `pyplot`.

    Args:
        weights: `[n_tasks, n_skills]` by layer.
        usage: Each skill's share of use, `[n_skills]`, by layer.
        order: The tasks by id, as the rows from top to bottom.
        merges: The tree of tasks in the form of scipy's linkage; empty for none.
    """
    from matplotlib.figure import Figure

    rows = [table[list(order)] for table in weights.values()]
    skills = [table.shape[1] for table in rows]
    height = min(max(0.2 * len(tasks) + 1.6, 3.5), 24)
    width = min(max(0.16 * sum(skills) + 6, 9), 24)
    figure = Figure(figsize=(width, height + 2.4), dpi=120, layout="constrained")
    tree, heat, legend, blank, use, other = figure.subplots(
        2, 3, width_ratios=[1, 5, 0.12], height_ratios=[height, 2.2]
    ).flat  # fmt: skip
    blank.remove()
    draw_tree(tree, order, merges)
    style = {"aspect": "auto", "vmin": 0, "interpolation": "nearest"}
    image = heat.imshow(torch.cat(rows, 1).numpy(), cmap="viridis", **style)
    size = 8 if len(tasks) <= 60 else 4
    heat.set_yticks(range(len(tasks)), [tasks[task] for task in order], fontsize=size)
    heat.tick_params(left=False)
    figure.colorbar(image, cax=legend, label="weight, mean of splits")
    table = torch.full((max(skills), len(rows)), torch.nan)
    for column, share in enumerate(usage.values()):
        table[: len(share), column] = share
    image = use.imshow(table.numpy(), cmap="magma", **style)
    figure.colorbar(image, cax=other, label="share of use")
    use.set_yticks(range(max(skills)), map(str, range(max(skills))), fontsize=8)
    use.set_ylabel("skill")
    _name_layers(heat, use, list(weights), skills)
    for axes, title in (
        (heat, f"Weights of {len(tasks)} tasks, a column for each skill of each layer"),
        (tree, "similarity"),
        (use, "Use of each skill, by layer"),
    ):
        axes.set_title(title, loc="left", fontsize=11, color=INK)
    return figure


def _name_layers(heat: Axes, use: Axes, paths: list[str], skills: list[int]) -> None:
    """Draw lines between layers, and write the layers' names below the lower panel."""
    ends = torch.tensor(skills).cumsum(0).tolist()
    for end in ends[:-1]:
        heat.axvline(end - 0.5, color="white", linewidth=1)
    heat.set_xticks([])
    shared = _shared_start(paths)
    names = [path[len(shared) :] or path for path in paths]
    step = -(-len(paths) // 60)  # names of 60 layers at most
    use.set_xticks(range(0, len(paths), step), names[::step], rotation=90, fontsize=7)


def _shared_start(paths: list[str]) -> str:
    """Return the beginning that all paths share, up to a dot."""
    parts = [path.split(".") for path in paths]
    count = 0
    while all(len(p) > count + 1 and p[count] == parts[0][count] for p in parts):
        count += 1
    return "".join(f"{part}." for part in parts[0][:count])
