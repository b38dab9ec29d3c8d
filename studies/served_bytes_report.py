# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of studies 2 and 3, made from the runs alone."""

from __future__ import annotations

from pathlib import Path

from .runs import Record
from .size_arms import Arm, arms
from .statistics import (
    Claim,
    Scores,
    at_edge,
    better,
    claims_table,
    complete_seeds,
    draw_gains,
    interval,
    mean,
    not_worse,
    paired,
    sign,
    within,
)

SHARED = {
    "row of a shared Poly adapter": "Poly adapter of the sources",
    "weights of shared LoRA adapters": "seven LoRA adapters of rank 4",
    "VB-LoRA, shared trained bank": "bank of 256 vectors",
    "VB-LoRA, shared random bank": "bank of 256 vectors (or its seed)",
}

COLORS = {
    "LoRA": "black",
    "LoKr, low rank": "tab:red",
    "LoKr, full matrix": "tab:orange",
    "LoHa": "tab:brown",
    "VB-LoRA, own bank": "tab:green",
    "VB-LoRA, shared trained bank": "tab:blue",
    "VB-LoRA, shared random bank": "tab:cyan",
    "row of a shared Poly adapter": "tab:purple",
    "weights of shared LoRA adapters": "tab:pink",
}
"""Colors of the families of adapters; what is no adapter is gray."""

FROZEN = "frozen model"

KILOBYTE = 1024
"""Bytes that an arm of the first claim has less than."""

EQUAL_PARAMETERS = (
    ("LoKr, full matrix, factor 4", "LoRA, rank 16, every"),
    ("LoKr, full matrix, factor 8", "LoRA, rank 4, every"),
    ("LoKr, full matrix, factor 16", "LoRA, rank 1, every"),
)
EQUAL_BYTES = (
    ("LoKr, low rank, rank 8, every", "LoRA, rank 1, every"),
    ("LoKr, low rank, rank 8, every", "LoRA, rank 4, attention"),
)
"""The comparisons of study 3."""


def report(records: list[Record], folder: Path) -> str:
    """Return the tables of both studies, and draw the figure."""
    final = [record for record in records if record["stage"] == "final"]
    tasks = {record["options"]["task"] for record in final}
    found = {name: complete_seeds(scores_of(final, name), tasks) for name in arms()}
    found = {name: scores for name, scores in found.items() if scores}
    size = {name: _mean(final, name, "file_bytes") for name in found}
    if FROZEN in found:
        _draw(found, size, folder / "accuracy_against_bytes.png")
    two, three = _claims(found, size)
    parts = [
        _table(records, found, size),
        *([_by_kind(found, size)] if FROZEN in found else []),
        "## The protocol's claims\n\n" + claims_table(two),
        "## Study 3\n\n" + claims_table(three),
    ]
    return "\n\n".join(["# Studies 2 and 3: results", *parts]) + "\n"


def scores_of(final: list[Record], name: str) -> Scores:
    """Return an arm's test accuracies by task and seed."""
    return {
        (record["options"]["task"], record["seed"]): record["test"]
        for record in final
        if record["arm"] == name
    }


def unbeaten(found: dict[str, Scores], size: dict[str, float]) -> set[str]:
    """Return the arms that no other arm with as few bytes is better than, with a paired interval
    above zero.
    """
    return {
        name
        for name in found
        if not any(
            size[other] <= size[name] and paired(found[other], found[name]).low > 0
            for other in found
            if other != name and found[other].keys() & found[name].keys()
        )
    }


def front(found: dict[str, Scores], size: dict[str, float]) -> list[str]:
    """Return the Pareto front of the means by size: an arm is on it if all others with as few bytes
    have a lower mean.
    """
    means = {name: mean(scores) for name, scores in found.items()}
    line: list[str] = []
    for name in sorted(found, key=lambda name: (size[name], -means[name])):
        if not line or means[name] > means[line[-1]]:
            line.append(name)
    return line


def _claims(found: dict[str, Scores], size: dict[str, float]) -> tuple[list[Claim], list[Claim]]:
    """Return the claims of study 2 and of study 3."""

    def pair(one: str, other: str) -> tuple[str, Scores, Scores]:
        sizes = f"{size.get(one, 0):,.0f} against {size.get(other, 0):,.0f} bytes"
        return f"{one} - {other} ({sizes})", found.get(one, {}), found.get(other, {})

    trained, own = "VB-LoRA, shared trained bank", "VB-LoRA, own bank, rank 4, 64 vectors"
    small = [name for name in found if arms()[name].family == trained and size[name] < KILOBYTE]
    two = [
        Claim("1", better, [pair(name, FROZEN) for name in small], needs_one=True),
        Claim("2", better, [
            pair(f"{trained}, rank 4, every", "VB-LoRA, shared random bank, rank 4, every")
        ]),
        Claim("3", not_worse, [pair(own, "LoRA, rank 1, every")]),
        Claim("4", sign, [
            pair("row of a shared Poly adapter", "weights of shared LoRA adapters")
        ]),
    ]  # fmt: skip
    three = [
        Claim("1", within, [pair(*names) for names in EQUAL_PARAMETERS]),
        Claim("2", better, [pair(*names) for names in EQUAL_BYTES]),
    ]
    return two, three


