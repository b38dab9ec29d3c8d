# SPDX-License-Identifier: Apache-2.0
"""Intervals by the bootstrap over tasks and seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Scores = Mapping[tuple[str, int], float]
"""A score for each pair of a task and a seed."""


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def interval(scores: Scores, draws: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean over tasks and seeds with its 95 % percentile interval.

    Tasks and seeds are drawn anew, each with replacement and independently of the other: the mean
    is for other tasks of this kind and other seeds. A table with one task or one seed has no
    interval over it.

    Raises:
        ValueError: A pair of a task and a seed is missing, or all are.
    """
    tasks, seeds = (sorted({key[i] for key in scores}) for i in (0, 1))
    if not scores or len(scores) < len(tasks) * len(seeds):
        raise ValueError(f"{len(scores)} scores of {len(tasks)} tasks x {len(seeds)} seeds")
    table = np.array([[scores[task, seed] for seed in seeds] for task in tasks])
    random = np.random.default_rng(seed)
    rows = random.integers(len(tasks), size=(draws, len(tasks)))
    columns = random.integers(len(seeds), size=(draws, len(seeds)))
    means = table[rows[:, :, None], columns[:, None, :]].mean((1, 2))
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(table.mean()), float(low), float(high))


def mean(scores: Scores) -> float:
    """Return the mean over tasks and seeds."""
    return math.fsum(scores.values()) / len(scores)


def complete_seeds(scores: Scores, tasks: Iterable[str]) -> Scores:
    """Return the scores of the seeds that have all of some tasks."""
    wanted, seeds = set(tasks), {seed for _, seed in scores}
    full = {seed for seed in seeds if all((task, seed) in scores for task in wanted)}
    return {key: score for key, score in scores.items() if key[1] in full and key[0] in wanted}


def paired(one: Scores, other: Scores, draws: int = 10_000, seed: int = 0) -> Interval:
    """Return the interval of the difference `one - other`, over the tasks and seeds of both."""
    both = one.keys() & other.keys()
    return interval({key: one[key] - other[key] for key in both}, draws, seed)


def better(found: Interval) -> str:
    """Return "holds" for an interval above 0, else "refuted"."""
    return "holds" if found.low > 0 else "refuted"


def not_worse(found: Interval) -> str:
    """Return "refuted" for an interval below 0, else "not refuted"."""
    return "refuted" if found.high < 0 else "not refuted"


def within(found: Interval, margin: float = 0.01) -> str:
    """Return "refuted" for an interval beyond the margin, "holds" for one that reaches beyond it on
    no side, else "undecided".
    """
    if found.low > margin or found.high < -margin:
        return "refuted"
    return "holds" if -margin <= found.low and found.high <= margin else "undecided"


def sign(found: Interval) -> str:
    """Return which of two is better, or "undecided"."""
    return "the first" if found.low > 0 else "the second" if found.high < 0 else "undecided"


@dataclass(frozen=True)
class Claim:
    """A claim of a protocol.

    Args:
        name: Its number there.
        rule: What the interval of a difference says.
        differences: Labels and the two arms' scores. Those without common ones are left out.
        needs_one: The claim holds if it holds for one difference; else each has its own verdict.
    """

    name: str
    rule: Callable[[Interval], str]
    differences: Sequence[tuple[str, Scores, Scores]]
    needs_one: bool = False


def claims_table(claims: Iterable[Claim]) -> str:
    """Return the differences of claims, and what the protocol's rules say of them, in Markdown."""
    lines = ["| claim | difference | points | verdict |", "|---|---|---|---|"]
    for claim in claims:
        found = [
            (label, paired(one, other))
            for label, one, other in claim.differences
            if one.keys() & other.keys()
        ]
        verdicts = [claim.rule(difference) for _, difference in found]
        if claim.needs_one and "holds" in verdicts:
            verdicts = ["holds" if verdict == "holds" else "no" for verdict in verdicts]
        for (label, difference), verdict in zip(found, verdicts, strict=True):
            lines.append(f"| {claim.name} | {label} | {difference} | {verdict} |")
    return "\n".join(lines)


def comparison(again: Mapping[str, Scores], before: Mapping[str, Scores]) -> str:
    """Return the means of scores that were measured again, in per cent, beside those of the same
    pairs of a task and a seed before, and beside the interval of all that were measured before.
    """
    lines = []
    for name, scores in again.items():
        earlier = before.get(name, {})
        common, tasks = scores.keys() & earlier.keys(), {task for task, _ in earlier}
        if common:
            now, then = (mean({key: each[key] for key in common}) for each in (scores, earlier))
            line = f"{name}: {100 * now:.1f} %, before {100 * then:.1f} % ({len(common)} scores); "
            all_of_it = interval(complete_seeds(earlier, tasks))
            where = "within" if all_of_it.low <= now <= all_of_it.high else "outside"
            is_whole = {task for task, _ in common} == tasks
            lines.append(line + (f"{where} {all_of_it}" if is_whole else "tasks are missing"))
    return "\n".join(lines) or "Nothing was measured again yet that is checked in."


def at_edge(chosen: float, tried: Sequence[float]) -> str:
    """Return a mark for a rate that is the smallest or largest of those that were tried."""
    return "*" if tried and chosen in (min(tried), max(tried)) else ""


def draw_gains(axes: Any, places: Sequence[float], gains: Sequence[Interval], **style: Any) -> None:
    """Draw means with their intervals, in points."""
    below = [100 * (gain.mean - gain.low) for gain in gains]
    above = [100 * (gain.high - gain.mean) for gain in gains]
    means = [100 * gain.mean for gain in gains]
    axes.errorbar(places, means, [below, above], capsize=2, **style)
