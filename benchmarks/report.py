# SPDX-License-Identifier: Apache-2.0
"""Results as a table, a file of numbers and a figure."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .methods import METHODS

Row = dict[str, Any]
Cell = Callable[[Row], str]
MODES = ("train", "prefill", "decode")
# What this package wants to reach, for MODES: the adapted step's time over the frozen one's.
# Decoding with full matrices has to be ahead of LyCORIS.
_POLY, _LOKR_FULL = (1.06, 1.06, 1.12), {4: (1.48, 1.28), 8: (1.27, 1.15), 16: (1.17, 1.09)}
TARGETS = {
    "cpu": {"lokr": (1.05, 1.04, 1.08), "vblora": (1.05, 1.04, 1.08), "poly": _POLY, "mhr": _POLY}
    | {f"lokr-full-{factor}": wanted for factor, wanted in _LOKR_FULL.items()},
    "cuda": dict.fromkeys(("lora", "vblora", "lokr"), (1.12, 1.08, 1.1))
    | dict.fromkeys(("poly", "mhr"), (1.2, 1.15, 1.1))
    | {"lokr-full-4": (1.45,), "lokr-full-8": (1.25,), "lokr-full-16": (1.15,)},
}


def wanted(row: Row) -> float | None:
    """Return this package's target for the work of a row, if it has one. On a GPU a token is
    measured in a captured graph; compiled work is compared with eager work.
    """
    kind = row["device"].partition(":")[0]
    targets = dict(zip(MODES, TARGETS.get(kind, {}).get(row["method"], ()), strict=False))
    captured = kind == "cuda" and row["mode"] == "decode"
    if row["library"] != "ours" or row["compiled"] or row["graph"] != captured:
        return None
    return targets.get(row["mode"])


def _wanted(row: Row) -> str:
    target = wanted(row)
    if target is None:
        return ""
    return f"{target:.2f}{'' if row['ratio'] <= target else ' (missed)'}"


def _number(name: str, form: str) -> Cell:
    return lambda row: format(row[name], form) if name in row else ""


# Columns of the table of steps; one that is empty in all rows of a section is left out.
COLUMNS: dict[str, Cell] = {
    "mode": lambda row: row["mode"],
    "method": lambda row: row["method"],
    "library": lambda row: row["library"],
    "time / frozen": lambda row: f"{row['ratio']:.3f}" if "ratio" in row else row["failed"],
    "quartiles": lambda row: f"{row['low']:.3f}-{row['high']:.3f}" if "low" in row else "",
    "on the GPU alone": _number("device_ratio", ".3f"),
    "frozen, ms": _number("frozen_ms", ".2f"),
    "peak MB": _number("peak_MB", ".1f"),
    "extra MB": _number("extra_MB", ".1f"),
    "error": _number("error", ".0e"),
    "graph breaks": _number("breaks", "d"),
    "recompiled": _number("recompilations", "d"),
    "wanted": lambda row: _wanted(row) if "ratio" in row else "",
}
LEGEND = """\
A step with an adapter over the frozen model's same step, in turns; 1.05 adds 5 %. `train`:
forward and backward; `prefill`: a prompt; `decode`: one more token. `lokr`: of low rank;
`lokr-full-4`: full matrices, factor 4; `mhr`: Poly with four splits; `peft`: Hugging Face PEFT.
Memory: the peak of what a step adds, and beyond the frozen step's. Error: one layer's output or,
in training, its worst gradient, against float64 (norms). Wanted: what this package wants to
reach.
"""


def line(row: Row, columns: dict[str, Cell] = COLUMNS) -> str:
    """Return a row of the table."""
    return f"| {' | '.join(cell(row) for cell in columns.values())} |"


def heading(row: Row) -> str:
    """Return a description of a row's work, which all rows of a section share."""
    steps = [name for name in ("compiled", "graph") if row[name]]
    how = {"compiled": "both sides compiled", "graph": "in a captured CUDA graph"}
    layers = f"{row['layers']} layer{'s' if row['layers'] > 1 else ''}"
    if row["model"] == "stack":
        layers = f"{7 * row['layers']} linear layers"
    size = f"{row['batch']} × {row['tokens']} tokens, decode {row['decode_batch']} × 1"
    words = [f"width {row['width']}", layers, size, row["dtype"], row["device"]]
    return f"{row['model'].capitalize()}: " + ", ".join(words + [how[name] for name in steps])


def sections(rows: list[Row]) -> list[str]:
    """Return the lines of the table, a section for each kind of work."""
    lines = []
    for title in sorted({heading(row) for row in rows}):
        own = sorted((row for row in rows if heading(row) == title), key=_place)
        shown = {name: cell for name, cell in COLUMNS.items() if any(map(cell, own))}
        lines += [f"## {title}", "", f"| {' | '.join(shown)} |", "|---" * len(shown) + "|"]
        lines += [*(line(row, shown) for row in own), ""]
    return lines


def _place(row: Row) -> tuple[int, int]:
    """Return the place of a row's mode and method in a section."""
    modes = (*MODES, "generate")
    return modes.index(row["mode"]), list(METHODS).index(row["method"])


