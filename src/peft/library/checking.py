# SPDX-License-Identifier: Apache-2.0
"""Compare the files of a library with its index."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from ..base.errors import PeftError
from ..base.progress import track
from .entry import AdapterEntry, Place
from .index import Index
from .listing import LibraryReport, Problem
from .reading import ChangedError, Reader
from .scanning import scan


def check(
    root: Path,
    index: Index,
    entries: Sequence[AdapterEntry] | None,
    reader: Reader,
    follow_links: bool,
) -> LibraryReport:
    """Read adapters and compare them with the index; of all adapters, look for others too."""
    chosen = list(index.names().values()) if entries is None else list(entries)
    problems: list[Problem] = []
    shared: dict[str, Tensor] = {}
    size = 0
    for entry in track(chosen, "Checking adapters", unit="adapter"):
        try:
            content = reader.fresh(entry)
            size += content.layout.file_size
            shared |= content.with_shared(shared).shared
        except ChangedError as error:
            problems.append(Problem(entry.name, "changed", str(error)))
        except FileNotFoundError as error:
            problems.append(Problem(entry.name, "missing", str(error)))
        except (PeftError, OSError) as error:
            problems.append(Problem(entry.name, "damaged", str(error)))
    if entries is None:
        problems += _others(root, index, follow_links)
    order = {"missing": 0, "damaged": 1}
    problems.sort(key=lambda problem: (order.get(problem.kind, 2), problem.kind, problem.name))
    return LibraryReport(len(chosen), size, tuple(problems))


def _others(root: Path, index: Index, follow_links: bool) -> Iterator[Problem]:
    """Yield adapters whose files are gone, and what the folder has that is not in the index."""
    for entry in index.lost.values():
        detail = (
            f"Its files in '{entry.place}' are gone; its tags and scores are kept until `remove`."
        )
        yield Problem(entry.name, "missing", detail)
    found = scan(os.fspath(root), follow_links)
    known = {path: left.reason for path, left in index.left_out.items()}
    for path, reason in (found.left_out | known).items():
        if Place(path) not in index.removed:
            yield Problem(path, "left out", reason)
    members = {place.path for place in index.entries if place.member}
    for path in (*found.adapters, *found.packs):
        place = Place(path)
        is_known = place in index.entries or place in index.removed or path in members
        if not is_known and path not in index.left_out:
            yield Problem(path, "not indexed", "It is new; `refresh()` adds it.")
