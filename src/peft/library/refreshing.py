# SPDX-License-Identifier: Apache-2.0
"""Bring an index up to date with the files: read what changed, keep what its owner wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ..base.progress import track
from .configs import config_digest, config_from, facts_of
from .entry import AdapterEntry, Place, Stamps
from .index import Exclusion, Index
from .inspecting import UnfitError, check_keys, inspect_folder, is_lasting, reason_of
from .naming import default_name, free_name
from .pack import AdapterPack
from .scanning import Files, Scan, scan


class LibraryChanges(NamedTuple):
    """Changes of a refresh: names of adapters, and paths of what is left out. It is true if there
    is any.

    Args:
        added: New adapters.
        changed: Adapters whose files changed.
        dropped: Adapters whose files are gone.
        left_out: Folders and files that are newly left out.
    """

    added: list[str]
    changed: list[str]
    dropped: list[str]
    left_out: list[str]

    def __bool__(self) -> bool:
        return any(self)

    def __str__(self) -> str:
        return ", ".join(
            f"{len(names)} {word.replace('_', ' ')}" for word, names in self._asdict().items()
        )

    @classmethod
    def between(cls, before: Index, after: Index) -> LibraryChanges:
        """Return the changes from one index to another."""
        old, new = before.entries, after.entries
        return cls(
            sorted(entry.name for place, entry in new.items() if place not in old),
            sorted(
                entry.name
                for place, entry in new.items()
                if place in old and entry.version != old[place].version
            ),
            sorted(entry.name for place, entry in old.items() if place not in new),
            sorted(after.left_out.keys() - before.left_out.keys()),
        )


@dataclass
class Findings:
    """Adapters below a folder, compared with an index.

    Args:
        before: The index that it was compared with.
        entries: Adapters that are new or changed, without names.
        unchanged: Places of adapters with the same files.
        left_out: What is left out, by path.
    """

    before: Index
    entries: dict[Place, AdapterEntry] = field(default_factory=dict)
    unchanged: set[Place] = field(default_factory=set)
    left_out: dict[str, Exclusion] = field(default_factory=dict)

    def apply(self, root: Path, index: Index) -> None:
        """Bring an index up to date, which others may have changed in the meantime."""
        present = self.unchanged | self.entries.keys()
        gone = [
            entry
            for place, entry in index.entries.items()
            if place not in present
            and not place.repo
            # Added by others after this one looked.
            and (place in self.before.entries or not _exists(root, place))
        ]
        for entry in gone:
            del index.entries[entry.place]
            if entry.tags or entry.scores or entry.name != default_name(entry.place):
                index.lost[entry.place] = entry
        for place in self.unchanged - index.entries.keys() - index.removed:
            if _exists(root, place):  # the file of the index is gone, or was never written
                index.entries[place] = self.before.entries[place]
        taken = {entry.name for entry in index.entries.values()}
        for place, entry in sorted(self.entries.items()):
            known = index.entries.get(place)
            if known is not None and known.stamps != self._stamps_before(place):
                continue  # another process has read it since
            known = known or index.lost.pop(place, None) or _moved(entry, place, index.lost)
            name = known.name if known is not None else default_name(place)
            if place not in index.entries:
                name = free_name(name, taken)
                taken.add(name)
            index.entries[place] = replace(
                entry,
                name=name,
                place=place,
                tags=known.tags if known is not None else (),
                scores=known.scores if known is not None else {},
            )
        for place in index.entries.keys() & index.removed:
            del index.entries[place]
        index.left_out = dict(self.left_out)
        index.removed = {place for place in index.removed if _exists(root, place)}

    def _stamps_before(self, place: Place) -> Stamps | None:
        entry = self.before.entries.get(place)
        return None if entry is None else entry.stamps


def _moved(entry: AdapterEntry, to: Place, lost: dict[Place, AdapterEntry]) -> AdapterEntry | None:
    """Take out the lost entry of the same weights under another path, named for the new one."""
    place = next((place for place, other in lost.items() if other.sha256 == entry.sha256), None)
    if place is None:
        return None
    known = lost.pop(place)
    is_own = known.name != default_name(place)
    return known if is_own else replace(known, name=default_name(to))


def look(root: Path, index: Index, follow_links: bool) -> Findings:
    """Compare the files below a folder with an index. Files with the same stamps are not read."""
    found = scan(os.fspath(root), follow_links)
    left_out = {path: Exclusion(reason, ()) for path, reason in found.left_out.items()}
    result = Findings(index, left_out=left_out)
    for place in index.removed:
        result.left_out.pop(place.path, None)
    waiting = list(_changed(found, result))
    for path, files in track(waiting, "Indexing adapters", unit="adapter"):
        if path in found.packs:
            _look_into_pack(root, path, files, result)
        else:
            _look_into_folder(root, path, files, result)
    return result


def _changed(found: Scan, result: Findings) -> Iterator[tuple[str, Files]]:
    """Yield the folders and packs to read; note the others as unchanged."""
    index = result.before
    members: dict[str, list[AdapterEntry]] = {}
    for entry in index.entries.values():
        if entry.place.member:
            members.setdefault(entry.place.path, []).append(entry)
    for path, files in found.adapters.items():
        place = Place(path)
        known = index.entries.get(place)
        if place in index.removed:
            continue
        if known is not None and _is_as_it_was(known, files):
            result.unchanged.add(place)
        elif not _is_left_out(path, files, result):
            yield path, files
    for path, files in found.packs.items():
        own = members.get(path, [])
        if own and all(_is_as_it_was(entry, files) for entry in own):
            result.unchanged.update(entry.place for entry in own)
        elif not _is_left_out(path, files, result):
            yield path, files


def _is_as_it_was(entry: AdapterEntry, files: Files) -> bool:
    """Return whether an entry is that of some files; one without all digests is made again."""
    return entry.stamps == files.stamps and bool(entry.config_sha256)


def _is_left_out(path: str, files: Files, result: Findings) -> bool:
    """Note a path that was left out before and has the same files; return whether it is one."""
    known = result.before.left_out.get(path)
    if known is None or known.stamps != files.stamps:
        return False
    result.left_out[path] = known
    return True


def _look_into_folder(root: Path, path: str, files: Files, result: Findings) -> None:
    """Read an adapter in a folder, and note it or why it is left out."""
    place = Place(path)
    try:
        result.entries[place] = inspect_folder(root / path, files, result.before.entries.get(place))
    except UnfitError as error:
        result.left_out[path] = Exclusion(str(error), files.stamps if error.is_lasting else ())


def _look_into_pack(root: Path, path: str, files: Files, result: Findings) -> None:
    """Read names, configs and digests of a pack, and note its members."""
    try:
        with AdapterPack(root / path) as pack:
            digests = pack.digests()
            facts = []
            for kind in pack.kinds:
                fact = facts_of(
                    config_from(kind.config, root / path), kind.layout.nbytes, root / path
                )
                check_keys(list(kind.layout.spans), fact.method)
                config_sha256 = config_digest(kind.config, root / path)
                facts.append((fact, kind.layout.file_size, config_sha256))
            for name in pack:
                place = Place(path, name)
                if place not in result.before.removed:
                    fact, size, config_sha256 = facts[pack.row(name).kind]
                    result.entries[place] = AdapterEntry(
                        "",
                        place,
                        *fact,
                        bytes=size,
                        sha256=digests[name],
                        config_sha256=config_sha256,
                        stamps=files.stamps,
                    )
    except Exception as error:  # a foreign file may hold anything
        stamps = files.stamps if is_lasting(error) else ()
        result.left_out[path] = Exclusion(reason_of(error), stamps)


def _exists(root: Path, place: Place) -> bool:
    return bool(place.repo) or os.path.exists(root / place.path)
