# SPDX-License-Identifier: Apache-2.0
"""Single tasks with short texts and fixed labels, from BIG-bench."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import multiemo
from .package_data import TEXTS
from .texts import PARTS, Task, drawn, part_of, read_examples

SIZES = {"train": 400, "validation": 100, "test": 300}

CANDIDATES = (
    "fact_checker/fever", "hyperbaton", "implicatures", "intent_recognition",
    "logical_fallacy_detection", "metaphor_boolean", "movie_dialog_same_or_different", "navigate",
    "social_support", "sports_understanding", "strategyqa", "vitaminc_fact_verification", "winowhy",
    "multiemo/hotels_sentence_en", "multiemo/medicine_sentence_de",
    "multiemo/products_sentence_fr", "multiemo/reviews_sentence_pl",
    "multiemo/hotels_sentence_es", "multiemo/medicine_sentence_nl",
)  # fmt: skip
"""Sets with at least 400 examples that share one list of labels, and texts that fit."""

SOURCES = (
    "multiemo/hotels_sentence_it", "multiemo/medicine_sentence_en",
    "multiemo/medicine_sentence_pt", "multiemo/products_sentence_en",
    "multiemo/products_sentence_nl", "multiemo/reviews_sentence_en", "multiemo/reviews_sentence_es",
)  # fmt: skip
"""Sets for shared parts only: banks, skills and adapters that all users build on."""


def set_task(name: str, longest: int = 160) -> Task:
    """Return a set as a task, without texts of more than `longest` characters.

    Texts are divided by their own digest, so that equal texts are in one part; those of MultiEmo by
    blocks of 20 sentences, the same in all languages, as in `multiemo.py`.
    """
    path: Path = TEXTS.folder() / name / "task.json"
    examples = read_examples(path)
    classes = tuple(sorted({label for _, label in examples}))
    numbers: dict[str, list[int]] = {part: [] for part in PARTS}
    seen: set[str] = set()
    for number, (text, _) in enumerate(examples):
        if len(text) <= longest and text.casefold() not in seen:
            seen.add(text.casefold())
            domain = name.removeprefix("multiemo/").split("_")[0]
            is_grid = domain in multiemo.DOMAINS
            key = f"{name} {text}".casefold()
            part = multiemo.block_part(domain, number) if is_grid else part_of(key)
            if part is not None:
                numbers[part].append(number)
    chosen = {part: drawn(numbers[part], SIZES[part], f"{name} {part}") for part in PARTS}
    return Task(
        name,
        classes,
        {part: tuple(examples[n][0] for n in chosen[part]) for part in PARTS},
        {part: tuple(classes.index(examples[n][1]) for n in chosen[part]) for part in PARTS},
    )


def tasks(names: Sequence[str]) -> list[Task]:
    """Return the tasks of some sets."""
    return [set_task(name) for name in names]
