# SPDX-License-Identifier: Apache-2.0
"""Read adapters where the index says they are, and tell if they are still the ones it lists."""

from __future__ import annotations

import os
from pathlib import Path
from threading import RLock
from typing import TypeAlias

from torch import Tensor

from ..base.constants import CONFIG_NAME, WEIGHTS_FILES
from ..base.errors import CheckpointError, CheckpointNotFoundError
from ..checkpoint.hub import HubOptions, find_file
from ..config import PeftConfig
from .configs import config_digest
from .content import Content, ContentCache, read_folder
from .entry import AdapterEntry, Place, Stamp
from .pack import AdapterPack
from .scanning import stamp_of

State: TypeAlias = dict[str, Tensor]


class ChangedError(CheckpointError):
    """The weights or the config of an adapter are not those that the index lists."""


class Reader:
    """Reads adapters of a library, and keeps those that were read last.

    Args:
        folder: The library's folder.
        cache: Keeps what was read.
    """

    def __init__(self, folder: Path, cache: ContentCache) -> None:
        self._folder, self._cache = folder, cache
        self._packs: dict[str, tuple[Stamp, AdapterPack]] = {}
        self._lock = RLock()

    def __getstate__(self) -> tuple[Path, ContentCache]:
        """Leave open files out of copies."""
        return self._folder, self._cache

    def __setstate__(self, state: tuple[Path, ContentCache]) -> None:
        vars(self).update(vars(Reader(*state)))

    def content(self, entry: AdapterEntry) -> Content:
        """Return an adapter's content, from memory if it is there."""
        content = self._cache.get(entry.place, entry.version)
        if content is None:
            content = self.fresh(entry).with_shared(self._cache.shared())
            content = self._cache.put(entry.place, entry.version, content)
        return content

    def fresh(self, entry: AdapterEntry) -> Content:
        """Read an adapter from its files.

        Raises:
            CheckpointNotFoundError: They are gone.
            ChangedError: The weights or the config have another digest than the index lists.
            CheckpointError: They are damaged.
        """
        place = entry.place
        if place.member:
            pack = self._pack(place.path)
            if place.member not in pack:
                raise CheckpointNotFoundError(
                    f"Adapter {entry.name!r} is no longer in '{pack.path}'; `refresh()`."
                )
            content, sha256 = pack.content(place.member), pack.digest(place.member)
        else:
            folder, weights, source = self._files(place)
            content, sha256 = read_folder(folder, weights, source)
        changed = "weights" if sha256 != entry.sha256 else ""
        if not changed and entry.config_sha256:  # an earlier version of the package wrote none
            config = config_digest(content.config_text, f"{place}/{CONFIG_NAME}")
            changed = "settings in its config" if config != entry.config_sha256 else ""
        if changed:
            raise ChangedError(
                f"Adapter {entry.name!r} has other {changed} than when it was indexed. If they are "
                "meant, `refresh()` reads them."
            )
        return content

    def source(self, entry: AdapterEntry) -> str | dict[str, str] | tuple[PeftConfig, State]:
        """Return where another part of the package reads an adapter: its folder, its repository on
        the Hub, or its config and tensors if it is in a pack.

        Raises:
            As `content`; other files than those in the index are an error here already.
        """
        place = entry.place
        if place.member:
            adapter = self.content(entry).adapter()
            return adapter.config, adapter.tensors
        self.fresh(entry)  # what is in memory may be older than the files
        if place.repo:
            return {"source": place.repo, **place.hub_options}
        return os.path.abspath(self._folder / place.path)

    def _files(self, place: Place) -> tuple[Path, str, tuple[str, HubOptions]]:
        """Return the folder of an adapter, the name of its weights, and its source."""
        if place.repo:
            options = place.hub_options
            config = find_file(place.repo, (CONFIG_NAME,), options)
            name = find_file(place.repo, WEIGHTS_FILES, options).name
            return config.parent, name, (place.repo, options)
        folder = self._folder / place.path
        weights = next((n for n in WEIGHTS_FILES if (folder / n).is_file()), WEIGHTS_FILES[0])
        return folder, weights, (os.path.abspath(folder), {})

    def _pack(self, path: str) -> AdapterPack:
        """Return a pack, opened again if its file was replaced."""
        file = self._folder / path
        try:
            stamp = stamp_of(os.stat(file))
        except OSError:
            raise CheckpointNotFoundError(f"Can't find the pack '{file}'.") from None
        with self._lock:
            known = self._packs.get(path)
            if known is None or known[0] != stamp:
                known = self._packs[path] = stamp, AdapterPack(file)
            return known[1]
