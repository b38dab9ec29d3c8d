# SPDX-License-Identifier: Apache-2.0
"""Intervals by the bootstrap over tasks and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

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
    """
    tasks, seeds = (sorted({key[i] for key in scores}) for i in (0, 1))
    table = np.array([[scores[task, seed] for seed in seeds] for task in tasks])
    random = np.random.default_rng(seed)
    rows = random.integers(len(tasks), size=(draws, len(tasks)))
    columns = random.integers(len(seeds), size=(draws, len(seeds)))
    means = np.array([table[np.ix_(r, c)].mean() for r, c in zip(rows, columns, strict=True)])
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(table.mean()), float(low), float(high))


def paired(one: Scores, other: Scores, draws: int = 10_000, seed: int = 0) -> Interval:
    """Return the interval of the difference `one - other`, over the tasks and seeds of both."""
    both = one.keys() & other.keys()
    return interval({key: one[key] - other[key] for key in both}, draws, seed)
