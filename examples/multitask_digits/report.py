# SPDX-License-Identifier: Apache-2.0
"""What was measured, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .ninth import Ninth
from .tasks import Task


@dataclass
class Row:
    """One method's measurements."""

    key: str
    label: str
    mode: str
    accuracies: dict[str, float]
    trainable: int
    bytes: int
    seconds: float

    @property
    def mean(self) -> float:
        """Mean accuracy over the tasks."""
        return sum(self.accuracies.values()) / len(self.accuracies)


def table(rows: Sequence[Row], tasks: Sequence[Task]) -> str:
    """A markdown table, accuracies in per cent."""
    head = ["method", *(task.label for task in tasks), "mean", "trainable", "on disk", "seconds"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        scores = [f"{100 * row.accuracies[task.key]:.1f}" for task in tasks]
        size = f"{row.bytes / 1024:,.0f} KB" if row.bytes else "-"
        lines.append([row.label, *scores, f"{100 * row.mean:.1f}", f"{row.trainable:,}", size, f"{row.seconds:.0f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def ninth_table(ninth: Ninth, task: Task) -> str:
    """What the ninth task's few examples were good for."""
    lines = [f"A ninth task ({task.label}), {ninth.shots} examples; its routing row has {ninth.row_parameters:,} parameters:"]
    lines += [f"  {100 * score:5.1f} %  {name}" for name, score in ninth.accuracies.items()]
    return "\n".join(lines)


def conclusion(rows: Sequence[Row]) -> str:
    """One sentence on who won, whatever the outcome."""
    order = sorted(rows, key=lambda row: -row.mean)
    poly = next(row for row in rows if row.key == "poly")
    shared = next(row for row in rows if row.key == "shared")
    verdict = "ahead of" if poly.mean > shared.mean else "behind" if poly.mean < shared.mean else "level with"
    return (
        f"Best mean: {order[0].label} ({100 * order[0].mean:.1f} %). Poly is {verdict} the adapter shared by all tasks "
        f"({100 * poly.mean:.1f} % to {100 * shared.mean:.1f} %)."
    )


def write(output: Path, rows: Sequence[Row], tasks: Sequence[Task], ninth: Ninth, ninth_task: Task) -> None:
    """Write `results.md` and `results.json`."""
    text = f"{table(rows, tasks)}\n\n{conclusion(rows)}\n\n{ninth_table(ninth, ninth_task)}\n"
    (output / "results.md").write_text(text, encoding="utf-8")
    content = {"methods": [{**asdict(row), "mean": row.mean} for row in rows], "ninth": asdict(ninth)}
    (output / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
