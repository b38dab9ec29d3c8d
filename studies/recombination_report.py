# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of study 1, made from its runs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .runs import Record
from .statistics import (
    Claim,
    Scores,
    at_edge,
    better,
    claims_table,
    draw_gains,
    interval,
    paired,
    sign,
    within,
)

NAMES = {
    "head": "frozen model",
    "shared": "one shared LoRA",
    "own": "a LoRA a cell",
    "poly": "Poly",
    "heads": "multi-head routing",
    "input": "routing by input",
}
SHOTS = (0, 4, 16, 64)
WAYS = {
    "further": ("all of it trained further", "o"),
    "row": ("a row fitted", "o"),
    "new": ("a new LoRA trained", "o"),
    "weights": ("a weight for each LoRA fitted", "s"),
    "clusters": ("a weight for each cluster fitted", "^"),
}
"""Ways to adapt to a new cell: words and marker of the figure."""

COLORS = {
    "shared": "black", "own": "tab:green", "poly": "tab:red", "heads": "tab:orange",
    "input": "tab:blue",
}  # fmt: skip

New = dict[tuple[str, str, int], dict[tuple[str, int], float]]
"""Accuracies on new cells by arm, way and number of texts; each by cell and seed."""


def report(records: list[Record], folder: Path) -> str:
    """Return the tables, and draw the figure of the new cells."""
    final = [record for record in records if record["stage"] == "final"]
    few = [record for record in records if record["stage"] == "few"]
    evenly = new_cells(final)
    new = {key: scores for key, scores in evenly.items() if key[2] == 0} | new_cells(few)
    if ("head", "as it is", 0) in new:
        _draw(new, folder / "new_cells.png")
    parts = [
        _trained(final),
        _held_out("texts drawn at random", new, [*final, *few]),
        "## The protocol's claims\n\n" + claims_table(_claims(final, new)),
        _held_out("texts drawn evenly over the labels", evenly, final),
        "## The claims with these\n\n" + claims_table(_claims(final, evenly)),
        _chosen(records),
    ]
    return "\n\n".join(["# Study 1: results", *parts]) + "\n"


def trained_cells(final: list[Record], arm: str) -> Scores:
    """Return an arm's test accuracies on trained cells, by cell and seed."""
    return {
        (cell, record["seed"]): value
        for record in final
        if record["arm"] == arm
        for cell, value in record["trained"].items()
    }


def new_cells(final: list[Record]) -> New:
    """Return the test accuracies on held-out cells."""
    found: New = {}
    for record in final:
        for row in record["new"]:
            key = record["arm"], row["way"], row["shots"]
            found.setdefault(key, {})[row["cell"], record["seed"]] = row["accuracy"]
    return found


def scores(records: list[Record]) -> dict[str, Scores]:
    """Return all test accuracies: of trained cells by arm, of new cells by arm, way and texts."""
    final = [record for record in records if record["stage"] == "final"]
    few = [record for record in records if record["stage"] == "few"]
    found = {f"{name}, trained cells": trained_cells(final, arm) for arm, name in NAMES.items()}
    for (arm, way, shots), own in new_cells(final).items():
        found[f"{NAMES[arm]}, {way}, {shots} texts{' evenly' if shots else ''}"] = own
    for (arm, way, shots), own in new_cells(few).items():
        found[f"{NAMES[arm]}, {way}, {shots} texts at random"] = own
    return found


def _trained(final: list[Record]) -> str:
    lines = [
        "| arm | trained numbers | CPU seconds | mean | worst cell |",
        "|---|---:|---:|---|---:|",
    ]
    for arm, name in NAMES.items():
        own = [record for record in final if record["arm"] == arm]
        if own:
            scores = trained_cells(final, arm)
            cells = {cell for cell, _ in scores}
            seeds = {seed for _, seed in scores}
            worst = min(sum(scores[cell, s] for s in seeds) / len(seeds) for cell in cells)
            seconds = sum(record["training_seconds"] for record in own) / len(own)
            lines.append(
                f"| {name} | {own[0]['parameters']:,} | {seconds:.0f} | {interval(scores)} | "
                f"{100 * worst:.1f} |"
            )
    return "## Trained cells, accuracy in per cent\n\n" + "\n".join(lines)


def _held_out(title: str, new: New, final: list[Record]) -> str:
    lines = ["| arm | way | numbers | CPU seconds | " + " | ".join(map(str, SHOTS)) + " | others |"]
    lines.append("|---|---|---:|---:|" + "---|" * len(SHOTS) + "---:|")
    for arm, way in dict.fromkeys((arm, way) for arm, way, _ in new):
        rows = [
            row
            for record in final
            if record["arm"] == arm
            for row in record["new"]
            if row["way"] == way and (arm, way, row["shots"]) in new
        ]
        cells = [
            str(interval(new[arm, way, shots])) if (arm, way, shots) in new else ""
            for shots in SHOTS
        ]
        change = max(row.get("others_change", 0.0) for row in rows)
        seconds = sum(row.get("seconds", 0.0) for row in rows) / len(rows)
        lines.append(
            f"| {NAMES[arm]} | {way} | {max(row['numbers'] for row in rows):,} | {seconds:.1f} | "
            + " | ".join(cells)
            + f" | {change:.1g} |"
        )
    head = (
        f"## New cells, accuracy in per cent, by the number of texts: {title}\n\n"
        "`numbers`: trained for a new cell. `CPU seconds`: the mean of all runs. `others`: the "
        "largest change of a trained cell's logits.\n\n"
    )
    return head + "\n".join(lines)


