# SPDX-License-Identifier: Apache-2.0
"""Properties of an adapter, read from its config and the header of its weights."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..base.constants import CONFIG_NAME
from ..base.errors import CheckpointError, PeftError, PeftTypeError
from ..base.registry import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PeftType,
    lookup,
)
from ..checkpoint.files import read_config_text, read_shapes
from ..checkpoint.layout import read_layout
from ..config import PeftConfig
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


class Facts(NamedTuple):
    """Properties in a config that the index lists."""

    method: str
    base_model: str | None
    task_type: str | None
    rank: int | None
    tasks: tuple[str, ...]


def facts_of(config: PeftConfig) -> Facts:
    """Return what the index holds of a config."""
    rank = getattr(config, "r", None)
    return Facts(
        PeftType(config.peft_type).value,
        config.base_model_name_or_path,
        None if config.task_type is None else str(config.task_type),
        rank if type(rank) is int else None,
        _tasks(config),
    )


def _tasks(config: PeftConfig) -> tuple[str, ...]:
    """Return the names of the tasks of an adapter with a delta for each, none for others."""
    tuner = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
    try:
        return tuple(name for name in tuner.delta_views(config) if name)
    except PeftError:
        return ()


def config_from(text: str, source: object) -> PeftConfig:
    """Make a config of the text of its file; fields that its class lacks are passed over.

    Raises:
        PeftError: It is none that this package can read.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{source}' is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CheckpointError(f"'{source}' must hold a JSON object, not a {kind}.")
    if content.get("peft_type") is None:
        raise PeftTypeError(f"'{source}' has no `peft_type`; it is not an adapter's config.")
    config_cls = lookup(PEFT_TYPE_TO_CONFIG_MAPPING, content["peft_type"])
    known = {item.name for item in fields(config_cls)} - set(config_cls.unsaved)
    return PeftConfig.from_file_fields({k: v for k, v in content.items() if k in known}, {})


def check_keys(layout_keys: list[str], method: str) -> None:
    """Raise UnfitError if no key of a weights file is one of a method."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(method)]
    if not any(part.startswith(prefix) for key in layout_keys for part in key.split(".")):
        shown = f", but `{layout_keys[0]}`" if layout_keys else "; it is empty"
        raise UnfitError(f"The weights have no tensor of {method} (`{prefix}…`){shown}.")


def inspect_folder(folder: Path, files: Files, known: AdapterEntry | None = None) -> AdapterEntry:
    """Read what an adapter in a folder is; no tensor is read, but bytes for a new digest.

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
        config = read_config(folder, config_stamp.size)
        facts = facts_of(config)
        is_same = known is not None and known.stamps[1:] == (weights_stamp,)
        with open(weights, "rb") as file:
            if weights.suffix == ".safetensors":
                layout = read_layout(file, os.fstat(file.fileno()).st_size, weights)
                keys = list(layout.spans)
            else:
                keys = list(read_shapes(weights))
            check_keys(keys, facts.method)
            sha256 = known.sha256 if is_same and known is not None else digest_of(file)
        after = (stamp_of(os.stat(folder / CONFIG_NAME)), stamp_of(os.stat(weights)))
    except UnfitError:
        raise
    except Exception as error:  # a foreign file may hold anything
        unfit = UnfitError(reason_of(error))
        unfit.is_lasting = is_lasting(error)
        raise unfit from error
    if after != files.stamps:
        raise UnfitError("Its files changed while they were read; `refresh()` reads them again.")
    return AdapterEntry(
        "", Place(), *facts, bytes=weights_stamp.size, sha256=sha256, stamps=files.stamps
    )


def read_config(folder: Path, size: int = 0) -> PeftConfig:
    """Read the config of an adapter in a folder."""
    if size > _LARGEST_CONFIG:
        raise UnfitError(f"'{CONFIG_NAME}' has {size:,} bytes; that is no config.")
    return config_from(read_config_text(folder / CONFIG_NAME), folder / CONFIG_NAME)


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