def verdict(rows: list[Row]) -> str:
    """List rows that failed and, with what they are behind, those of this package that are slower
    than they should be.
    """
    failed = [row for row in rows if "failed" in row]
    rows = [row for row in rows if "ratio" in row]
    behind = [f"{_where(row)}, {row['library']}: {row['failed']}" for row in failed]
    behind += [
        f"{_where(row)}: {row['ratio']:.3f}, {what} {bound:.3f}"
        for row in rows
        for what, bound in _bounds(row, rows).items()
        if row["library"] == "ours"
        and row["ratio"] > bound
        and (what == "wanted" or row["low"] > bound)
    ]
    return "Behind nowhere." if not behind else "Behind:\n\n- " + "\n- ".join(behind)


def _bounds(row: Row, rows: list[Row]) -> dict[str, float]:
    """Return what a row should not exceed: its target, the same method of peers, Hugging Face
    PEFT's LoRA (a full matrix takes more by its size), and of compiled work the eager ratio.
    """
    bounds = {"wanted": target} if (target := wanted(row)) else {}
    for other in rows:
        is_lora = (other["library"], other["method"]) == ("peft", "lora")
        is_lora = is_lora and not row["method"].startswith("lokr-full")
        same = other["method"] == row["method"] and other["library"] != "ours"
        if _work(other) == _work(row) and (same or is_lora):
            bounds[f"{other['library']}'s {other['method']}"] = other["ratio"]
        if row["compiled"] and _key(other) == _key(row | {"compiled": False}):
            bounds["eager"] = other["ratio"]
    return bounds


def _where(row: Row) -> str:
    steps = "".join(f", {name}" for name in ("compiled", "graph") if row[name])
    return f"{row['method']} {row['mode']}, {row['model']} of width {row['width']}{steps}"


_WORK = ("mode", "model", "width", "layers", "batch", "tokens", "decode_batch")
_WORK += ("dtype", "device", "compiled", "graph")


def _work(row: Row) -> tuple:
    return tuple(row[name] for name in _WORK)


def _key(row: Row) -> tuple:
    return (*_work(row), row["library"], row["method"])


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


def known(folder: Path) -> list[Row]:
    """Return the rows of a folder's `steps.json`; none without it."""
    path = folder / "steps.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def replaced(rows: list[Row], new: list[Row]) -> list[Row]:
    """Return rows with new ones in place of those of the same work."""
    measured = {_key(row) for row in new}
    return [row for row in rows if _key(row) not in measured] + new


def write(folder: Path, rows: list[Row], threads: int) -> None:
    """Write steps that were measured as `steps.json` and `steps.md`."""
    write_table(folder, "steps", [LEGEND, *sections(rows), verdict(rows)], rows, threads)


def table(head: str, lines: Iterable[str]) -> list[str]:
    """Return the lines of a table below its head."""
    return [head, "|---" * (head.count("|") - 1) + "|", *lines]


def write_table(folder: Path, name: str, lines: list[str], rows: list[Row], threads: int) -> None:
    """Write `<name>.md`, lines under the machine's description, and `<name>.json`, all that was
    measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = machine(threads)
    content = json.dumps({"machine": where, "rows": rows}, indent=1)
    (folder / f"{name}.json").write_text(content + "\n")
    (folder / f"{name}.md").write_text("\n".join([where, "", *lines, ""]))


def draw(
    plot: Callable[[Path, list[Row], str], None], path: Path, rows: list[Row], threads: int
) -> None:
    """Draw a figure of rows where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    plot(path, rows, machine(threads))


_COLORS = {"ours": "#1b6ca8", "peft": "#d9822b", "lycoris": "#7a9e3a"}


def plot(path: Path, rows: list[Row], where: str) -> None:
    """Draw a line of panels for each kind of work, a panel for each mode."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "ratio" in row]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    kinds = sorted({_kind(row) for row in rows})
    size = (4.8 * len(modes), 3.4 * len(kinds))
    figure, axes = plt.subplots(
        len(kinds), len(modes), figsize=size, squeeze=False, layout="constrained"
    )
    for panels, kind in zip(axes, kinds, strict=True):
        for axis, mode in zip(panels, modes, strict=True):
            _bars(axis, [row for row in rows if (_kind(row), row["mode"]) == (kind, mode)])
            axis.set_title(f"{kind}, {mode}", fontsize=9)
        panels[0].set_ylabel("time over the frozen model's")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in _COLORS.values()]
    axes[0][-1].legend(handles, list(_COLORS), fontsize=8)
    figure.suptitle(where, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _kind(row: Row) -> str:
    return row["model"] + "".join(f", {name}" for name in ("compiled", "graph") if row[name])


def _bars(axis: Any, rows: list[Row]) -> None:
    groups = list(dict.fromkeys((row["method"], row["width"]) for row in rows))
    for row in rows:
        place = groups.index((row["method"], row["width"]))
        place += (list(_COLORS).index(row["library"]) - 1) * 0.27
        spread = [[row["ratio"] - row["low"]], [row["high"] - row["ratio"]]]
        color = _COLORS[row["library"]]
        axis.bar(place, row["ratio"] - 1, 0.25, bottom=1, color=color, yerr=spread, capsize=2)
    names = [f"{method}\n{width}" for method, width in groups]
    axis.set_xticks(range(len(groups)), names, fontsize=6)
    axis.axhline(1, color="black", linewidth=0.8)
