# SPDX-License-Identifier: Apache-2.0
"""The two pictures: what accuracy costs in bytes, and how tasks mix skills."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from .report import Row

# Okabe and Ito's palette, told apart with any kind of colour vision.
COLOURS = {"shared": "#0072B2", "routed": "#D55E00", "per task": "#009E73"}
MEANING = {"shared": "one adapter, task unknown", "routed": "one adapter, routed by task", "per task": "an adapter a task"}
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150})


def accuracy_against_bytes(rows: Sequence[Row], file: Path) -> None:
    """Mean accuracy over the tasks against bytes on disk, a labelled point a method, the worst task below it."""
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    trained = [row for row in rows if row.bytes]
    base = next(row for row in rows if not row.bytes)
    sizes = sorted(row.bytes / 1024 for row in trained)
    left, right = sizes[0], sizes[-1]
    axes.set_xlim(0.85 * left, right + 0.75 * max(right - left, 0.2 * left))
    height = 1.0
    for row in sorted(trained, key=lambda row: -row.mean):
        size, colour, worst = row.bytes / 1024, COLOURS[row.mode], min(row.accuracies.values())
        axes.plot([size] * 2, [worst, row.mean], color=colour, linewidth=1.5, alpha=0.5)
        axes.scatter(size, worst, marker="_", s=90, color=colour, alpha=0.7)
        axes.scatter(size, row.mean, s=80, color=colour, zorder=3)
        height = min(height - 0.07, row.mean)  # labels in a column of their own, none on top of another
        axes.annotate(
            f"{row.label}: {100 * row.mean:.1f} %, {size:,.0f} KB",
            (size, row.mean),
            xytext=(right + 0.06 * (right - left), height),
            color=colour,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.4, "shrinkB": 6, "relpos": (0, 0.5)},
        )
    axes.axhline(base.mean, color="#666666", linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"{base.label}, {100 * base.mean:.1f} %",
        (0.85 * left, base.mean),
        xytext=(4, 5),
        textcoords="offset points",
        color="#444444",
    )
    for mode, colour in COLOURS.items():
        axes.scatter([], [], color=colour, label=MEANING[mode])
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f} KB")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_ylim(top=1.0)
    axes.set_xlabel("bytes on disk for all tasks")
    axes.set_ylabel("accuracy on held-out pictures")
    axes.set_title("Mean over the eight tasks (dot) and the worst task (dash)", loc="left")
    _save(figure, file)


def router_heat_map(weights: dict[str, Tensor], tasks: Sequence[str], file: Path, layers: int = 6) -> None:
    """Task × skill weights in the layers where tasks differ most.

    Args:
        weights: ``[n_tasks, n_splits, n_skills]`` by layer; the mean over splits is shown.
        tasks: The tasks' names.
        file: Where to write.
        layers: How many layers to show. Skills of different layers have nothing in common but their number.
    """
    by_layer = {name: value.mean(1) for name, value in weights.items()}
    chosen = sorted(by_layer, key=lambda name: -by_layer[name].var(0).sum().item())[:layers]
    chosen.sort(key=list(by_layer).index)
    top = max(by_layer[name].max().item() for name in chosen)
    figure, axes = plt.subplots(1, len(chosen), figsize=(1.9 * len(chosen) + 1.6, 4.4), sharey=True, layout="constrained")
    for axis, name in zip(torch.atleast_1d(torch.arange(len(chosen))).tolist(), chosen, strict=True):
        panel = axes[axis] if len(chosen) > 1 else axes
        values = by_layer[name]
        image = panel.imshow(values, cmap="viridis", vmin=0, vmax=top, aspect="auto")
        for row, column in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
            value = values[row, column].item()
            shade = "white" if value < 0.6 * top else "black"
            panel.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=shade)
        panel.set_title(_short(name), fontsize=9)
        panel.set_xticks(range(values.shape[1]), [str(skill + 1) for skill in range(values.shape[1])])
        panel.set_yticks(range(len(tasks)), tasks)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    figure.supxlabel("skill", fontsize=11)
    figure.suptitle("How each task mixes the skills (per cent), where tasks differ most", x=0.01, ha="left", fontsize=12)
    figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01, format=lambda value, _: f"{100 * value:.0f} %")
    _save(figure, file)


def _short(name: str) -> str:
    """``vit.layers.0.attention.q_proj`` as two short lines: the block's number, the layer's name."""
    parts = name.split(".")
    number = next((part for part in parts if part.isdigit()), None)
    return f"block {int(number) + 1}\n{parts[-1]}" if number is not None else parts[-1]


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file)
    plt.close(figure)
