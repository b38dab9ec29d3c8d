# SPDX-License-Identifier: Apache-2.0
"""The index of a library: one file with a line of JSON for each adapter.

The first line says the format and its version. Lines that are damaged are passed over, and the file
is kept beside the one that replaces it, so that tags and scores in it are not lost.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ..base.errors import CheckpointError, CheckpointWriteError, PeftError, warn
from ..base.plain_values import JsonObject, json_value
from ..checkpoint.files import alone_in, folder_for, sweep, write_text
from ..checkpoint.paths import check_regular
from .entry import AdapterEntry, Place, Stamp, Stamps, check_inside, stamps_of
from .naming import default_name, free_name
from .scanning import stamp_of

INDEX_NAME = "adapter_library.jsonl"
_FORMAT, _VERSION = "peft adapter library", 1


class LeftOut(NamedTuple):
    """A folder, link or file that is not among the adapters of a library.

    Args:
        path: Its path in the library.
        reason: A sentence that says why.
    """

    path: str
    reason: str


class Exclusion(NamedTuple):
    """The reason why there is no adapter at a path, and the stamps of the files that it is of."""

    reason: str
    stamps: Stamps


@dataclass
class Index:
    """The content of an index.

    Args:
        entries: The adapters by place.
        left_out: What looks like an adapter and is none, by path.
        removed: Places that the owner removed; they stay away until they are added again.
        lost: Adapters with tags, scores or a name of the owner's whose files are gone or broken. If
            the files come back, here or under another path, so does what the owner wrote.
    """

    entries: dict[Place, AdapterEntry] = field(default_factory=dict)
    left_out: dict[str, Exclusion] = field(default_factory=dict)
    removed: set[Place] = field(default_factory=set)
    lost: dict[Place, AdapterEntry] = field(default_factory=dict)

    def names(self) -> dict[str, AdapterEntry]:
        """Return the entries by name."""
        return {entry.name: entry for entry in self.entries.values()}

    def copy(self) -> Index:
        """Return a copy that can be changed."""
        return Index(dict(self.entries), dict(self.left_out), set(self.removed), dict(self.lost))

    def put(self, entry: AdapterEntry) -> None:
        """Add an entry, in place of one of another commit, whose name, tags and scores it gets."""
        commits = [place for place in self.entries if _is_same(place, entry.place)]
        known = [self.entries.pop(place) for place in commits]
        name = known[0].name if known else free_name(default_name(entry.place), self.names())
        tags, scores = (known[0].tags, known[0].scores) if known else ((), {})
        self.entries[entry.place] = replace(entry, name=name, tags=tags, scores=scores)

    def remove(self, places: Iterable[Place]) -> None:
        """Remove what is in places. Adapters stay away until they are added again; those whose
        files are gone are forgotten.
        """
        for place in places:
            was_lost = self.lost.pop(place, None) is not None
            self.entries.pop(place, None)
            self.left_out.pop(place.path, None)
            if not place.repo and not was_lost:
                self.removed.add(place)

    def forget(self, places: Iterable[Place]) -> None:
        """Forget why there are no adapters in places."""
        for place in places:
            self.removed.discard(place)
            self.left_out.pop(place.path, None)

    def lines(self) -> Iterable[JsonObject]:
        """Yield the lines of the file: adapters by name, then the others."""
        yield {"format": _FORMAT, "version": _VERSION}
        for entry in sorted(self.entries.values(), key=lambda entry: entry.name):
            yield entry.to_json()
        for _, entry in sorted(self.lost.items()):
            yield entry.to_json() | {"lost": True}
        for path, (reason, stamps) in sorted(self.left_out.items()):
            yield {"path": path, "left_out": reason, "stamps": [list(s) for s in stamps]}
        for place in sorted(self.removed):
            yield {k: v for k, v in place._asdict().items() if v} | {"removed": True}


def _is_same(one: Place, other: Place) -> bool:
    """Return whether two places are the same but for the commit."""
    return one._replace(revision="") == other._replace(revision="")


class IndexFile:
    """The file of an index. It is read again only if it changed.

    Args:
        path: The file; its folder is made if missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content = Index()
        self._problems: list[str] = []
        self._stamp: Stamp | None = None

    def read(self) -> Index:
        """Return the content of all sound lines; of a file that is not there, the last known one.

        Raises:
            CheckpointError: It was written by a newer version, or can't be read.
        """
        try:
            check_regular(self.path)
            with open(self.path, "rb") as file:
                stamp = stamp_of(os.fstat(file.fileno()))
                if stamp != self._stamp:
                    self._content, self._problems = _parsed(self.path, file.read())
                    self._stamp = stamp
        except FileNotFoundError:
            self._problems, self._stamp = [], None
        except OSError as error:
            if isinstance(error, PeftError):
                raise
            raise CheckpointError(f"The index '{self.path}' can't be read: {error}.") from error
        return self._content

    def change(self, change: Callable[[Index], object], required: bool = True) -> Index:
        """Change the content and write it, while no other process does.

        Args:
            change: Changes the content that it is given, or raises; then the file stays as it is.
            required: False returns the new content even if it can't be written.

        Returns:
            The new content.

        Raises:
            As `read`; and CheckpointWriteError if it can't be written; then it is as it was.
        """
        folder = self.path.parent
        with alone_in(folder) as is_alone:
            before = self.read()
            content = before.copy()
            change(content)
            with suppress(OSError):
                sweep(folder, ".adapter_*.tmp", is_alone)  # of writers that were killed
            if self._stamp is not None and not self._problems and content == before:
                return before
            try:
                if self._problems:
                    self._keep_damaged()
                with folder_for(folder):
                    lines = (json.dumps(line, ensure_ascii=False) for line in content.lines())
                    write_text(self.path, "".join(f"{line}\n" for line in lines))
                    self._stamp = stamp_of(os.stat(self.path))
            except CheckpointWriteError:
                if required:
                    raise
        self._content, self._problems = content, []
        return content

    def _keep_damaged(self) -> None:
        """Keep a damaged file under another name, and warn."""
        file, problems = self.path, self._problems
        kept, number = file.with_name(f"{file.name}.damaged"), 1
        while kept.exists():
            number += 1
            kept = file.with_name(f"{file.name}.damaged-{number}")
        with folder_for(file.parent):
            shutil.copyfile(file, kept)
        more = f"; and {len(problems) - 3} more" if problems[3:] else ""
        warn(
            f"The index '{file}' was damaged ({'; '.join(problems[:3])}{more}) and is built again. "
            "Adapters of these lines are read from their files; their tags and scores are in "
            f"'{kept}'."
        )


