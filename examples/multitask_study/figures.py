# SPDX-License-Identifier: Apache-2.0
"""Figures: accuracy over all tasks, and new tasks from few examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .methods import Method
from .report import SHOTS, WAYS, new_mean, over_seeds

# From Okabe and Ito's palette, told apart with any kind of color vision.
COLORS = {
    "base": "#8A8A8A",
    "shared": "#0072B2",
    "own": "#009E73",
    "poly": "#D55E00",
    "mhr": "#CC79A7",
    "mope": "#56B4E9",
}
LINES = {"Z": "-", "full": "--", "mu": ":", "further": "-", "new": "-", "none": "-"}
MARKS = {"Z": "o", "full": "s", "mu": "^", "further": "D", "new": "v", "none": "_"}
INK, FAINT = "#222222", "#DDDDDD"
STYLE = {
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8A8A8A",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.dpi": 120,
}


def draw(results: dict[str, Any], methods: Sequence[Method], folder: Path) -> None:
    """Draw both figures."""
    here = [
        method
        for method in methods
        if any(method.key in numbers for numbers in results["seeds"].values())
    ]
    with plt.rc_context(STYLE):
        trained_tasks(results, here, folder / "trained_tasks.png")
        few_examples(results, here, folder / "few_examples.png")


def trained_tasks(results: dict[str, Any], methods: Sequence[Method], file: Path) -> None:
    """Draw mean and worst task of each method, a point for each seed."""
    figure, axes = plt.subplots(figsize=(8, 0.62 * len(methods) + 1.4), layout="constrained")
    for place, method in enumerate(reversed(methods)):
        for of, mark, side in (
            (lambda a: mean(a.values()), "o", 0.13),
            (lambda a: min(a.values()), "v", -0.13),
        ):
            values = [
                100 * v
                for v in over_seeds(results, method.key, lambda n, of=of: of(n["accuracies"]))
            ]
            color = COLORS[method.key]
            axes.scatter(
                values,
                [place + side] * len(values),
                marker=mark,
                s=34,
                color=color,
                alpha=0.45,
                linewidth=0,
            )
            axes.plot(
                [mean(values)] * 2,
                [place + side - 0.11, place + side + 0.11],
                color=color,
                linewidth=2.5,
            )
    axes.set_yticks(range(len(methods)), [method.label for method in reversed(methods)])
    axes.set(xlabel="accuracy on held-out pictures, per cent")
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for mark, meaning in (("o", "mean of all tasks"), ("v", "worst task")):
        axes.scatter(
            [], [], marker=mark, s=34, color="#666666", label=f"{meaning}, a seed each; bar: mean"
        )
    figure.legend(frameon=False, loc="outside lower center", ncols=2, handletextpad=0.2, fontsize=9)
    axes.set_title("Many tasks with equal numbers of parameters", loc="left", fontsize=12)
    figure.savefig(file)
    plt.close(figure)


def few_examples(results: dict[str, Any], methods: Sequence[Method], file: Path) -> None:
    """Draw accuracy on new tasks against the number of examples, a line for each way to adapt."""
    kinds = {"pairs": "new pairs of known parts", "novel": "nothing known"}
    figure, panels = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained", sharey=True)
    for axes, (kind, title) in zip(panels, kinds.items(), strict=True):
        lines = [(method, way) for method in methods for way in method.ways]
        for number, (method, way) in enumerate(lines):
            points = [
                over_seeds(results, method.key, new_mean(kind, way, shots)) for shots in SHOTS
            ]
            center = [100 * mean(values) for values in points]
            spread = [100 * stdev(values) if len(values) > 1 else 0.0 for values in points]
            aside = 1 + 0.3 * (number / len(lines) - 0.5)  # so that the bars can be told apart
            axes.errorbar(
                [shots * aside for shots in SHOTS], center, spread,
                label=f"{method.label}: {WAYS[way]}", color=COLORS[method.key],
                linestyle=LINES[way], marker=MARKS[way], markersize=5,
                linewidth=1.6, elinewidth=0.8, capsize=2,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(SHOTS, [str(shots) for shots in SHOTS])
        axes.minorticks_off()
        axes.set(xlabel="labeled examples")
        axes.set_title(title, loc="left", fontsize=12)
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
    panels[0].set_ylabel("accuracy on held-out pictures, per cent")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=2, fontsize=8.5)
    figure.savefig(file)
    plt.close(figure)
