# SPDX-License-Identifier: Apache-2.0
"""Tasks made of texts with labels, divided into training, validation and test texts."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        name: Its name.
        classes: Names of its labels.
        texts, labels: Of each part, by the part's name.
    """

    name: str
    classes: tuple[str, ...]
    texts: dict[str, tuple[str, ...]]
    labels: dict[str, tuple[int, ...]]

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of texts and labels in their order."""
        content = json.dumps([self.name, self.classes, self.texts, self.labels], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def joint_digest(tasks: Iterable[Task]) -> str:
    """Return a short digest of tasks in their order."""
    return hashlib.sha256("".join(task.digest for task in tasks).encode()).hexdigest()[:16]


@lru_cache(maxsize=4)
def read_examples(path: Path) -> tuple[tuple[str, str], ...]:
    """Return the pairs (text, label) of a `task.json`, in their order."""
    examples: list[dict[str, Any]] = json.loads(path.read_text())["examples"]
    pairs = []
    for example in examples:
        scores = example["target_scores"]
        pairs.append((" ".join(str(example["input"]).split()), max(scores, key=scores.get)))
    return tuple(pairs)


def folded(text: str) -> str:
    """Return the words of a text, without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def part_of(key: str) -> str:
    """Return the part that a group of texts belongs to, by its name's digest: 60 % train, 10 %
    validation, 30 % test.
    """
    number = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if number < 0.6 else "validation" if number < 0.7 else "test"


def draw(numbers: Sequence[int], count: int, key: str) -> list[int]:
    """Return `count` of some numbers, or all, chosen by a name."""
    return sorted(random.Random(key).sample(list(numbers), min(count, len(numbers))))
