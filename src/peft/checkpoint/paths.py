# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments that are paths, and of files to read."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from torch import nn

from ..base.errors import CheckpointError, CheckpointNotFoundError, PeftTypeError, PeftValueError

# Largest number of characters of a path in the message that it is none.
_SHOWN = 80
_SOURCE = "a folder's path, or the name of a repository on the Hub"


def check_path(path: object, kind: str = _SOURCE) -> None:
    """Check that an argument is a path and not empty; the error names the `kind` to pass."""
    if isinstance(path, (str, os.PathLike)):
        if not os.fspath(path):
            raise PeftValueError(
                "The path '' is empty; name the folder, or pass '.' for the working directory."
            )
        _check_possible(path)
        return
    is_plain = path is None or isinstance(path, (bool, int, float, bytes))
    remedy = " Pass that of the folder which `save_pretrained` wrote." if kind is _SOURCE else ""
    if isinstance(path, nn.Module):
        remedy = " The model is another argument of the call; check their order."
    elif hasattr(path, "peft_type"):
        remedy = " A config is passed as `config=…`, and tells nothing of the weights."
    raise PeftTypeError(
        f"Expected {kind}, got "
        f"{repr(path) if is_plain else f'an object of type {type(path).__name__}'}.{remedy}"
    )


def _check_possible(path: str | os.PathLike) -> None:
    """Raise if no file or folder can have a path, whether or not there is one."""
    try:
        os.lstat(path)
    except ValueError:
        reason = "it has a null character"
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            return
        reason = "it, or a name in it, is too long"
    else:
        return
    text = repr(os.fspath(path))
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    raise PeftValueError(f"{shown} can't be a path: {reason}.")


def as_folder(path: str | os.PathLike) -> Path:
    """Return an argument as a folder's path; raise an error if it is a file, or below a file."""
    check_path(path, "a folder's path")
    folder = Path(path)
    if folder.is_file():
        raise PeftValueError(f"'{folder}' is a file; give the path of a folder.")
    if above := next((parent for parent in folder.parents if parent.is_file()), None):
        raise PeftValueError(f"'{folder}' can't be a folder: '{above}' is a file.")
    return folder


def as_path(path: object, name: str, other: str = "") -> Path:
    """Return an argument as a path; the error names it, and the `other` types that are allowed."""
    if not isinstance(path, (str, os.PathLike)):
        raise PeftTypeError(f"`{name}`={path!r} must be a path{other}, not {type(path).__name__}.")
    _check_possible(path)
    return Path(path)


def as_file(path: object) -> Path:
    """Return the argument `path` as the path of a file to write. Nothing is written yet."""
    file = as_path(path, "path")
    if file.is_dir():
        raise PeftValueError(f"`path`='{file}' is a folder; give the path of a file in it.")
    if above := next((str(parent) for parent in file.parents if parent.is_file()), None):
        raise PeftValueError(
            f"`path`='{file}' can't be written, since '{above}' is a file; give the path of "
            "another file."
        )
    return file


def check_regular(path: Path) -> None:
    """Check that a file can be read: a pipe would wait for its writer, a device might never end.

    Raises:
        CheckpointNotFoundError: There is nothing at the path.
        CheckpointError: There is something else than a file.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointNotFoundError(f"Can't find '{path}'.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' can't be read: {error}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(
            f"'{path}' can't be read: it is a folder, a pipe or a device, not a file."
        )
