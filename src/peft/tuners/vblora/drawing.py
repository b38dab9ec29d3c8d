# SPDX-License-Identifier: Apache-2.0
"""Pictures of how a bank is used. The only file here that needs matplotlib, which it imports when
it draws.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .usage import BankUsage

# From Okabe and Ito's palette, told apart with any kind of colour vision.
_COLOURS = {"A": "#0072B2", "B": "#D55E00"}
_STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150}


def draw(usage: BankUsage, folder: Path) -> list[Path]:
    """All pictures of a bank's usage; the files' paths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.style import context

    files = []
    for name, paint, size in (
        ("bank_map.png", _paint_map, (10.0, 1.8 + 0.17 * len(usage.uses))),
        ("bank_histogram.png", _paint_histogram, (9.0, 4.2)),
        ("bank_layers.png", _paint_layers, (9.0, 1.6 + 0.3 * len(usage.uses) / 2)),
    ):
        with context(_STYLE):
            figure = Figure(figsize=size, layout="constrained")
            FigureCanvasAgg(figure)
            paint(usage, figure)
            figure.savefig(folder / name)
        files.append(folder / name)
    return files


def _paint_map(usage: BankUsage, figure: Any) -> None:
    """Vectors across, factors of layers down: the share of a factor's weight that each vector has."""
    axes = figure.subplots()
    shares = torch.stack([use.weights / use.weights.sum() for use in usage.uses])
    image = axes.imshow(shares.numpy(), aspect="auto", cmap="cividis", interpolation="nearest")
    axes.set_yticks(
        range(len(usage.uses)), [f"{use.layer} {use.factor}" for use in usage.uses], fontsize=7
    )
    axes.set(xlabel="vector of the bank", title="which vectors serve which layers")
    figure.colorbar(image, ax=axes, label="share of the factor's weight")


def _paint_histogram(usage: BankUsage, figure: Any) -> None:
    """Vectors in the order of their use, with the parts of both factors."""
    axes = figure.subplots()
    order = usage.counts().argsort(descending=True, stable=True)
    bottom = torch.zeros(usage.num_vectors)
    for factor, colour in _COLOURS.items():
        heights = usage.counts(factor)[order].float()
        axes.bar(
            range(usage.num_vectors),
            heights.numpy(),
            bottom=bottom.numpy(),
            width=1.0,
            color=colour,
            label=f"in {factor}",
        )
        bottom = bottom + heights
    summary = usage.summary()
    axes.set(
        xlabel="vectors, the most used first",
        ylabel="positions that chose it",
        xlim=(-0.5, usage.num_vectors - 0.5),
    )
    axes.set_title(
        f"{summary['used']} of {usage.num_vectors} vectors used, effectively "
        f"{summary['effective']:.0f}"
    )
    axes.legend(frameon=False)


def _paint_layers(usage: BankUsage, figure: Any) -> None:
    """How many different vectors each factor of each layer uses."""
    axes = figure.subplots()
    layers = list(dict.fromkeys(use.layer for use in usage.uses))
    for offset, (factor, colour) in zip((-0.2, 0.2), _COLOURS.items(), strict=True):
        own = [use for use in usage.uses if use.factor == factor]
        places = [layers.index(use.layer) + offset for use in own]
        axes.barh(
            places,
            [int((use.counts > 0).sum()) for use in own],
            height=0.38,
            color=colour,
            label=factor,
        )
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.invert_yaxis()
    axes.set(
        xlabel=f"different vectors used, of {usage.num_vectors}", title="usage by layer and factor"
    )
    figure.legend(frameon=False, loc="outside right upper", title="factor")
