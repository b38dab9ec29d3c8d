# SPDX-License-Identifier: Apache-2.0
"""One adapter in a library's index: its place, its properties, its owner's tags and scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import NamedTuple, TypeGuard

from ..base.errors import PeftTypeError, PeftValueError
from ..base.plain_values import JsonObject
from ..base.tables import in_bytes
from ..base.validation import number

# End of the name of a pack, a file with many adapters.
PACK_SUFFIX = ".adapters.safetensors"


class Place(NamedTuple):
    """The place of an adapter: a folder in the library, a member of a pack in it, or on the Hub.

    Args:
        path: Folder, or pack, in the library, with `/` between names; "." for the library itself.
        member: The adapter's name in the pack.
        repo: Id on the Hub, in place of a path.
        revision: The commit there.
        subfolder: Folder in the repository.
    """

    path: str = ""
    member: str = ""
    repo: str = ""
    revision: str = ""
    subfolder: str = ""

    @property
    def hub_options(self) -> dict[str, str]:
        """The commit and the folder in the repository, as options for the Hub."""
        options = {"revision": self.revision, "subfolder": self.subfolder}
        return {name: value for name, value in options.items() if value}

    def __str__(self) -> str:
        if self.repo:
            below = f"/{self.subfolder}" if self.subfolder else ""
            return f"hub:{self.repo}{below}@{self.revision[:8]}"
        return f"{self.path}#{self.member}" if self.member else self.path


class Stamp(NamedTuple):
    """Size, times and inode of a file: if they are the same, so is the content."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


Stamps = tuple[Stamp, ...]
"""The stamps of an adapter's config and weights, or of the pack that it is in."""


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter of a library.

    Args:
        name: Its name in the library, which it also gets on a model; unique, without dots.
        place: Where it is.
        method: Its `peft_type`: "LORA", "VBLORA", …
        base_model: `base_model_name_or_path` of its config.
        task_type: `task_type` of its config.
        rank: `r` of its config, None for a method without one.
        tasks: Names of the tasks of an adapter with a delta for each task.
        bytes: Size of its weights file; in a pack, of the file that it was made of.
        sha256: Digest of that file.
        config_sha256: Digest of its config, however it is formatted.
        tags: Words that its owner gave it, sorted.
        scores: Numbers that its owner gave it, by name.
        stamps: Size, times and inode of its files when they were last read.
    """

    name: str
    place: Place
    method: str
    base_model: str | None = None
    task_type: str | None = None
    rank: int | None = None
    tasks: tuple[str, ...] = ()
    bytes: int = 0
    sha256: str = ""
    config_sha256: str = ""
    tags: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict, hash=False)
    stamps: Stamps = field(default=(), repr=False)

    def __str__(self) -> str:
        rank = "" if self.rank is None else f" of rank {self.rank}"
        base = "" if self.base_model is None else f" for {self.base_model}"
        return f"{self.name}: {self.method}{rank}{base}, {in_bytes(self.bytes)}, in {self.place}"

    @property
    def version(self) -> tuple[str, str, Stamps]:
        """Digests and stamps, which differ between two versions of the adapter."""
        return self.sha256, self.config_sha256, self.stamps

    def to_json(self) -> JsonObject:
        """Return the entry as a line of the index; fields without a value are left out."""
        place = {key: value for key, value in self.place._asdict().items() if value}
        facts = {
            "method": self.method,
            "base_model": self.base_model,
            "task_type": self.task_type,
            "rank": self.rank,
            "tasks": list(self.tasks),
            "bytes": self.bytes,
            "sha256": self.sha256,
            "config_sha256": self.config_sha256,
            "tags": list(self.tags),
            "scores": dict(self.scores),
            "stamps": [list(stamp) for stamp in self.stamps],
        }
        kept = {key: value for key, value in facts.items() if value not in (None, "", [], {})}
        return {"name": self.name, **place, **kept}

    @classmethod
    def from_json(cls, line: JsonObject) -> AdapterEntry:
        """Make an entry of a line of the index.

        Raises:
            ValueError: It is not such a line; the message says why.
        """
        words = (*Place._fields, "name", "method", "sha256", "config_sha256")
        texts = {key: line.get(key, "") for key in words} | {
            key: line.get(key) or "" for key in ("base_model", "task_type")
        }
        numbers = (line.get("rank", 1), line.get("bytes", 0))
        lists = [line.get(key, []) for key in ("tasks", "tags")]
        scores = line.get("scores", {})
        if not all(isinstance(text, str) for text in texts.values()):
            raise ValueError("a name, path, method or digest is not text")
        if not texts["name"] or not texts["method"] or not (texts["path"] or texts["repo"]):
            raise ValueError("it has no name, method or path")
        if not all(type(value) is int for value in numbers):
            raise ValueError("`rank` or `bytes` is not an integer")
        if not all(isinstance(v, list) and all(isinstance(t, str) for t in v) for v in lists):
            raise ValueError("`tasks` or `tags` is not a list of words")
        if not isinstance(scores, dict) or any(problem for problem in score_problems(scores)):
            raise ValueError("`scores` are not numbers by name")
        check_inside(texts["path"])
        return cls(
            texts["name"],
            Place(*(texts[key] for key in Place._fields)),
            texts["method"],
            texts["base_model"] or None,
            texts["task_type"] or None,
            line.get("rank"),
            tuple(lists[0]),
            numbers[1],
            texts["sha256"],
            texts["config_sha256"],
            tuple(lists[1]),
            scores,
            stamps_of(line),
        )


def stamps_of(line: JsonObject) -> Stamps:
    """Return the stamps in a line of the index; a wrong one is none, so that files are read."""
    try:
        return tuple(Stamp(*map(int, stamp)) for stamp in line.get("stamps", []))
    except (TypeError, ValueError, OverflowError):
        return ()


def check_inside(path: str) -> None:
    """Raise ValueError for a path that leads out of the library's folder."""
    pure = PurePath(path)
    if pure.anchor or ".." in pure.parts:
        raise ValueError(f"the path {path!r} leads out of the library")


def score_problems(scores: Mapping[str, object]) -> Iterable[str]:
    """Yield a sentence for each score that is not a finite number with a name."""
    for name, value in scores.items():
        if not isinstance(name, str) or not name:
            yield f"A score's name {name!r} must be a non-empty string."
        yield from number(f"scores[{name!r}]", value)


def checked_scores(scores: Mapping[str, float] | None) -> dict[str, float]:
    """Return scores as a dictionary, or raise."""
    if scores is not None and not isinstance(scores, Mapping):
        raise PeftTypeError(f"`scores`={scores!r} must be a dictionary: name → number.")
    for problem in score_problems(scores or {}):
        raise PeftValueError(problem)
    return dict(scores or {})


def checked_tags(tags: Iterable[str] | str, name: str = "tags") -> tuple[str, ...]:
    """Return tags sorted, each once, or raise; one word is a list of it."""
    given: list[object] = [*tags] if _is_several(tags) else [tags]
    words = [word for word in given if isinstance(word, str) and word.strip() and "\n" not in word]
    if odd := [word for word in given if word not in words]:
        raise PeftValueError(f"`{name}` has {odd[0]!r}; a tag is a word in one line.")
    return tuple(sorted(set(words)))


def _is_several(value: object) -> TypeGuard[Iterable[object]]:
    return isinstance(value, Iterable) and not isinstance(value, str)
