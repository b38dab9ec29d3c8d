# SPDX-License-Identifier: Apache-2.0
"""Figures of a vector bank's usage, drawn from arrays. Needs matplotlib, imported when drawing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Two colors of Okabe and Ito's palette, distinct for all kinds of color vision.
_COLORS = {"A": "#0072B2", "B": "#D55E00"}
_STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150}


def plot_bank_usage(
    folder: Path, factors: Sequence[tuple[str, str]], counts: Tensor, weights: Tensor, summary: str
) -> list[Path]:
    """Write "bank_map.png", "bank_histogram.png" and "bank_layers.png" into a folder.

    `factors` has the layer's path and "A" or "B" for each row of `counts` (number of tiles that
    select each vector, `[factors, num_vectors]`) and `weights` (their total weight).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.style import context

    height = len(factors)
    files = [folder / f"bank_{name}.png" for name in ("map", "histogram", "layers")]
    sizes = (10.0, 1.8 + 0.17 * height), (9.0, 4.2), (9.0, 1.6 + 0.3 * height / 2)
    with context(_STYLE):
        figures = [Figure(figsize=size, layout="constrained") for size in sizes]
        _draw_map(figures[0], factors, weights)
        _draw_histogram(figures[1], factors, counts, summary)
        _draw_layers(figures[2], factors, counts)
        for figure, file in zip(figures, files, strict=True):
            FigureCanvasAgg(figure)
            figure.savefig(file)
    return files


def _draw_map(figure: Figure, factors: Sequence[tuple[str, str]], weights: Tensor) -> None:
    """Draw a row for each factor and a column for each vector: its share of the factor's weight."""
    axes = figure.subplots()
    shares = weights / weights.sum(1, keepdim=True)
    image = axes.imshow(shares.numpy(), aspect="auto", cmap="cividis", interpolation="nearest")
    axes.set_yticks(range(len(factors)), [" ".join(factor) for factor in factors], fontsize=7)
    axes.set(xlabel="vector of the bank", title="vectors that each factor uses")
    figure.colorbar(image, ax=axes, label="share of the factor's weight")


def _draw_histogram(
    figure: Figure, factors: Sequence[tuple[str, str]], counts: Tensor, summary: str
) -> None:
    """Draw a bar for each vector, most used first, split into the uses in `A` and in `B`."""
    axes = figure.subplots()
    num_vectors = counts.shape[1]
    order = counts.sum(0).argsort(descending=True, stable=True)
    bottom = torch.zeros(num_vectors)
    for factor, color in _COLORS.items():
        heights = counts[[name == factor for _, name in factors]].sum(0)[order].float()
        axes.bar(
            range(num_vectors),
            heights.numpy(),
            bottom=bottom.numpy(),
            width=1.0,
            color=color,
            label=f"in {factor}",
        )
        bottom = bottom + heights
    axes.set(
        xlabel="vectors, most used first",
        ylabel="tiles that select it",
        xlim=(-0.5, num_vectors - 0.5),
        title=summary,
    )
    axes.legend(frameon=False)


def _draw_layers(figure: Figure, factors: Sequence[tuple[str, str]], counts: Tensor) -> None:
    """Draw two bars for each layer: the number of different vectors that `A` and `B` use."""
    axes = figure.subplots()
    layers = list(dict.fromkeys(layer for layer, _ in factors))
    used = (counts > 0).sum(1).tolist()
    for offset, (factor, color) in zip((-0.2, 0.2), _COLORS.items(), strict=True):
        rows = [row for row, (_, name) in enumerate(factors) if name == factor]
        axes.barh(
            [layers.index(factors[row][0]) + offset for row in rows],
            [used[row] for row in rows],
            height=0.38,
            color=color,
            label=factor,
        )
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.invert_yaxis()
    axes.set(
        xlabel=f"different vectors used, of {counts.shape[1]}", title="usage by layer and factor"
    )
    figure.legend(frameon=False, loc="outside right upper", title="factor")
