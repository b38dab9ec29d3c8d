# SPDX-License-Identifier: Apache-2.0
"""Tables of means over the seeds with their standard deviations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

from .methods import Method

WAYS = {
    "Z": "its routing only",
    "full": "its routing and all skills",
    "mu": "the mean of all skills",
    "further": "the whole adapter further",
    "new": "a new adapter",
    "none": "nothing",
}
SHOTS = (4, 16, 64)


def one_line(method: Method, numbers: dict[str, Any]) -> str:
    """Return a line with a method's figures for one seed."""
    scores = list(numbers["accuracies"].values())
    late = {
        (way, shots): mean(
            r["accuracy"] for r in numbers["new"] if r["way"] == way and r["shots"] == shots
        )
        for way in method.ways
        for shots in SHOTS
    }
    new = ", ".join(f"{way} {shots}: {100 * score:.0f}" for (way, shots), score in late.items())
    seconds = numbers["seconds"]
    trained = f"mean {100 * mean(scores):.1f} %, worst {100 * min(scores):.1f} %"
    return f"{method.key:7s} {trained}, {seconds:.1f} s; new tasks: {new}"


def over_seeds(
    results: dict[str, Any], key: str, of: Callable[[dict[str, Any]], float]
) -> list[float]:
    """Return a figure of a method for each seed that has it."""
    return [of(numbers[key]) for numbers in results["seeds"].values() if key in numbers]


def cell(values: Sequence[float], factor: float = 100, digits: int = 1) -> str:
    """Mean ± standard deviation."""
    spread = f" ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * mean(values):.{digits}f}{spread}"


def new_mean(
    kind: str, way: str, shots: int, what: str = "accuracy"
) -> Callable[[dict[str, Any]], float]:
    """Return a function of one seed's figures: the mean over the new tasks of a kind."""
    return lambda numbers: mean(
        r[what] for r in numbers["new"] if (r["kind"], r["way"], r["shots"]) == (kind, way, shots)
    )


def tables(results: dict[str, Any], methods: Sequence[Method]) -> str:
    """Return all results in two tables."""
    here = [
        method
        for method in methods
        if any(method.key in numbers for numbers in results["seeds"].values())
    ]
    count = len(next(iter(next(iter(results["seeds"].values())).values()))["accuracies"])
    lines = [
        f"Accuracy in per cent over {count} tasks, mean ± standard deviation over "
        f"{len(results['seeds'])} seeds; seconds are the "
        "processor's, with one thread.",
        "",
        "| method | parameters | mean of tasks | worst task | training, s |",
        "|---|---:|---:|---:|---:|",
    ]
    for method in here:
        one = lambda of, key=method.key: over_seeds(results, key, of)  # noqa: E731
        means, worst = (
            one(lambda n: mean(n["accuracies"].values())),
            one(lambda n: min(n["accuracies"].values())),
        )
        size, seconds = (
            int(mean(one(lambda n: n["parameters"]))),
            cell(one(lambda n: n["seconds"]), 1, 0).split(" ")[0],
        )
        lines.append(f"| {method.label} | {size:,} | {cell(means)} | {cell(worst)} | {seconds} |")
    for kind, heading in (
        (
            "pairs",
            "New tasks that combine a geometry and a light that the trained tasks have, from so "
            "many examples",
        ),
        ("novel", "New tasks that have nothing of the trained ones"),
    ):
        lines += [
            "",
            f"{heading}:",
            "",
            "| method | what trains | 4 | 16 | 64 | seconds |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for method in here:
            for way in method.ways:
                scores = " | ".join(
                    cell(over_seeds(results, method.key, new_mean(kind, way, s))) for s in SHOTS
                )
                seconds = cell(
                    over_seeds(results, method.key, new_mean(kind, way, SHOTS[-1], "seconds")), 1, 2
                ).split(" ")[0]
                lines.append(f"| {method.label} | {WAYS[way]} | {scores} | {seconds} |")
    return "\n".join(lines) + "\n"
