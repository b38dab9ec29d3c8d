# SPDX-License-Identifier: Apache-2.0
"""The study's table and figures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

# From Okabe and Ito's palette, told apart with any kind of color vision; shapes differ too.
LOOKS = {
    "LoRA": ("#0072B2", "s", "-"),
    "LoKr": ("#E69F00", "D", "-"),
    "VB-LoRA, own bank, paper": ("#8A8A8A", "o", ":"),
    "VB-LoRA, own bank, one rate": ("#56B4E9", "o", "--"),
    "VB-LoRA, own bank, two rates": ("#009E73", "o", "-"),
    "VB-LoRA, shared trained bank": ("#D55E00", "^", "-"),
    "VB-LoRA, shared random bank": ("#CC79A7", "v", "--"),
}


class Point(NamedTuple):
    """Summary of an arm's runs: mean and deviation of the accuracy in per cent over the seeds."""

    family: str
    size: int
    accuracy: float
    deviation: float
    tensor_bytes: int
    file_bytes: int
    trainable: int
    seconds: float


def points(runs: Iterable[dict[str, Any]]) -> list[Point]:
    """Return a point for each arm. A seed's accuracy is the mean over its users."""
    by_arm: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in runs:
        by_arm.setdefault((run["family"], run["size"]), []).append(run)
    result = []
    for (family, size), own in by_arm.items():
        seeds = {run["seed"] for run in own}
        scores = [
            100 * mean(run["accuracy"] for run in own if run["seed"] == seed)
            for seed in sorted(seeds)
        ]
        first = own[0]
        sizes = first["tensor_bytes"], first["file_bytes"], first["trainable"]
        spread = stdev(scores) if len(scores) > 1 else 0.0
        result.append(
            Point(family, size, mean(scores), spread, *sizes, mean(run["seconds"] for run in own))
        )
    return result


def table(results: dict[str, Any]) -> str:
    """Return the points as a Markdown table."""
    lines = [
        "| method | bank or rank | accuracy, % | ± | bytes of tensors | bytes on disk | trained | "
        "CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    frozen = 100 * mean(run["accuracy"] for run in results["frozen"])
    lines.append(f"| frozen base | | {frozen:.1f} | | 0 | 0 | 0 | |")
    for p in points(results["runs"]):
        lines.append(
            f"| {p.family} | {p.size} | {p.accuracy:.1f} | {p.deviation:.1f} | {p.tensor_bytes:,} "
            f"| {p.file_bytes:,} | "
            f"{p.trainable:,} | {p.seconds:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], folder: Path) -> None:
    """Draw accuracy against bytes, and against the size of the bank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = points(results["runs"])
    style = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.dpi": 150,
    }
    best = max(p.accuracy for p in found)
    with plt.rc_context(style):
        for name, x, label in (
            ("accuracy_against_bytes.png", "tensor_bytes", "stored bytes for each user (tensors)"),
            ("accuracy_against_bank.png", "size", "vectors in the bank"),
        ):
            figure, axes = plt.subplots(figsize=(9, 5.4), layout="constrained")
            low = []
            for family, (color, marker, line) in LOOKS.items():
                own = sorted((p for p in found if p.family == family), key=lambda p: getattr(p, x))
                if not own or (x == "size" and not family.startswith("VB")):
                    continue
                if max(p.accuracy for p in own) < best - 40:  # would squeeze the others into a line
                    low.append(
                        f"{family}: {min(p.accuracy for p in own):.0f} to "
                        f"{max(p.accuracy for p in own):.0f}"
                    )
                    continue
                values, heights = [getattr(p, x) for p in own], [p.accuracy for p in own]
                options = {
                    "color": color,
                    "marker": marker,
                    "linestyle": line,
                    "label": family,
                    "capsize": 2,
                }
                axes.errorbar(values, heights, [p.deviation for p in own], markersize=7, **options)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(_in_kilobytes if x == "tensor_bytes" else _as_number)
            axes.set(xlabel=label, ylabel="accuracy on held-out pictures, per cent")
            axes.grid(color="#DDDDDD", linewidth=0.6)
            figure.legend(frameon=False, fontsize=9, loc="outside upper center", ncols=3)
            if low:
                axes.text(
                    0.99,
                    0.02,
                    "below: " + "; ".join(low),
                    transform=axes.transAxes,
                    ha="right",
                    fontsize=9,
                    color="#666666",
                )
            figure.savefig(folder / name)
            plt.close(figure)


def _in_kilobytes(value: float, _: int) -> str:
    return f"{value / 1024:g} KB"


def _as_number(value: float, _: int) -> str:
    return f"{value:g}"
