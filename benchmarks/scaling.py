# SPDX-License-Identifier: Apache-2.0
"""Growth of a step's time with the number of tasks, of loaded adapters and of vectors in a bank,
for this package alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import report

SIZES = {
    "tasks": (10, 100, 1_000, 10_000),
    "adapters": (1, 10, 50, 200),
    "bank": (64, 256, 1_024, 4_096),
}
AXES = {"tasks": "tasks", "adapters": "adapters loaded", "bank": "vectors in the bank"}
# Which methods a number can grow for.
METHODS = {"tasks": ("poly",), "adapters": ("lokr", "vblora", "poly"), "bank": ("vblora",)}
LAYERS, BATCH = 4, 32


def measure(
    width: int, rounds: int, sizes: dict[str, tuple[int, ...]] | None = None
) -> list[dict[str, Any]]:
    """Rows of results: for each size the median time of a training step and of one without
    gradients, in microseconds.

    The models of all sizes take turns, so that what else the machine does meets them alike.
    """
    rows = []
    for axis, values in (sizes or SIZES).items():
        for method in METHODS[axis]:
            steps = {
                (mode, size): _step(axis, method, size, width, mode)
                for size in values
                for mode in ("train", "decode")
            }
            times: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
            for _ in range(rounds + 1):
                for key, step in steps.items():
                    start = time.perf_counter()
                    step()
                    times[key].append(1e6 * (time.perf_counter() - start))
            for (mode, size), found in times.items():
                low, middle, high = statistics.quantiles(found[1:], n=4, method="inclusive")
                rows.append(
                    {
                        "axis": axis,
                        "method": method,
                        "mode": mode,
                        "size": size,
                        "us": middle,
                        "low": low,
                        "high": high,
                    }
                )
    return rows


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table for each number that grows: milliseconds of a step, with quartiles."""
    result = [
        f"Milliseconds of a step of {LAYERS} linear layers, {BATCH} samples: median (quartiles).",
        "",
    ]
    for axis in dict.fromkeys(row["axis"] for row in rows):
        own = [row for row in rows if row["axis"] == axis]
        sizes = dict.fromkeys(row["size"] for row in own)
        head = f"| {AXES[axis]} | {' | '.join(f'{size:,}' for size in sizes)} |"
        curves = dict.fromkeys((row["method"], row["mode"]) for row in own)
        table = []
        for method, mode in curves:
            times = [row for row in own if (row["method"], row["mode"]) == (method, mode)]
            table.append(f"| {method}, {mode} | {' | '.join(map(_cell, times))} |")
        result += [*report.table(head, table), ""]
    return result


def _cell(row: dict[str, Any]) -> str:
    low, middle, high = (f"{row[name] / 1e3:.1f}" for name in ("low", "us", "high"))
    return f"{middle} ({low}-{high})"


def _step(axis: str, method: str, size: int, width: int, mode: str) -> Callable[[], None]:
    """Return a step of a small model with adapters of the given size."""
    import peft

    own = {"tasks": 10, "adapters": 1, "bank": 256, axis: size}
    config = {
        "lokr": lambda: peft.LoKrConfig(r=8, alpha=8, target_modules="[0-9]+"),
        "vblora": lambda: peft.VBLoRAConfig(
            r=4, num_vectors=own["bank"], vector_length=width // 4, target_modules="[0-9]+"
        ),
        "poly": lambda: peft.PolyConfig(
            r=8, n_tasks=own["tasks"], n_skills=4, target_modules="[0-9]+"
        ),
    }[method]
    model = peft.get_peft_model(
        nn.Sequential(*[nn.Linear(width, width) for _ in range(LAYERS)]), config(), "0"
    )
    for i in range(1, own["adapters"]):
        model.add_adapter(str(i), config())
    model.train(mode == "train")
    x = torch.randn(BATCH, width)
    call = {"task_ids": torch.arange(BATCH) % own["tasks"]} if method == "poly" else {}
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        with torch.set_grad_enabled(mode == "train"):
            y = model(x, **call)
        if mode == "train":
            y.square().mean().backward()
            for parameter in trained:
                parameter.grad = None

    return step


def plot(path: Any, rows: list[dict[str, Any]], where: str) -> None:
    """Draw a figure with one panel for each axis."""
    import matplotlib.pyplot as plt

    axes_of = list(dict.fromkeys(row["axis"] for row in rows))
    figure, axes = plt.subplots(
        1, len(axes_of), figsize=(4.2 * len(axes_of), 3.4), squeeze=False, layout="constrained"
    )
    for panel, axis in zip(axes[0], axes_of, strict=True):
        curves = dict.fromkeys((row["method"], row["mode"]) for row in rows if row["axis"] == axis)
        for method, mode in curves:
            own = [
                row
                for row in rows
                if (row["axis"], row["method"], row["mode"]) == (axis, method, mode)
            ]
            spread = [
                [row["us"] - row["low"] for row in own],
                [row["high"] - row["us"] for row in own],
            ]
            style = "-" if mode == "train" else "--"
            panel.errorbar(
                [row["size"] for row in own], [row["us"] / 1e3 for row in own],
                [[e / 1e3 for e in side] for side in spread],
                linestyle=style, marker="o", markersize=3, capsize=2, label=f"{method}, {mode}",
            )  # fmt: skip
        panel.set_xscale("log")
        panel.set_ylim(bottom=0)
        panel.set_xlabel(AXES[axis])
        panel.legend(fontsize=7)
    axes[0][0].set_ylabel("milliseconds a step")
    figure.suptitle(where, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
