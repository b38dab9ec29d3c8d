# SPDX-License-Identifier: Apache-2.0
"""The size of a base model's vocabulary: detect a change of it, and resize it for an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..base.constants import MODEL_ROOT
from ..base.containers import walk
from ..base.errors import PeftError
from ..base.plain_values import JsonObject
from .files import read_json
from .hub import find_file
from .protocols import AdapterConfig
from .renamed_modules import ModuleNames, plain_path


def was_resized(model: nn.Module, config: AdapterConfig) -> bool:
    """Return True if the model's vocabulary and that of its config's base model differ in size.

    The base model's config is read from its folder or the local cache of the Hub; nothing is
    downloaded. Without it the result is False.
    """
    now = _size(getattr(getattr(model, "config", None), "to_dict", dict)())
    if config.base_model_name_or_path is None or now is None:
        return False
    try:
        local = {"local_files_only": True}
        path = find_file(config.base_model_name_or_path, ("config.json",), local)
        before = _size(read_json(path))
    except PeftError:
        return False
    return before is not None and before != now


def _size(content: JsonObject) -> int | None:
    """Return the vocabulary's size in a model's config; of a multimodal model, that of the text."""
    for part in (content, content.get("text_config") or {}):
        if part.get("vocab_size") is not None:
            return part["vocab_size"]
    return None


def fit_vocabulary(
    model: Any, shapes: Mapping[str, tuple[int, ...]], by_token: Mapping[str, int]
) -> None:
    """Resize a transformers model's vocabulary to the number of tokens in an adapter's checkpoint.

    `by_token` gives the dimension of tokens by parameter name. Nothing is done if the checkpoint
    has no such number, or several.
    """
    if not hasattr(model, "resize_token_embeddings"):
        return
    try:
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return
    if table is None or not hasattr(table, "weight"):
        return
    ends = {"weight": 0, "base_layer.weight": 0, "token_adapter.base_layer.weight": 0, **by_token}
    names, places = ModuleNames(model), {}
    for path, module in walk(model, repeated=True):
        if module is table or (module is head and head is not None):
            places[plain_path(path)] = module
    rows = set()
    for key, shape in shapes.items():
        plain = key.removeprefix(MODEL_ROOT)
        for end, dim in ends.items():
            path = plain.removesuffix(f".{end}")
            is_table = path != plain and len(shape) == 2
            if is_table and (names.now(path, is_adapted=False) or path) in places:
                rows.add(shape[dim])
    if len(rows) == 1 and rows != {table.weight.shape[0]}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)
