# SPDX-License-Identifier: Apache-2.0
"""The adapters below a folder, found in one pass over it that reads no file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import NamedTuple

from ..base.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_FILES
from ..base.errors import CheckpointError
from .entry import PACK_SUFFIX, Stamp, Stamps

_FILES = (CONFIG_NAME, *WEIGHTS_FILES)


class Files(NamedTuple):
    """The files of an adapter in a folder, or a pack: the name of the weights and the stamps."""

    weights: str
    stamps: Stamps


@dataclass
class Scan:
    """Adapters found below a folder, by path in it.

    Args:
        adapters: Folders with an adapter's files.
        packs: Files with many adapters.
        left_out: Folders and links that look like adapters and can't be read, with the reason.
    """

    adapters: dict[str, Files] = field(default_factory=dict)
    packs: dict[str, Files] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def stamp_of(found: os.stat_result) -> Stamp:
    """Return the stamp of a file."""
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def scan(root: str, follow_links: bool = False) -> Scan:
    """Find the adapters below a folder, which has to be readable itself.

    Hidden folders are passed over. A link to a folder is followed if `follow_links`, each folder
    once; else it is listed among what is left out, as are links of files that lead out of `root`.
    """
    result, real_root = Scan(), os.path.realpath(root)
    seen = {real_root}
    waiting = [("", root)]
    while waiting:
        path, folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                there = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not path:
                raise CheckpointError(f"The folder '{root}' can't be read: {error}.") from error
            result.left_out[path] = f"The folder can't be read: {error.strerror or error}."
            continue
        files: dict[str, os.DirEntry[str]] = {}
        below = []
        for entry in there:
            name = f"{path}/{entry.name}" if path else entry.name
            if not _is_text(entry.name):
                readable = os.fsencode(name).decode(errors="replace")
                result.left_out[readable] = "Its name is not text in UTF-8."
            elif entry.name in _FILES:
                files[entry.name] = entry
            elif entry.name.startswith("."):
                continue
            elif _is_dir(entry):
                reason = _link_reason(entry, follow_links, seen)
                if reason:
                    result.left_out[name] = reason
                else:
                    below.append((name, entry.path))
            elif entry.name.endswith(PACK_SUFFIX):
                _note(result, name, {entry.name: entry}, real_root, follow_links)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                result.left_out[name] = f"A link to '{os.readlink(entry.path)}', which is missing."
        waiting += reversed(below)
        if files:
            _note(result, path or ".", files, real_root, follow_links)
    return result


def _note(
    result: Scan, path: str, files: dict[str, os.DirEntry[str]], real_root: str, follow_links: bool
) -> None:
    """Note an adapter or pack that consists of some files, or why it is left out."""
    weights = next((name for name in WEIGHTS_FILES if name in files), None)
    is_pack = path.endswith(PACK_SUFFIX) and CONFIG_NAME not in files and weights is None
    if is_pack:
        names = list(files)
    elif weights is None or CONFIG_NAME not in files:
        missing = CONFIG_NAME if weights else SAFETENSORS_WEIGHTS_NAME
        result.left_out[path] = f"There is no '{missing}' beside '{next(iter(files))}'."
        return
    else:
        names = [CONFIG_NAME, weights]
    stamps = []
    for name in names:
        entry = files[name]
        if entry.is_symlink() and not (follow_links or _is_below(entry.path, real_root)):
            target = os.readlink(entry.path)
            result.left_out[path] = (
                f"'{name}' is a link to '{target}', out of the library's folder; "
                "`follow_links=True` reads it."
            )
            return
        try:
            found = os.stat(entry.path)  # `entry.stat` has no inode on Windows
            if not entry.is_file():
                raise OSError(None, "it is no regular file")
        except OSError as error:
            result.left_out[path] = f"'{name}' can't be read: {error.strerror or error}."
            return
        stamps.append(stamp_of(found))
    found_files = Files(names[-1], tuple(stamps))
    (result.packs if is_pack else result.adapters)[path] = found_files


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a ring of links
        return True


def _is_below(path: str, real_folder: str) -> bool:
    """Return whether a path, its links followed, is a folder or lies below it."""
    return os.path.join(os.path.realpath(path), "").startswith(os.path.join(real_folder, ""))


def _link_reason(entry: os.DirEntry[str], follow_links: bool, seen: set[str]) -> str | None:
    """Return why a folder is not entered, None if it is; `seen` are the folders so far."""
    is_link = entry.is_symlink()
    if not is_link and not follow_links:
        return None
    real = os.path.realpath(entry.path)
    if is_link and not os.path.isdir(real):
        return "A link in a ring of links."
    if is_link and _is_below(os.path.dirname(entry.path), real):
        return f"A link to '{real}', a folder that it is in."
    if real in seen:
        return f"'{real}' has been indexed under another path."
    if is_link and not follow_links:
        return f"A link to '{real}'; `follow_links=True` reads what is there."
    seen.add(real)
    return None
