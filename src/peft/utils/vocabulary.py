# SPDX-License-Identifier: Apache-2.0
"""Whether a base model's vocabulary was resized since the model was loaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapter_files import read_json
from .error import PeftError
from .hub import find_file


def was_resized(model: nn.Module, config: Any) -> bool:
    """Whether a transformers model has another number of tokens than the model its adapter's config names as its base.

    Looks in the base model's folder, or among the files of the Hub that are on this machine; nothing is downloaded. Where neither
    has the base model's config, the answer is no.

    Args:
        model: The base model, or a model around it.
        config: The adapter's config.
    """
    now = _size(getattr(getattr(model, "config", None), "to_dict", dict)())
    if config.base_model_name_or_path is None or now is None:
        return False
    try:
        before = _size(read_json(find_file(config.base_model_name_or_path, ("config.json",), {"local_files_only": True})))
    except PeftError:
        return False
    return before is not None and before != now


def _size(content: dict[str, Any]) -> int | None:
    """The vocabulary's size in a model's config; of models of several kinds of input that of the text."""
    for part in (content, content.get("text_config") or {}):
        if part.get("vocab_size") is not None:
            return part["vocab_size"]
    return None
