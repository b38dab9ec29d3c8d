# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of study 1, made from its runs alone."""

from __future__ import annotations

from pathlib import Path

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
UNTRAINED = {"row": "mean row", "further": "as it is", "weights": "mean"}
"""Ways to begin with, without a text; further texts start from them."""

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
        _claims(final, new),
        _held_out("texts drawn evenly over the labels", evenly, final),
        "## The claims with these\n\n" + claims_table(_compared(final, evenly)),
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


def _claims(final: list[Record], new: New) -> str:
    return "## The protocol's claims\n\n" + claims_table(_compared(final, new))


def _compared(final: list[Record], new: New) -> list[Claim]:
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
            last = next((r["options"] for r in own if r["stage"] == stage), None)
            tried = [record for record in own if record["stage"] == search]
            if last is not None:
                lines.append(f"- {name}, {how}: {_rates(last, tried, search == 'rates')}")
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

    frozen = new["head", "as it is", 0]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    ways = dict.fromkeys((arm, way) for arm, way, _ in new if arm != "head")
    drawn = [key for key in ways if key not in [(arm, UNTRAINED.get(way)) for arm, way in ways]]
    for i, (arm, way) in enumerate(drawn):
        found = [new.get((arm, way, n)) for n in SHOTS]
        found[0] = found[0] or new.get((arm, UNTRAINED.get(way, ""), 0))
        draw_gains(
            axes, [n + 0.03 * (i - len(drawn) / 2) for n, own in enumerate(found) if own],
            [paired(own, frozen) for own in found if own], marker="os^vD*"[i % 6],
            label=f"{NAMES[arm]}: {way}",
        )  # fmt: skip
    axes.axhline(0, color="black", linestyle=":", label="frozen model")
    axes.set_xticks(range(len(SHOTS)), [str(n) for n in SHOTS])
    axes.set_xlabel("labeled texts of the new cell")
    axes.set_ylabel(
        "accuracy on held-out cells,\npoints above the frozen model, with 95 % intervals"
    )
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
