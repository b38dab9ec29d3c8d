# SPDX-License-Identifier: Apache-2.0
"""Bring adapters into a library, from other folders and from the Hub, and delete their files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from ..base.constants import CONFIG_NAME, WEIGHTS_FILES
from ..base.errors import CheckpointError, CheckpointNotFoundError, PeftValueError
from ..checkpoint.digests import adapter_digest
from ..checkpoint.files import (
    alone_in,
    folder_for,
    read_config_text,
    set_mode,
    sweep,
    sync,
    sync_folder,
)
from ..checkpoint.hub import HubOptions, find_file
from .entry import AdapterEntry, Place
from .inspecting import UnfitError, inspect_folder
from .pack import AdapterPack
from .scanning import scan

_CARD = "README.md"
# Adapters are copied into a folder of this name, which is then renamed.
_UNFINISHED = ".library_copy_"


def on_hub(repo: str, options: HubOptions) -> AdapterEntry:
    """Return an entry, without a name, of an adapter on the Hub or in its cache.

    Raises:
        CheckpointNotFoundError: There is none.
        CheckpointError: It is broken, or this package can't load it.
    """
    folder = find_file(repo, (CONFIG_NAME,), options).parent
    find_file(repo, WEIGHTS_FILES, options)
    parts = folder.parts
    # The cache has a folder for each commit.
    is_cached = "snapshots" in parts[:-1]
    revision = parts[parts.index("snapshots") + 1] if is_cached else options.get("revision")
    place = Place("", "", repo, str(revision or ""), str(options.get("subfolder") or ""))
    found = scan(os.fspath(folder), follow_links=True)
    try:
        if "." not in found.adapters:
            raise UnfitError(found.left_out.get(".", "Its files are not in one folder."))
        entry = inspect_folder(folder, found.adapters["."])
    except UnfitError as error:
        raise CheckpointError(f"'{repo}' can't be added to the library. {error}") from None
    return replace(entry, place=place)


def path_in(root: Path, folder: Path, name: str | None) -> str:
    """Return the path that an adapter's folder has in a library, or that a copy of it will have."""
    for inside, outside in ((folder, root), (folder.resolve(), root.resolve())):
        path = os.path.relpath(inside, outside)
        if path.split(os.sep)[0] != os.pardir:
            return path.replace(os.sep, "/")
    return name or folder.resolve().name


def copy_in(root: Path, folder: Path, path: str) -> None:
    """Copy an adapter's folder into a library, unless it is there.

    Raises:
        CheckpointError: It has no adapter, or can't be copied; nothing is left behind.
        PeftValueError: The library has another folder of that name.
    """
    target = root / path
    if target.exists() and (target.samefile(folder) or _is_copy(target, folder)):
        return
    if target.exists():
        raise PeftValueError(
            f"The library has a folder '{target}' already; pass another `name` for the copy."
        )
    found = scan(os.fspath(folder), follow_links=True)
    if "." not in found.adapters:
        raise CheckpointError(
            f"'{folder}' can't be added to the library. "
            f"{found.left_out.get('.', f'It has no {CONFIG_NAME!r}.')}"
        )
    _copy(folder, found.adapters["."].weights, root, target)


def _is_copy(target: Path, folder: Path) -> bool:
    """Return whether a folder has the adapter of another one."""
    try:
        return adapter_digest(target) == adapter_digest(folder)
    except (CheckpointError, CheckpointNotFoundError):
        return False


def _copy(folder: Path, weights: str, root: Path, target: Path) -> None:
    """Copy an adapter's files to a new folder, which appears with all of them."""
    with folder_for(root), alone_in(root) as is_alone:
        sweep(root, f"{_UNFINISHED}*", is_alone)  # of processes that were killed
        unfinished = Path(tempfile.mkdtemp(dir=root, prefix=_UNFINISHED))
        try:
            text = BytesIO(read_config_text(folder / CONFIG_NAME).encode())
            _write_synced(unfinished / CONFIG_NAME, text)
            for name in (weights, *([_CARD] if (folder / _CARD).is_file() else [])):
                with open(folder / name, "rb") as source:
                    _write_synced(unfinished / name, source)
            sync_folder(unfinished)
            target.parent.mkdir(parents=True, exist_ok=True)
            set_mode(unfinished, target.parent.stat().st_mode & 0o777)
            unfinished.rename(target)
            sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def _write_synced(path: Path, source: BinaryIO) -> None:
    """Write a file that is on the disk when this returns."""
    with open(path, "wb") as file:
        shutil.copyfileobj(source, file)
        file.flush()
        sync(file.fileno())


def delete(root: Path, places: Collection[Place]) -> None:
    """Delete the files of adapters in folders, and members of packs."""
    packs: dict[str, list[str]] = {}
    for place in places:
        if place.member:
            packs.setdefault(place.path, []).append(place.member)
            continue
        folder = root / place.path
        with folder_for(folder), alone_in(folder):
            waiting = [path.name for path in folder.glob(".adapter_*")]
            for name in (*WEIGHTS_FILES, CONFIG_NAME, _CARD, *waiting):
                (folder / name).unlink(missing_ok=True)
        if folder != root:
            with suppress(OSError):  # it has other files
                folder.rmdir()
    for path, members in packs.items():
        with AdapterPack(root / path) as pack:
            if len(members) == len(pack):
                (root / path).unlink()
            else:
                pack.update(remove=members).close()
