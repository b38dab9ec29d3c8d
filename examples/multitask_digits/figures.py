# SPDX-License-Identifier: Apache-2.0
"""Figures: accuracy against bytes, how tasks mix skills, results of a new row, and the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .data import Data
from .late import Way
from .report import Row
from .tasks import Task
from .training import Adapted, accuracy

# From Okabe and Ito's palette, told apart with any kind of color vision.
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"
COLORS = {"none": GRAY, "shared": BLUE, "routed": ORANGE, "per task": GREEN}
MEANING = {
    "shared": "one adapter, task unknown",
    "routed": "one adapter, routed by task",
    "per task": "an adapter a task",
}
INK, FAINT = "#222222", "#DDDDDD"
STYLE = {
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRAY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.dpi": 150,
}


def accuracy_against_bytes(rows: Sequence[Row], file: Path) -> None:
    """Mean accuracy over the tasks against bytes on disk, named in a column at the right."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
        trained = sorted((row for row in rows if row.bytes), key=lambda row: row.mean)
        base = next(row for row in rows if not row.bytes)
        low, high = trained[0].mean, trained[-1].mean
        margin = 0.3 * max(high - low, 0.05)
        low, high = low - margin, high + margin
        right = 1.08 * max(row.bytes for row in trained) / 1024
        for place, row in zip(
            spread([row.mean for row in trained], 0.085 * (high - low)), trained, strict=True
        ):
            color = COLORS[row.mode]
            axes.plot(
                [row.bytes / 1024, right],
                [row.mean, place],
                color=color,
                linewidth=0.8,
                alpha=0.6,
                clip_on=False,
            )
            axes.scatter(
                row.bytes / 1024,
                row.mean,
                s=110,
                color=color,
                zorder=3,
                edgecolor="white",
                linewidth=1,
            )
            text = f" {row.label}: {100 * row.mean:.1f} %, {row.bytes / 1024:,.0f} KB"
            axes.text(right, place, text, color=color, va="center", fontweight="bold", fontsize=10)
        axes.set(
            xlim=(0, right),
            ylim=(low, high),
            xlabel="bytes on disk for all eight tasks, KB",
            ylabel="mean accuracy, per cent",
        )
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        if base.mean < low:
            note = f"the frozen base, 0 KB: {100 * base.mean:.1f} %, far below"
            axes.annotate(
                note,
                (0, 0),
                xytext=(8, 8),
                xycoords="axes fraction",
                textcoords="offset points",
                color="#555555",
            )
        else:
            axes.scatter(0, base.mean, s=110, color=GRAY, clip_on=False)
            axes.annotate(
                base.label,
                (0, base.mean),
                xytext=(8, 4),
                textcoords="offset points",
                color="#555555",
            )
        for mode, meaning in MEANING.items():
            axes.scatter([], [], s=70, color=COLORS[mode], label=meaning)
        figure.legend(frameon=False, loc="outside lower center", ncols=3, handletextpad=0.2)
        axes.set_title(
            "Eight tasks: accuracy against what has to be stored", loc="left", fontsize=13, pad=12
        )
        save(figure, file)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move ascending ``places`` apart until neighbours are ``gap`` away, as little as a few sweeps
    need.
    """
    moved = list(places)
    for _ in range(200):
        for i in range(len(moved) - 1):
            lack = gap - (moved[i + 1] - moved[i])
            if lack > 0:
                moved[i] -= lack / 2
                moved[i + 1] += lack / 2
    return moved


def router(
    weights: dict[str, Tensor], tasks: Sequence[str], n_joint: int, label: str, file: Path
) -> None:
    """Draw task x skill weights in per cent. If a model has many layers, draw those where the tasks
    differ most.

    Args:
        weights: ``[n_tasks, n_splits, n_skills]`` by layer. With one split a panel is a layer; with
            several, a line of panels is a layer and a panel one of its heads.
        tasks: The tasks' names, those that came later last.
        n_joint: How many were trained jointly; a gap sets the others off.
        label: The method's name.
        file: Where to write.
    """
    n_splits, n_skills = next(iter(weights.values())).shape[1:]
    columns, most = (6, 12) if n_splits == 1 else (n_splits, 3)
    chosen = sorted(weights, key=lambda name: -weights[name].var(0).sum().item())[:most]
    chosen.sort(key=list(weights).index)
    panels = [(name, head) for name in chosen for head in range(n_splits)]
    lines = -(-len(panels) // columns)
    size = (0.42 * n_skills + 0.35, 0.27 * len(tasks) + 0.75)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            lines,
            columns,
            squeeze=False,
            sharey=True,
            figsize=(size[0] * columns + 1.6, size[1] * lines + 1.1),
            layout="constrained",
        )
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (name, head) in zip(grid.flat, panels, strict=False):
            image = panel(axes, weights[name][:, head], tasks, n_joint)
            axes.set_title(
                short(name) if n_splits == 1 else f"{short(name)}\nhead {head + 1} of {n_splits}",
                fontsize=10,
            )
        which = (
            ""
            if len(chosen) == len(weights)
            else f"\nthe {len(chosen)} layers where tasks differ most"
        )
        figure.suptitle(
            f"{label}: how each task mixes the skills, per cent{which}",
            x=0.01,
            ha="left",
            fontsize=13,
        )
        figure.supxlabel("skill", fontsize=11)
        bar = figure.colorbar(image, ax=grid, shrink=0.7, pad=0.01, aspect=30)
        bar.set_label(f"weight (equal shares: {1 / n_skills:.2f})")
        bar.outline.set_visible(False)
        save(figure, file)


def panel(
    axes: Axes, weights: Tensor, tasks: Sequence[str], n_joint: int
) -> matplotlib.image.AxesImage:
    """Draw weights ``[n_tasks, n_skills]``, a row per task, with a gap before the late ones. Return
    the image.
    """
    gap = torch.full((1, weights.shape[1]), float("nan"))
    rows = (
        torch.cat([weights[:n_joint], gap, weights[n_joint:]])
        if len(weights) > n_joint
        else weights
    )
    image = axes.imshow(rows, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for row, line in enumerate(rows.tolist()):
        for column, value in enumerate(line):
            if value == value:  # not the gap
                color = "white" if value > 0.55 else INK
                axes.text(
                    column,
                    row,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color=color,
                )
    names = [*tasks[:n_joint], "", *tasks[n_joint:]] if len(weights) > n_joint else list(tasks)
    axes.set_yticks(range(len(rows)), names)
    axes.set_xticks(
        range(weights.shape[1]), [str(1 + column) for column in range(weights.shape[1])]
    )
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    return image


def short(name: str) -> str:
    """Shorten ``vit.layers.0.attention.q_proj`` to ``block 1, q_proj``."""
    parts = name.split(".")
    numbers = [str(int(part) + 1) for part in parts if part.isdigit()]
    return f"block {'.'.join(numbers)}, {parts[-1]}" if numbers else parts[-1]


def late_tasks(ways: Sequence[Way], tasks: Sequence[Task], shots: int, file: Path) -> None:
    """Draw a panel per late task, with a bar for every way to learn it."""
    labels = [f"{way.group}: {way.label}" if way.group else way.label for way in ways]
    labels = [
        f"{label}  ({way.trainable:,} trained)" if way.trainable else label
        for label, way in zip(labels, ways, strict=True)
    ]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            1,
            len(tasks),
            sharey=True,
            squeeze=False,
            figsize=(11, 0.42 * len(ways) + 1.5),
            layout="constrained",
        )
        for axes, task in zip(grid[0], tasks, strict=True):
            for row, way in enumerate(ways):
                score = 100 * way.accuracies[task.key]
                new_row = way.group and way.trainable
                axes.barh(
                    row,
                    score,
                    color=ORANGE if new_row else GREEN if way.trainable else "#BDBDBD",
                    height=0.72,
                )
                axes.text(
                    score + 1,
                    row,
                    f"{score:.0f}",
                    va="center",
                    fontweight="bold" if way.trainable else "normal",
                )
            axes.set_title(task.label, loc="left", fontsize=11)
            axes.set(xlim=(0, 100), xlabel="accuracy, per cent")
            axes.set_yticks(range(len(ways)), labels)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        grid[0][0].invert_yaxis()
        title = (
            f"Later tasks, from {shots} examples: routing row trained (orange), "
            "new adapter (green), no training (gray)"
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        save(figure, file)


def gallery(
    tasks: Sequence[Task], data: Data, frozen: dict[str, Tensor], adapted: Adapted, file: Path
) -> None:
    """Draw a held-out picture of each class in every task's view, with the answers of the base and
    of an adapted model.
    """
    labels = data.test.labels.unique()[:10]
    places = [int((data.test.labels == label).nonzero()[0]) for label in labels]
    one_line = all(len(name) < 3 for name in data.classes.values())
    spots = [(0.27, -0.05), (0.73, -0.05)] if one_line else [(0.5, -0.05), (0.5, -0.22)]
    cell = (0.85, 1.02) if one_line else (1.1, 1.4)
    size = (max(7.5, cell[0] * len(places) + 2.4), cell[1] * len(tasks) + 1.2)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(tasks), len(places), squeeze=False, figsize=size, layout="constrained"
        )
        for line, task in zip(grid, tasks, strict=True):
            pixels = task(data.test.pixels[places]).permute(0, 2, 3, 1)
            for axes, place, image in zip(line, places, pixels, strict=True):
                axes.imshow(image, cmap="gray", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set(visible=True, color=FAINT)
                for spot, logits in zip(spots, (frozen, adapted.logits), strict=True):
                    answer(
                        axes,
                        spot,
                        int(logits[task.key][place].argmax()),
                        int(data.test.labels[place]),
                        data,
                    )
            before, after = (
                100 * accuracy(logits[task.key], data.test) for logits in (frozen, adapted.logits)
            )
            name = f"{task.label}\n{before:.0f} % → {after:.0f} %"
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
        title = (
            f"Under each picture: the frozen base's answer, then {adapted.method.label}'s\n"
            "(bold blue: right, orange: wrong)"
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        save(figure, file)


def answer(axes: Axes, spot: tuple[float, float], guess: int, truth: int, data: Data) -> None:
    """Write a class's name under a picture, so that right and wrong differ in color and weight."""
    color, weight = (BLUE, "bold") if guess == truth else (ORANGE, "normal")
    text = data.classes.get(guess, str(guess))[:14]
    axes.text(
        *spot,
        text,
        transform=axes.transAxes,
        ha="center",
        va="top",
        color=color,
        fontweight=weight,
    )


def save(figure: Figure, file: Path) -> None:
    """Save a figure and close it."""
    figure.savefig(file)
    plt.close(figure)
