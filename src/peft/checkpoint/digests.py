# SPDX-License-Identifier: Apache-2.0
"""The digest of an adapter's files, by which a library or a routed model tells that one changed."""

from __future__ import annotations

import hashlib
import os

from .files import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    read_config_text,
)
from .hub import find_file, only_hub_options

_BLOCK = 2**22


def adapter_digest(source: str | os.PathLike[str], **hub_options: object) -> str:
    """Return the SHA-256 of a saved adapter's weights file and config, as hexadecimal digits.

    Args:
        source: A folder, or an id on the Hub.
        **hub_options: `subfolder`, `revision`, `token`, `cache_dir`, …

    Raises:
        CheckpointNotFoundError: There is no such adapter.
    """
    options = only_hub_options(hub_options, "adapter_digest")
    weights = find_file(source, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME), options)
    config = read_config_text(find_file(source, (CONFIG_NAME,), options))
    digest = hashlib.sha256()
    with open(weights, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    digest.update(config.encode())
    return digest.hexdigest()
