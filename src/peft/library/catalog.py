# SPDX-License-Identifier: Apache-2.0
"""The adapters of an index by name."""

from __future__ import annotations

from pathlib import Path

from ..base.errors import PeftTypeError, PeftValueError
from ..base.suggestions import did_you_mean
from ..core.adapter_names import check_name
from .entry import AdapterEntry, Place
from .index import Index, LeftOut
from .listing import AdapterList
from .naming import Names, listed, name_of


class Catalog:
    """The adapters of an index by name; it never changes.

    Args:
        folder: The library's folder, for messages.
        index: The index.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder = folder
        self.index = index
        self.names = index.names()

    def entries(self) -> AdapterList:
        """Return all adapters, by name."""
        return AdapterList(self.names[name] for name in sorted(self.names))

    def left_out(self) -> list[LeftOut]:
        """Return what is left out, by path."""
        return [LeftOut(path, left.reason) for path, left in sorted(self.index.left_out.items())]

    def find(self, name: object) -> AdapterEntry:
        """Return the entry of a name, of a path, or of an entry's name.

        Raises:
            PeftTypeError: It is none of these.
            PeftValueError: There is none.
        """
        name = name_of(name)
        if not isinstance(name, str):
            raise PeftTypeError(f"An adapter is named by a string, got {name!r}.")
        found = self.names.get(name) or self.index.entries.get(Place(name))
        if found is None:
            left = self.index.left_out.get(name)
            why = f" It is left out: {left.reason}" if left else did_you_mean(name, self.names)
            raise PeftValueError(
                f"The library '{self._folder}' has no adapter {name!r} among "
                f"{len(self.names)}.{why}"
            )
        return found

    def find_all(self, names: Names) -> list[AdapterEntry]:
        """Return the entries of names, each once, or raise as `find`."""
        return list({entry.name: entry for entry in map(self.find, listed(names))}.values())

    def places(self, names: Names) -> set[Place]:
        """Return the places of adapters, of those whose files are gone, and of what is left out or
        removed, by its path.
        """
        index, found = self.index, set()
        lost: dict[object, Place] = {entry.name: place for place, entry in index.lost.items()}
        for name in listed(names):
            is_path = isinstance(name, str) and name not in self.names
            if is_path and (name in index.left_out or Place(str(name)) in index.removed):
                found.add(Place(str(name)))
            elif is_path and name in lost:
                found.add(lost[name])
            else:
                found.add(self.find(name).place)
        return found

    def check_new(self, name: str, place: Place) -> None:
        """Check that a name can be one, and is not that of an adapter elsewhere.

        Raises:
            PeftTypeError: It is not a string.
            PeftValueError: It is no name, or taken.
        """
        check_name(name, ())
        if name in self.names and self.names[name].place != place:
            raise PeftValueError(
                f"The library has an adapter {name!r} already; choose another name."
            )
