# SPDX-License-Identifier: Apache-2.0
"""The digest of an adapter's files, by which a library or a routed model tells that one changed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO

from ..base.constants import CONFIG_NAME, WEIGHTS_FILES
from .files import read_json
from .hub import find_file, only_hub_options
from .layout import read_layout

_BLOCK = 2**22
# Fields of a config that say nothing about the adapter's output.
_WITHOUT_EFFECT = ("inference_mode", "peft_version")


def adapter_digest(source: str | os.PathLike[str], **hub_options: object) -> str:
    """Return the SHA-256 of a saved adapter's tensors and config, as hexadecimal digits.

    Two saves of one adapter have the same digest, though a safetensors file lists its metadata in
    any order. The config counts by its fields, not by its spaces or their order.

    Args:
        source: A folder, or an id on the Hub.
        **hub_options: `subfolder`, `revision`, `token`, `cache_dir`, …

    Raises:
        CheckpointNotFoundError: There is no such adapter.
        CheckpointError: A file can't be read.
    """
    options = only_hub_options(hub_options, "adapter_digest")
    weights = find_file(source, WEIGHTS_FILES, options)
    config = _fields(find_file(source, (CONFIG_NAME,), options))
    digest = hashlib.sha256()
    with open(weights, "rb") as file:
        if weights.suffix == ".safetensors":
            digest.update(_tensor_list(file, weights))
        while block := file.read(_BLOCK):
            digest.update(block)
    digest.update(config)
    return digest.hexdigest()


def _fields(path: Path) -> bytes:
    """Return the fields of a config file that affect the output, in one order."""
    kept = {key: value for key, value in read_json(path).items() if key not in _WITHOUT_EFFECT}
    return json.dumps(kept, sort_keys=True).encode()


def _tensor_list(file: BinaryIO, path: Path) -> bytes:
    """Read the header of a safetensors file, and return names, shapes and places of its tensors."""
    layout = read_layout(file, os.fstat(file.fileno()).st_size, path)
    header = json.loads(layout.header)
    header.pop("__metadata__", None)
    return json.dumps(header, sort_keys=True).encode()
