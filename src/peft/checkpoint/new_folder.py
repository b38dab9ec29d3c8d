# SPDX-License-Identifier: Apache-2.0
"""Make a folder with many files in one step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from ..base.errors import PeftError, PeftValueError
from .files import set_mode, write_error
from .paths import as_folder


def check_new_folder(path: str | os.PathLike[str], sign: str, replace: bool) -> Path:
    """Return a path as that of a folder to make.

    Raises:
        PeftValueError: There is something at the path, and `replace` is False, or the folder lacks
            the file `sign`, by which one that may be replaced is known.
    """
    folder = as_folder(path)
    if folder.is_dir() and any(folder.iterdir()):
        if not replace:
            raise PeftValueError(f"'{folder}' exists already and is not empty; choose a new name.")
        if not (folder / sign).is_file():
            raise PeftValueError(
                f"'{folder}' has no '{sign}', so it is not replaced; choose a new name."
            )
    return folder


@contextmanager
def new_folder(path: str | os.PathLike[str], sign: str, replace: bool) -> Iterator[Path]:
    """Context with a folder to fill, which gets its name when it is complete; an error removes it.

    Raises:
        PeftValueError: As `check_new_folder`.
        CheckpointWriteError: The folder can't be made or renamed.
    """
    folder = check_new_folder(path, sign, replace)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    except OSError as error:
        raise write_error(f"'{folder}' can't be written: {error}", error) from error
    try:
        yield temporary
        set_mode(temporary, 0o777 & ~_umask())  # mkdtemp makes it readable by its owner alone
        _rename(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, PeftError):
            raise write_error(f"'{folder}' can't be written: {error}", error) from error
        raise


def _rename(temporary: Path, folder: Path) -> None:
    """Put a finished folder in place of an old one."""
    if not folder.exists():
        os.replace(temporary, folder)
        return
    aside = Path(mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".old"))
    os.replace(folder, aside / "old")
    try:
        os.replace(temporary, folder)
    except BaseException:
        os.replace(aside / "old", folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
