# SPDX-License-Identifier: Apache-2.0
"""Single tasks with short texts and fixed labels, from BIG-bench."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from . import multiemo
from .package_data import TEXTS
from .texts import PARTS, Task, draw, folded, part_of, read_examples

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

TUNING = (
    "multiemo/hotels_sentence_pl", "multiemo/products_sentence_de", "multiemo/reviews_sentence_fr",
)  # fmt: skip
"""Sets for choosing rates."""

SOURCES = (
    "multiemo/hotels_sentence_it", "multiemo/medicine_sentence_en",
    "multiemo/medicine_sentence_pt", "multiemo/products_sentence_en",
    "multiemo/products_sentence_nl", "multiemo/reviews_sentence_en", "multiemo/reviews_sentence_es",
)  # fmt: skip
"""Sets for shared parts only: banks, skills and adapters that all users build on."""

STEMS = {
    "fact_checker/fever": r"made: ((?:The |An? )?\S+(?: [A-Z0-9(]\S*)*)",  # the claim's subject
    "implicatures": r"Speaker 1: (.*) Speaker 2:",
    "logical_fallacy_detection": r"Invalid'[^.?!]*[.?!] (.*?)(?:Therefore|$)",  # the premises
    "metaphor_boolean": r"(.*)<-->",
    "movie_dialog_same_or_different": r"(.*) -----",  # the dialog
    "vitaminc_fact_verification": r"(.*?):",  # the page
    "winowhy": r"(.*)The '[^']*' refers to",
}
"""Sets where many texts begin alike, and what they have in common: it is in one part only."""

TWINS = ("metaphor_boolean", "winowhy")
"""Sets whose stems come in pairs that differ in a word or two; both are in one part."""


def set_task(name: str, longest: int = 160) -> Task:
    """Return a set as a task, without texts of more than `longest` characters or without a word.

    Texts are divided by the digest of their stem, or their own, so that texts that are equal or
    that share a stem are in one part; those of MultiEmo by blocks of 20 sentences, the same in all
    languages, as in `multiemo.py`.
    """
    path: Path = TEXTS.folder() / name / "task.json"
    examples = read_examples(path)
    classes = tuple(sorted({label for _, label in examples}))
    kept: dict[str, int] = {}
    for number, (text, _) in enumerate(examples):
        if len(text) <= longest:
            kept.setdefault(folded(text), number)
    kept.pop("", None)
    domain = name.removeprefix("multiemo/").split("_")[0]
    groups = _groups(name, [examples[number][0] for number in kept.values()])
    numbers: dict[str, list[int]] = {part: [] for part in PARTS}
    for number, group in zip(kept.values(), groups, strict=True):
        is_grid = domain in multiemo.DOMAINS
        part = multiemo.block_part(domain, number) if is_grid else part_of(f"{name} {group}")
        if part is not None:
            numbers[part].append(number)
    chosen = {part: draw(numbers[part], SIZES[part], f"{name} {part}") for part in PARTS}
    return Task(
        name,
        classes,
        {part: tuple(examples[n][0] for n in chosen[part]) for part in PARTS},
        {part: tuple(classes.index(examples[n][1]) for n in chosen[part]) for part in PARTS},
    )


def tasks(names: Sequence[str]) -> list[Task]:
    """Return the tasks of some sets."""
    return [set_task(name) for name in names]


def _groups(name: str, texts: Sequence[str]) -> list[str]:
    """Return the name of each text's group: its stem, or all of it, in folded form."""
    found = [re.match(f".*?{STEMS[name]}" if name in STEMS else "(.*)", text) for text in texts]
    stems = [folded(match[1] if match else text) for match, text in zip(found, texts, strict=True)]
    if name not in TWINS:
        return stems
    leader = {stem: stem for stem in stems}
    for stem, words in (sets := {stem: set(stem.split()) for stem in leader}).items():
        for other in sets:
            if other == stem:
                break
            if len(words & sets[other]) >= 0.6 * len(words | sets[other]):
                one, two = leader[stem], leader[other]
                leader = {key: two if value == one else value for key, value in leader.items()}
    return [leader[stem] for stem in stems]
