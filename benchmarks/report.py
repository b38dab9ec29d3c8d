# SPDX-License-Identifier: Apache-2.0
"""Results as a table, a file of numbers and a figure."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# What this package wants to reach: the adapted step's time over the frozen one's.
TARGETS = {
    ("lokr", "train"): 1.05,
    ("lokr", "prefill"): 1.05,
    ("lokr", "decode"): 1.08,
    ("vblora", "train"): 1.05,
    ("vblora", "prefill"): 1.04,
    ("vblora", "decode"): 1.08,
    **{
        (method, mode): wanted
        for method in ("poly", "mhr")
        for mode, wanted in (("train", 1.06), ("prefill", 1.06), ("decode", 1.10))
    },
}
_HEAD = "| method | mode | width | library | time / frozen | quartiles | extra MB | wanted |"


def line(row: Row) -> str:
    """Return a row of the table."""
    wanted = TARGETS.get((row["method"], row["mode"])) if row["library"] == "ours" else None
    verdict = (
        "" if wanted is None else f"{wanted:.2f}{'' if row['ratio'] <= wanted else ' (missed)'}"
    )
    return (
        f"| {row['method']} | {row['mode']} | {row['width']} | {row['library']} | "
        f"{row['ratio']:.3f} | "
        f"{row['low']:.3f}-{row['high']:.3f} | {row['extra_MB']:.1f} | {verdict} |"
    )


def verdict(rows: list[Row]) -> str:
    """List rows slower than a peer, Hugging Face PEFT's plain LoRA, or this package's target."""
    behind = []
    for row in (row for row in rows if row["library"] == "ours"):
        same = [other for other in rows if _work(other) == _work(row)]
        where = f"{row['method']} {row['mode']} at width {row['width']}"
        for other in same:
            named_alike = other["method"] == row["method"] and other["library"] != "ours"
            if (named_alike or (other["library"], other["method"]) == ("peft", "lora")) and other[
                "ratio"
            ] < row["low"]:
                behind.append(
                    f"{where}: {row['ratio']:.3f}, {other['library']}'s {other['method']} "
                    f"{other['ratio']:.3f}"
                )
        wanted = TARGETS.get((row["method"], row["mode"]))
        if wanted is not None and row["ratio"] > wanted:
            behind.append(f"{where}: {row['ratio']:.3f}, wanted {wanted:.2f}")
    return "Behind nowhere." if not behind else "Behind:\n- " + "\n- ".join(behind)


def _work(row: Row) -> tuple:
    return tuple(row[name] for name in ("mode", "width", "layers", "dtype", "device"))


def machine(threads: int) -> str:
    """Return a description of the machine."""
    import torch

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [
            text.partition(":")[2].strip()
            for text in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in text
        ]
        name = models[0] if models else name
    accelerator = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    busy = (
        f", load {os.getloadavg()[1]:.1f} in the last five minutes"
        if hasattr(os, "getloadavg")
        else ""
    )
    cores = f"{os.cpu_count()} cores ({threads} threads used{busy})"
    return f"{name}, {cores}{accelerator}, torch {torch.__version__}"


def write(folder: Path, rows: list[Row], threads: int, add: bool = False) -> list[Row]:
    """Write `results.json`, `table.md` and, where matplotlib is installed, `ratios.png`; return all
    rows that are in them.

    Args:
        folder: Where to.
        rows: What was measured.
        threads: How many it was measured with.
        add: Keep the rows of other work that are there.
    """
    known = folder / "results.json"
    if add and known.exists():
        measured = {(*_work(row), row["library"], row["method"]) for row in rows}
        before = json.loads(known.read_text())["rows"]
        rows = [
            row for row in before if (*_work(row), row["library"], row["method"]) not in measured
        ] + rows
    write_table(
        folder, "table", _HEAD, [*map(line, rows), "", verdict(rows)], rows, threads, "results"
    )
    draw(_plot, folder / "ratios.png", rows, threads)
    return rows


def write_table(
    folder: Path,
    name: str,
    head: str,
    lines: list[str],
    rows: list[Row],
    threads: int,
    numbers: str | None = None,
) -> None:
    """Write `<name>.md`, a table under the machine's description, and `<numbers>.json`, all that
    was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = machine(threads)
    (folder / f"{numbers or name}.json").write_text(
        json.dumps({"machine": where, "rows": rows}, indent=1)
    )
    table = [where, "", head, "|---" * (head.count("|") - 1) + "|", *lines, ""]
    (folder / f"{name}.md").write_text("\n".join(table))
    print("\n".join(table) if name != "table" else "", end="")


def draw(
    plot: Callable[[Path, list[Row], str], None], path: Path, rows: list[Row], threads: int
) -> None:
    """Draw a figure where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    plot(path, rows, machine(threads))


def _plot(path: Path, rows: list[Row], where: str) -> None:
    import matplotlib.pyplot as plt

    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure, axes = plt.subplots(
        1, len(modes), figsize=(4.5 * len(modes), 3.6), squeeze=False, layout="constrained"
    )
    colors = {"ours": "#1b6ca8", "peft": "#d9822b", "lycoris": "#7a9e3a"}
    for axis, mode in zip(axes[0], modes, strict=True):
        shown = [row for row in rows if row["mode"] == mode]
        groups = list(dict.fromkeys((row["method"], row["width"]) for row in shown))
        for row in shown:
            libraries = list(colors)
            place = (
                groups.index((row["method"], row["width"]))
                + (libraries.index(row["library"]) - 1) * 0.27
            )
            spread = [[row["ratio"] - row["low"]], [row["high"] - row["ratio"]]]
            axis.bar(
                place,
                row["ratio"] - 1,
                0.25,
                bottom=1,
                color=colors[row["library"]],
                yerr=spread,
                capsize=2,
            )
        axis.set_xticks(
            range(len(groups)), [f"{method}\n{width}" for method, width in groups], fontsize=7
        )
        axis.set_title(mode)
        axis.axhline(1, color="black", linewidth=0.8)
    axes[0][0].set_ylabel("time over the frozen model's")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    axes[0][-1].legend(handles, list(colors), fontsize=8)
    figure.suptitle(where, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
