# SPDX-License-Identifier: Apache-2.0
"""Lists of adapters, and of problems with them, that print as tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..base.errors import PeftTypeError, PeftValueError
from ..base.plain_values import JsonObject
from ..base.registry import registered_methods
from ..base.suggestions import did_you_mean
from ..base.tables import in_bytes, table
from .entry import AdapterEntry, checked_scores

# Rows of a table that are printed; a library may have thousands.
_SHOWN = 40


class AdapterList(tuple[AdapterEntry, ...]):
    """Adapters of a library. Print it for a table."""

    __slots__ = ()

    @property
    def names(self) -> list[str]:
        """The adapters' names."""
        return [entry.name for entry in self]

    @property
    def bytes(self) -> int:
        """Size of all weights files."""
        return sum(entry.bytes for entry in self)

    def to_json(self) -> list[JsonObject]:
        """Return the entries as objects of JSON, as they are in the index."""
        return [entry.to_json() for entry in self]

    def __str__(self) -> str:
        scores = list(dict.fromkeys(name for entry in self for name in entry.scores))
        head = ("name", "method", "rank", "base model", "tasks", "size", "tags", *scores)
        rows = [
            (
                entry.name,
                entry.method,
                "" if entry.rank is None else str(entry.rank),
                entry.base_model or "",
                _some(entry.tasks),
                in_bytes(entry.bytes),
                _some(entry.tags),
                *(f"{entry.scores[name]:.4g}" if name in entry.scores else "" for name in scores),
            )
            for entry in self[:_SHOWN]
        ]
        more = [f"… {len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        total = f"{len(self)} adapters, {in_bytes(self.bytes)}"
        return "\n".join([table([head, *rows], right=[2, 5]), *more, total])


class Problem(NamedTuple):
    """One adapter, or something like it, that can't be used.

    Args:
        name: Its name in the library, or its path if it has none.
        kind: "missing", "changed", "damaged", "left out" or "not indexed".
        detail: A sentence about it.
    """

    name: str
    kind: str
    detail: str


@dataclass(frozen=True)
class LibraryReport:
    """The result of a check. Print it for a table.

    Args:
        checked: Number of adapters whose files were read.
        bytes: Number of bytes read.
        problems: What is wrong.
    """

    checked: int
    bytes: int
    problems: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """True if every adapter in the index is as it was indexed."""
        return all(problem.kind in ("left out", "not indexed") for problem in self.problems)

    def to_json(self) -> JsonObject:
        """Return the report as an object of JSON."""
        problems = [problem._asdict() for problem in self.problems]
        return {"ok": self.ok, "checked": self.checked, "bytes": self.bytes, "problems": problems}

    def __str__(self) -> str:
        lines = [table([Problem._fields, *self.problems[:_SHOWN]])] if self.problems else []
        more = len(self.problems) - _SHOWN
        lines += [f"… {more} more"] if more > 0 else []
        state = "sound" if self.ok else "not sound"
        lines.append(f"{self.checked} adapters checked, {in_bytes(self.bytes)}: {state}")
        return "\n".join(lines)


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:4]) + (f" + {len(words) - 4}" if len(words) > 4 else "")


def select(
    entries: Iterable[AdapterEntry],
    *,
    method: str | Collection[str] | None,
    base_model: str | None,
    task_type: str | None,
    tags: str | Collection[str] | None,
    task: str | None,
    rank: int | None,
    min_scores: Mapping[str, float] | None,
    where: Callable[[AdapterEntry], object] | None,
) -> AdapterList:
    """Return the adapters that have all of some properties; None asks for nothing."""
    found = list(entries)
    methods = {word.upper() for word in _words(method, "method")}
    if unknown := methods.difference(registered_methods()):
        known = registered_methods()
        raise PeftValueError(
            f"`method`={min(unknown)!r} is none of this package, which has {', '.join(known)}."
            f"{did_you_mean(min(unknown), known)}"
        )
    wanted, least = _words(tags, "tags"), checked_scores(min_scores)
    if where is not None and not callable(where):
        raise PeftTypeError(f"`where`={where!r} must be a function of an entry.")
    scores = sorted({name for entry in found for name in entry.scores})
    for name in sorted(least.keys() - set(scores)):
        raise PeftValueError(
            f"No adapter has a score {name!r}; there are {scores}.{did_you_mean(name, scores)}"
        )

    def fits(entry: AdapterEntry) -> bool:
        return (
            (not methods or entry.method in methods)
            and (base_model is None or entry.base_model == base_model)
            and (
                task_type is None or entry.task_type == str(getattr(task_type, "value", task_type))
            )
            and set(wanted) <= set(entry.tags)
            and (task is None or task in entry.tasks)
            and (rank is None or entry.rank == rank)
            and all(entry.scores.get(name, -float("inf")) >= n for name, n in least.items())
            and (where is None or bool(where(entry)))
        )

    return AdapterList(entry for entry in found if fits(entry))


def _words(value: str | Collection[str] | None, name: str) -> list[str]:
    """Return a word, or several, as a list."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    words = list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(word, str) for word in words):
        raise PeftTypeError(f"`{name}`={value!r} must be a word or a list of words.")
    return words
