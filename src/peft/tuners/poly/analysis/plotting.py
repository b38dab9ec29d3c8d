# SPDX-License-Identifier: Apache-2.0
"""The figure of a routing report: the tree of tasks, what they mix in every layer, and how much
each skill is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .report import RoutingReport

_INK, _FAINT = "#222222", "#DDDDDD"


def draw(report: RoutingReport) -> Any:
    """A matplotlib figure, drawn without the state that `pyplot` keeps. Splits are averaged."""
    from matplotlib.figure import Figure

    paths = list(report.weights)
    weights = [report.weights[path].mean(1)[report.order] for path in paths]  # [n_tasks, n_skills]
    columns = sum(w.shape[1] for w in weights)
    n_tasks = len(report.tasks)
    height = min(max(0.2 * n_tasks + 1.6, 3.5), 24)
    figure = Figure(
        figsize=(min(max(0.16 * columns + 6, 9), 24), height + 2.4), dpi=120, layout="constrained"
    )
    tree, heat, legend, blank, usage, other = figure.subplots(
        2, 3, width_ratios=[1, 5, 0.12], height_ratios=[height, 2.2]
    ).flat  # fmt: skip
    blank.remove()
    _draw_tree(tree, report)
    image = heat.imshow(
        torch.cat(weights, 1).numpy(),
        aspect="auto",
        cmap="viridis",
        vmin=0,
        interpolation="nearest",
    )
    heat.set_yticks(
        range(n_tasks), [report.tasks[i] for i in report.order], fontsize=8 if n_tasks <= 60 else 4
    )
    heat.tick_params(left=False)
    figure.colorbar(image, cax=legend, label="weight, mean of splits")
    most = max(w.shape[1] for w in weights)
    table = torch.full((most, len(paths)), torch.nan)
    for i, path in enumerate(paths):
        share = torch.tensor(report.layers[path]["usage"])
        table[: len(share), i] = share
    image = usage.imshow(
        table.numpy(), aspect="auto", cmap="magma", vmin=0, interpolation="nearest"
    )
    figure.colorbar(image, cax=other, label="share of use")
    usage.set_yticks(range(most), [str(s) for s in range(most)], fontsize=8)
    usage.set_ylabel("skill")
    _name_layers(heat, usage, paths, [w.shape[1] for w in weights])
    heat.set_title(
        f"What {n_tasks} tasks mix: layer by layer, a column for each skill",
        loc="left",
        fontsize=11,
        color=_INK,
    )
    tree.set_title("alike", loc="left", fontsize=11, color=_INK)
    usage.set_title("How much each skill is used, by layer", loc="left", fontsize=11, color=_INK)
    return figure


def _name_layers(heat: Any, usage: Any, paths: list[str], skills: list[int]) -> None:
    """Lines between layers, and their names where there is room: below the lower panel, whose
    columns are the layers.
    """
    ends = torch.tensor(skills).cumsum(0).tolist()
    for end in ends[:-1]:
        heat.axvline(end - 0.5, color="white", linewidth=1)
    heat.set_xticks([])
    shared = _common_start(paths)
    names = [path[len(shared) :] or path for path in paths]
    every = -(-len(paths) // 60)
    usage.set_xticks(range(0, len(paths), every), names[::every], rotation=90, fontsize=7)


def _common_start(paths: list[str]) -> str:
    """What all paths begin with, up to a dot."""
    parts = [path.split(".") for path in paths]
    count = 0
    while all(len(p) > count + 1 and p[count] == parts[0][count] for p in parts):
        count += 1
    return "".join(f"{part}." for part in parts[0][:count])


def _draw_tree(axes: Any, report: RoutingReport) -> None:
    """The tree of tasks, its leaves at the heights of the rows beside it."""
    n_tasks = len(report.tasks)
    places: dict[int, tuple[float, float]] = {
        task: (0.0, float(row)) for row, task in enumerate(report.order)
    }
    for step, (a, b, distance, _) in enumerate(report.merges):
        (x1, y1), (x2, y2) = places[a], places[b]
        axes.plot([x1, distance, distance, x2], [y1, y1, y2, y2], color=_INK, linewidth=0.9)
        places[n_tasks + step] = (distance, (y1 + y2) / 2)
    axes.set_ylim(n_tasks - 0.5, -0.5)
    axes.invert_xaxis()
    axes.set_yticks([])
    axes.set_xlabel("1 − cosine", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
