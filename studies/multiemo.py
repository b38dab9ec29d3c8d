# SPDX-License-Identifier: Apache-2.0
"""The grid of MultiEmo: sentences of four domains in eight languages, with one label set.

A sentence has the same number in all languages, up to a shift by one in one file. So sentences are
divided in blocks of `BLOCK` consecutive numbers, whole blocks go to one part in all languages, and
a block's first and last `MARGIN` sentences are left out: no translation of a test sentence is a
training sentence. A sentence whose text occurs in another part, in any language, is left out of
training.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from .package_data import TEXTS
from .texts import PARTS, Task, draw, part_of, read_examples

DOMAINS = ("hotels", "medicine", "products", "reviews")
LANGUAGES = ("de", "en", "es", "fr", "it", "nl", "pl", "pt")
CLASSES = ("ambivalent", "negative", "neutral", "positive")
SIZES = {"train": 400, "validation": 100, "test": 200}

BLOCK, MARGIN = 20, 2
LONGEST = 120
"""Characters of the longest sentence, in English, so that few tokens are cut off."""

Cell = tuple[str, str]

HELD_OUT: tuple[Cell, ...] = tuple(
    (domain, language)
    for i, domain in enumerate(DOMAINS)
    for j, language in enumerate(LANGUAGES)
    if j % 4 == i
)
"""Cells that no model is trained on; each domain has two, each language one."""

TUNING: tuple[Cell, ...] = (("hotels", "fr"), ("medicine", "pt"))
"""Cells that no model is trained on, for choosing rates for new cells."""

TRAINED: tuple[Cell, ...] = tuple(
    (domain, language)
    for domain in DOMAINS
    for language in LANGUAGES
    if (domain, language) not in (*HELD_OUT, *TUNING)
)


def name(cell: Cell) -> str:
    """Return a cell's name, "hotels-pl"."""
    return "-".join(cell)


def cell_task(cell: Cell) -> Task:
    """Return the task of a cell of the grid."""
    domain, language = cell
    examples, english = _examples(domain, language), _examples(domain, "en")
    texts_of = _texts_by_part(domain)
    numbers: dict[str, list[int]] = {part: [] for part in PARTS}
    for number in range(min(len(examples), len(english))):
        part, (text, label) = block_part(domain, number), examples[number]
        fits = 10 <= len(english[number][0]) <= LONGEST and label in CLASSES
        if part is not None and fits:
            others = [texts_of[other] for other in PARTS if other != part]
            if part == "test" or not any(text.casefold() in seen for seen in others):
                numbers[part].append(number)
    chosen = {part: draw(numbers[part], SIZES[part], f"{name(cell)} {part}") for part in PARTS}
    return Task(
        name(cell),
        CLASSES,
        {part: tuple(examples[n][0] for n in chosen[part]) for part in PARTS},
        {part: tuple(CLASSES.index(examples[n][1]) for n in chosen[part]) for part in PARTS},
    )


def tasks(cells: Iterable[Cell]) -> list[Task]:
    """Return the tasks of some cells."""
    return [cell_task(cell) for cell in cells]


def block_part(domain: str, number: int) -> str | None:
    """Return a sentence's part; None near the border of its block."""
    inside = MARGIN <= number % BLOCK < BLOCK - MARGIN
    return part_of(f"{domain} {number // BLOCK}") if inside else None


@cache
def _examples(domain: str, language: str) -> tuple[tuple[str, str], ...]:
    folder: Path = TEXTS.folder() / "multiemo"
    return read_examples(folder / f"{domain}_sentence_{language}" / "task.json")


@cache
def _texts_by_part(domain: str) -> dict[str, set[str]]:
    """Return a domain's texts in all languages by part, in lower case."""
    found: dict[str, set[str]] = {part: set() for part in PARTS}
    for language in LANGUAGES:
        for number, (text, _) in enumerate(_examples(domain, language)):
            home = block_part(domain, number)
            if home is not None:
                found[home].add(text.casefold())
    return found
