# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of studies 2 and 3, made from the runs alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .runs import Record
from .size_arms import Arm, arms
from .statistics import Interval, Scores, interval, paired

SHARED = {
    "row of a shared Poly adapter": "Poly adapter of the sources",
    "weights of shared LoRA adapters": "seven LoRA adapters of rank 4",
    "VB-LoRA, shared trained bank": "bank of 256 vectors",
    "VB-LoRA, shared random bank": "bank of 256 vectors (or its seed)",
}

CLAIMS = (
    ("1: shared trained bank (rank 1, attention) - frozen model",
     "VB-LoRA, shared trained bank, rank 1, attention", "frozen model"),
    ("1: shared trained bank (rank 1, one) - frozen model",
     "VB-LoRA, shared trained bank, rank 1, one", "frozen model"),
    ("2: trained - random bank (rank 4, every)",
     "VB-LoRA, shared trained bank, rank 4, every", "VB-LoRA, shared random bank, rank 4, every"),
    ("3: own bank of 64 vectors - LoRA of rank 1", "VB-LoRA, own bank, rank 4, 64 vectors",
     "LoRA, rank 1, every"),
    ("4: Poly's row - weights of adapters", "row of a shared Poly adapter",
     "weights of shared LoRA adapters"),
)  # fmt: skip

PAIRS = (
    ("LoKr, full matrix, factor 4", "LoRA, rank 16, every"),
    ("LoKr, full matrix, factor 8", "LoRA, rank 4, every"),
    ("LoKr, full matrix, factor 16", "LoRA, rank 1, every"),
    ("LoKr, low rank, rank 8, every", "LoRA, rank 1, every"),
    ("LoKr, low rank, rank 1, every", "LoRA, rank 1, attention"),
)
"""The comparisons of study 3."""


def report(records: list[Record], folder: Path) -> str:
    """Return the tables of both studies, and draw the figure."""
    final = [record for record in records if record["stage"] == "final"]
    found = {name: scores_of(final, name) for name in arms() if scores_of(final, name)}
    size = {name: _mean(final, name, "file_bytes") for name in found}
    _draw(found, size, folder / "accuracy_against_bytes.png")
    parts = [
        _table(final, found, size),
        _differences("The protocol's claims", CLAIMS, found),
        _differences("Study 3", [(f"{a} - {b}", a, b) for a, b in PAIRS], found),
    ]
    return "\n\n".join(["# Studies 2 and 3: results", *parts]) + "\n"


def scores_of(final: list[Record], name: str) -> Scores:
    """Return an arm's test accuracies by task and seed."""
    return {
        (record["options"]["task"], record["seed"]): record["test"]
        for record in final
        if record["arm"] == name
    }


def front(found: dict[str, Scores], size: dict[str, float]) -> list[str]:
    """Return the arms that no smaller or equal arm is better than, with a paired interval above
    zero, by size.
    """
    return sorted(
        (
            name
            for name in found
            if not any(
                size[other] <= size[name] and paired(found[other], found[name]).low > 0
                for other in found
                if other != name
            )
        ),
        key=lambda name: size[name],
    )


def _mean(final: list[Record], name: str, field: str) -> float:
    values = [record[field] for record in final if record["arm"] == name]
    return sum(values) / len(values)


def _table(final: list[Record], found: dict[str, Scores], size: dict[str, float]) -> str:
    lines = ["| arm | bytes | of tensors | numbers | rate | accuracy | on the front |"]
    lines.append("|---|---:|---:|---:|---|---|---|")
    on_front = front(found, size)
    for name in sorted(found, key=lambda name: size[name]):
        arm: Arm = arms()[name]
        number = next(r["options"]["rate"] for r in final if r["arm"] == name)
        rate = arm.rates[number] if arm.rates else {}
        shared = f" (shared: {SHARED[arm.family]})" if arm.family in SHARED else ""
        lines.append(
            f"| {name}{shared} | {size[name]:,.0f} | {_mean(final, name, 'tensor_bytes'):,.0f} | "
            f"{_mean(final, name, 'numbers'):,.0f} | {rate} | {interval(found[name])} | "
            f"{'yes' if name in on_front else ''} |"
        )
    return "## Accuracy in per cent, by bytes as served\n\n" + "\n".join(lines)


def _differences(
    title: str, pairs: Iterable[tuple[str, str, str]], found: dict[str, Scores]
) -> str:
    lines = [f"## {title}", "", "| difference | points |", "|---|---|"]
    for label, one, other in pairs:
        if one in found and other in found:
            lines.append(f"| {label} | {paired(found[one], found[other])} |")
    return "\n".join(lines)


def _draw(found: dict[str, Scores], size: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    families: dict[str, list[tuple[float, Interval]]] = {}
    for name in sorted(found, key=lambda name: size[name]):
        families.setdefault(arms()[name].family, []).append((size[name], interval(found[name])))
    for i, (family, points) in enumerate(families.items()):
        if family == "frozen model":
            axes.axhline(100 * points[0][1].mean, color="black", linestyle=":", label=family)
            continue
        means = [100 * i.mean for _, i in points]
        errors = [
            [100 * (i.mean - i.low) for _, i in points],
            [100 * (i.high - i.mean) for _, i in points],
        ]
        axes.errorbar(
            [n for n, _ in points], means, errors, marker="os^vD*"[i % 6], capsize=2, label=family
        )
    axes.set_xscale("log")
    axes.set_xlabel("bytes of a user's file as it is served")
    axes.set_ylabel("accuracy, mean of the tasks, per cent, with 95 % intervals")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)