def _claims(final: list[Record], new: New) -> list[Claim]:
    def few(arm: str, way: str, shots: int = 16) -> Scores:
        return new.get((arm, way, shots), {})

    fresh, row = few("own", "new"), few("poly", "row")
    trained = {arm: trained_cells(final, arm) for arm in NAMES}
    return [
        Claim("1", better, [
            ("Poly's row - a new LoRA, 16 texts", row, fresh),
            ("multi-head row - a new LoRA, 16 texts", few("heads", "row"), fresh),
        ], needs_one=True),
        Claim("beside 1", sign, [
            ("a new LoRA, 16 texts - frozen model", fresh, few("head", "as it is", 0)),
            ("Poly's row, 16 texts - its mean row, 0 texts", row, few("poly", "mean row", 0)),
            ("multi-head row, 16 texts - its mean row, 0 texts", few("heads", "row"),
             few("heads", "mean row", 0)),
        ]),
        Claim("2", better, [
            ("Poly - one shared LoRA, trained cells", trained["poly"], trained["shared"]),
            ("multi-head routing - one shared LoRA, trained cells", trained["heads"],
             trained["shared"]),
        ], needs_one=True),
        Claim("3", within, [
            ("weights of adapters - Poly's row, 16 texts", few("own", "weights"), row),
        ]),
        Claim("4", sign, [
            ("Poly's mean row - routing by input, 0 texts", few("poly", "mean row", 0),
             few("input", "as it is", 0)),
        ]),
    ]  # fmt: skip


def _chosen(records: list[Record]) -> str:
    lines = []
    for arm, name in NAMES.items():
        own = [record for record in records if record["arm"] == arm and record["options"]]
        for stage, search, how in (("final", "rates", "evenly"), ("few", "ways", "at random")):
            options = next((r["options"] for r in own if r["stage"] == stage), None)
            tried = [record for record in own if record["stage"] == search]
            if options is not None:
                lines.append(f"- {name}, {how}: {_rates(options, tried, search == 'rates')}")
    head = "## Rates that were chosen\n\n`*`: the smallest or largest that was tried.\n\n"
    return head + "\n".join(lines)


def _rates(options: Record, tried: list[Record], is_searched: bool) -> str:
    """Return the rates of a run, marked where they are at an edge of those that were tried."""
    rate, rates = options["rate"], [record["options"]["rate"] for record in tried]
    found = [f"{rate}{at_edge(rate, rates) if is_searched else ''}"]
    ways = next((r["tuning"] for r in tried if r["options"]["rate"] == rate), {})
    for way, few_rate in options["few"].items():
        edge = at_edge(few_rate, [entry["rate"] for entry in ways.get(way, [])])
        found.append(f"{way} {few_rate}{edge}")
    return ", ".join(found)


def _draw(new: New, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 6), sharey=True, width_ratios=(2, 3), layout="constrained"
    )
    frozen = new["head", "as it is", 0]
    cells, seeds = ({key[i] for key in frozen} for i in (0, 1))
    figure.suptitle(
        f"{len(cells)} pairs of domain and language (cells) that nobody trained\n"
        f"mean of {len(seeds)} seeds; bars: 95 % bootstrap intervals over pairs and seeds",
        fontsize=11,
    )
    _draw_untrained(left, new, frozen)
    _draw_few(right, new, frozen)
    left.set_ylabel(
        f"accuracy, points above the frozen model's {100 * interval(frozen).mean:.1f} %"
    )
    for axes in (left, right):
        axes.axhline(0, color="black", linestyle=":")
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_untrained(axes: Any, new: New, frozen: Scores) -> None:
    shown = [(arm, way) for arm, way, shots in new if not shots and arm != "head"]
    for place, (arm, way) in enumerate(shown):
        gain = paired(new[arm, way, 0], frozen)
        draw_gains(axes, [place], [gain], marker="o", color=COLORS[arm])
    names = [f"{NAMES[arm]}:\n{way}" for arm, way in shown]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_title("without a text of the pair", fontsize=10)


def _draw_few(axes: Any, new: New, frozen: Scores) -> None:
    shown = list(dict.fromkeys((arm, way) for arm, way, shots in new if shots))
    for i, (arm, way) in enumerate(shown):
        gains = {n: paired(new[arm, way, shots], frozen) for n, shots in enumerate(SHOTS[1:])
                 if (arm, way, shots) in new}  # fmt: skip
        words, marker = WAYS[way]
        draw_gains(
            axes, [n + 0.08 * (i - (len(shown) - 1) / 2) for n in gains], list(gains.values()),
            marker=marker, color=COLORS[arm], label=f"{NAMES[arm]}: {words}",
            linestyle="-" if marker == "o" else "--",
        )  # fmt: skip
    axes.set_xticks(range(len(SHOTS) - 1), [str(shots) for shots in SHOTS[1:]])
    axes.set_xlabel("labeled texts of the pair, drawn at random")
    axes.set_title("from a few texts of the pair", fontsize=10)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