def _parsed(file: Path, content: bytes) -> tuple[Index, list[str]]:
    """Return the content of all sound lines of an index, and a sentence for each other one."""
    index, problems = Index(), list[str]()
    names: set[str] = set()
    for number, text in enumerate(content.split(b"\n"), 1):
        if not text.strip() and number > 1:
            continue
        try:
            line = json_value(text.decode())
            if not isinstance(line, dict):
                raise ValueError("it is no JSON object")
            if number == 1 or "format" in line:
                _check_version(file, line)
                continue
            _add_line(index, line, names)
        except (ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            problems.append(f"line {number} is damaged: {error}")
    return index, problems


def _check_version(file: Path, line: JsonObject) -> None:
    """Raise ValueError unless a line is an index's first; `CheckpointError` if it is a newer's."""
    version = line.get("version")
    if line.get("format") != _FORMAT or type(version) is not int:
        raise ValueError(f"it does not begin with the format {_FORMAT!r} and its version")
    if version > _VERSION:
        raise CheckpointError(
            f"The index '{file}' has version {version}, and this package writes {_VERSION}; "
            "use a newer version of it, or pass another `index` file. Nothing was changed."
        )


def _add_line(index: Index, line: JsonObject, names: set[str]) -> None:
    """Add a line to an index, or raise ValueError."""
    if "left_out" in line:
        check_inside(str(line["path"]))
        exclusion = Exclusion(str(line["left_out"]), stamps_of(line))
        index.left_out[str(line["path"])] = exclusion
    elif line.get("removed"):
        index.removed.add(Place(*(str(line.get(key, "")) for key in Place._fields)))
    else:
        entry = AdapterEntry.from_json(line)
        if line.get("lost"):
            index.lost[entry.place] = entry
            return
        if entry.name in names or entry.place in index.entries:
            raise ValueError(f"{entry.name!r} is listed twice")
        names.add(entry.name)
        index.entries[entry.place] = entry
