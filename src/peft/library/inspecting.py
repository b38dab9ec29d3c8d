# SPDX-License-Identifier: Apache-2.0
"""Properties of an adapter, read from its config and the header of its weights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from ..base.constants import CONFIG_NAME
from ..base.errors import PeftError
from ..base.registry import PEFT_TYPE_TO_PREFIX_MAPPING, PeftType
from ..checkpoint.files import read_config_text, read_shapes
from ..checkpoint.layout import read_layout
from .configs import config_digest, config_from, facts_of
from .entry import AdapterEntry, Place
from .scanning import Files, stamp_of

# A config has some hundred bytes; a file of this size is something else.
_LARGEST_CONFIG = 1 << 24
_BLOCK = 1 << 20


class UnfitError(Exception):
    """A folder has no adapter that this package can load; the message says why.

    Attributes:
        is_lasting: False if it may have one now, though its files are the same.
    """

    is_lasting = True


def check_keys(layout_keys: list[str], method: str) -> None:
    """Raise UnfitError if no key of a weights file is one of a method."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(method)]
    if not any(part.startswith(prefix) for key in layout_keys for part in key.split(".")):
        shown = f", but `{layout_keys[0]}`" if layout_keys else "; it is empty"
        raise UnfitError(f"The weights have no tensor of {method} (`{prefix}…`){shown}.")


def inspect_folder(folder: Path, files: Files, known: AdapterEntry | None = None) -> AdapterEntry:
    """Return the entry of an adapter in a folder, from its config and the header of its weights;
    the tensors are read for a new digest only.

    Args:
        folder: The folder.
        files: The files and their stamps.
        known: The entry so far; its digest is kept where the stamp of the weights is the same.

    Returns:
        An entry without name, place, tags and scores.

    Raises:
        UnfitError: It is none that this package can load.
    """
    config_stamp, weights_stamp = files.stamps
    weights = folder / files.weights
    try:
        if config_stamp.size > _LARGEST_CONFIG:
            raise UnfitError(f"'{CONFIG_NAME}' has {config_stamp.size:,} bytes; that is no config.")
        text = read_config_text(folder / CONFIG_NAME)
        config = config_from(text, folder / CONFIG_NAME)
        config_sha256 = config_digest(text, folder / CONFIG_NAME)
        is_same = known is not None and known.stamps[1:] == (weights_stamp,)
        with open(weights, "rb") as file:
            if weights.suffix == ".safetensors":
                layout = read_layout(file, os.fstat(file.fileno()).st_size, weights)
                keys = list(layout.spans)
            else:
                keys = list(read_shapes(weights))
            facts = facts_of(config, weights_stamp.size, folder)
            check_keys(keys, facts.method)
            sha256 = known.sha256 if is_same and known is not None else digest_of(file)
        after = (stamp_of(os.stat(folder / CONFIG_NAME)), stamp_of(os.stat(weights)))
    except Exception as error:  # a foreign file may hold anything
        unfit = UnfitError(reason_of(error))
        unfit.is_lasting = is_lasting(error)
        raise unfit from error
    if after != files.stamps:
        raise UnfitError("Its files changed while they were read; `refresh()` reads them again.")
    return AdapterEntry(
        "",
        Place(),
        *facts,
        bytes=weights_stamp.size,
        sha256=sha256,
        config_sha256=config_sha256,
        stamps=files.stamps,
    )


def digest_of(file: BinaryIO) -> str:
    """Return the SHA-256 digest of a file, from its beginning."""
    file.seek(0)
    result = hashlib.sha256()
    while block := file.read(_BLOCK):
        result.update(block)
    return result.hexdigest()


def is_lasting(error: Exception) -> bool:
    """Return False for an error that may not come again: of the disk, the system, the memory."""
    causes = (error, error.__cause__, error.__context__)
    return not any(isinstance(cause, (OSError, MemoryError)) for cause in causes)


def reason_of(error: Exception) -> str:
    """Return an error as a sentence."""
    if isinstance(error, (PeftError, UnfitError)):
        return str(error)
    if isinstance(error, OSError):
        return f"It can't be read: {error.strerror or error}."
    return f"It can't be read ({type(error).__name__}: {error})."