def _mean(final: list[Record], name: str, field: str) -> float:
    values = [record[field] for record in final if record["arm"] == name]
    return sum(values) / len(values)


def _table(records: list[Record], found: dict[str, Scores], size: dict[str, float]) -> str:
    final = [record for record in records if record["stage"] == "final"]
    lines = ["| arm | bytes | of tensors | numbers | rate | seeds | accuracy | gain | front |"]
    lines.append("|---|---:|---:|---:|---|---:|---|---|---|")
    line, ties = front(found, size), unbeaten(found, size)
    for name in sorted(found, key=lambda name: size[name]):
        arm: Arm = arms()[name]
        number = next(r["options"]["rate"] for r in final if r["arm"] == name)
        tried = [r for r in records if r["stage"] == "rates" and r["arm"] == name]
        edge = at_edge(number, [r["options"]["rate"] for r in tried])
        rates = arm.rates[number] if arm.rates else {}
        rate = ", ".join(f"{role} {value:g}".removeprefix("all ") for role, value in rates.items())
        shared = f" (shared: {SHARED[arm.family]})" if arm.family in SHARED else ""
        gain = paired(found[name], found[FROZEN]) if FROZEN in found else ""
        mark = "yes" if name in line else "tied" if name in ties else ""
        lines.append(
            f"| {name}{shared} | {size[name]:,.0f} | {_mean(final, name, 'tensor_bytes'):,.0f} | "
            f"{_mean(final, name, 'numbers'):,.0f} | {rate}{edge} | "
            f"{len({s for _, s in found[name]})} | {interval(found[name])} | {gain} | {mark} |"
        )
    head = (
        "## Accuracy in per cent, by bytes as served\n\n"
        "`gain`: over the frozen model, paired. `front`: yes, if all others with as few bytes have "
        "a lower mean; tied, if none of them is better with a paired interval above 0. `*`: the "
        "smallest or largest rate that was tried."
    )
    return head + "\n\n" + "\n".join(lines)


def _by_kind(found: dict[str, Scores], size: dict[str, float]) -> str:
    lines = ["| arm | bytes | MultiEmo | others |", "|---|---:|---|---|"]
    for name in sorted(found, key=lambda name: size[name]):
        kinds = [
            {key: score for key, score in found[name].items() if ("multiemo" in key[0]) == related}
            for related in (True, False)
        ]
        gains = [str(paired(own, found[FROZEN])) if own else "" for own in kinds]
        lines.append(f"| {name} | {size[name]:,.0f} | {gains[0]} | {gains[1]} |")
    head = (
        "## Gain over the frozen model, by kind of task\n\n"
        "The sources, which shared parts were trained on, are other cells of MultiEmo. The tasks "
        "were divided after results had been seen."
    )
    return head + "\n\n" + "\n".join(lines)


def _draw(found: dict[str, Scores], size: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    frozen = found[FROZEN]
    tasks, seeds = ({key[i] for key in frozen} for i in (0, 1))
    figure, axes = plt.subplots(figsize=(9, 7), layout="constrained")
    families: dict[str, list[str]] = {}
    for name in sorted(found.keys() - {FROZEN}, key=lambda name: (size[name], name)):
        families.setdefault(arms()[name].family, []).append(name)
    for i, (family, names) in enumerate(families.items()):
        draw_gains(
            axes, [size[name] for name in names], [paired(found[name], frozen) for name in names],
            marker="os^vD*Ph"[i % 8], color=COLORS.get(family, "gray"),
            label=f"{family} (1)" if family in SHARED else family,
        )  # fmt: skip
    line = [name for name in front(found, size) if size[name] > 0]
    axes.step(
        [size[name] for name in line], [100 * paired(found[name], frozen).mean for name in line],
        where="post", color="lightgray", linewidth=4, zorder=0, label="Pareto front of the means",
    )  # fmt: skip
    axes.axhline(0, color="black", linestyle=":", label="frozen model")
    axes.set_xscale("log")
    axes.set_title(
        f"{len(tasks)} tasks, mean of {len(seeds)} seeds\n"
        "bars: 95 % bootstrap intervals over tasks and seeds",
        fontsize=11,
    )
    axes.set_xlabel(
        "bytes of a user's file: numbers in half precision, and the header\n"
        "(1) what all users share is not counted"
    )
    axes.set_ylabel(f"accuracy, points above the frozen model's {100 * mean(frozen):.1f} %")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(fontsize=8, ncols=3, loc="outside lower center")
    figure.savefig(path, dpi=120)
    plt.close(figure)
