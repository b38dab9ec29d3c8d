# SPDX-License-Identifier: Apache-2.0
"""Results as tables to read and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .late import Way
from .tasks import Task

SERVED = {
    "none": "-",
    "shared": "1 adapter, task unknown",
    "routed": "1 adapter, routed",
    "per task": "{n} adapters, switched",
}


@dataclass
class Row:
    """One method's measurements."""

    key: str
    label: str
    mode: str
    accuracies: dict[str, float]
    trainable: int = 0
    bytes: int = 0
    seconds: float = 0.0

    @property
    def mean(self) -> float:
        """Mean accuracy over the tasks."""
        return sum(self.accuracies.values()) / len(self.accuracies)


def lay_out(head: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table with aligned columns. The first ``left`` columns are flush left, the
    others right.
    """
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def cells(line: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    return "\n".join(map(cells, [head, rule, *lines]))


def table(rows: Sequence[Row], tasks: Sequence[Task]) -> str:
    """Return a table of accuracies in per cent, with parameters, bytes and time."""
    head = [
        "method",
        "tasks served by",
        *(task.label for task in tasks),
        "mean",
        "trainable",
        "bytes",
        "seconds",
    ]
    lines = []
    for row in rows:
        scores = [f"{100 * row.accuracies[task.key]:.0f}" for task in tasks]
        cost = [f"{row.trainable:,}", f"{row.bytes:,}", f"{row.seconds:.1f}"]
        served = SERVED[row.mode].format(n=len(tasks))
        lines.append([row.label, served, *scores, f"{100 * row.mean:.1f}", *cost])
    return lay_out(head, lines, left=2)


def conclusion(rows: Sequence[Row]) -> str:
    """Return the order of the methods by mean accuracy, and their differences."""
    by_key = {row.key: row for row in rows}
    shared = by_key["shared"]
    others = sorted(
        (row for row in rows if row.key not in ("base", "shared")), key=lambda row: -row.mean
    )
    text = [
        "Mean accuracy, best first: "
        f"{', '.join(f'{row.label} {100 * row.mean:.1f} %' for row in others)}."
    ]
    gaps = ", ".join(f"{row.label} {100 * (row.mean - shared.mean):+.1f}" for row in others)
    text.append(f"Against one shared adapter ({100 * shared.mean:.1f} %), in points: {gaps}.")
    kept = by_key["vblora"]
    text.append(
        f"VB-LoRA is saved in its top-k form ({kept.bytes:,} bytes), which infers and merges; to "
        "train on, "
        f"its full logits would take about {4 * kept.trainable:,} bytes."
    )
    return "\n".join(text)


def late_table(ways: Sequence[Way], tasks: Sequence[Task]) -> str:
    """Accuracies on the tasks that came later, in per cent."""
    head = ["adapter", "way to meet the task", *(task.label for task in tasks), "trained"]
    lines = [
        [
            way.group or "-",
            way.label,
            *(f"{100 * way.accuracies[task.key]:.1f}" for task in tasks),
            f"{way.trainable:,}",
        ]
        for way in ways
    ]
    return lay_out(head, lines, left=2)


def write(
    folder: Path, text: str, rows: Sequence[Row], ways: Sequence[Way], settings: dict
) -> None:
    """Write ``results.md`` and ``results.json``."""
    (folder / "results.md").write_text(text + "\n", encoding="utf-8")
    content = {
        "settings": settings,
        "methods": [{**asdict(row), "mean": row.mean} for row in rows],
        "late_tasks": [asdict(way) for way in ways],
    }
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
