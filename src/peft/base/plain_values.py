# SPDX-License-Identifier: Apache-2.0
"""Convert config values to values of JSON: paths, dtypes, enumerations, ranges, NumPy numbers."""

from __future__ import annotations

import enum
import json
import os
from collections import deque
from collections.abc import Iterator, KeysView, Mapping, ValuesView
from dataclasses import is_dataclass
from typing import Any, TypeAlias

import torch

from .errors import CheckpointError, PeftTypeError

# The entries of a JSON object by name.
JsonObject: TypeAlias = dict[str, Any]
_PLAIN = (str, bool, int, float)
# Levels of lists and objects that a file may have; the functions below are recursive.
_DEEPEST = 50


def json_value(text: str | bytes) -> Any:
    r"""Return what a JSON text says.

    Raises:
        ValueError: It is no JSON, or has half of a character, `\ud800`, that no file can hold.
    """
    content = json.loads(text)
    if "\\ud" in (text.decode(errors="replace") if isinstance(text, bytes) else text).lower():
        json.dumps(content, ensure_ascii=False).encode()
    return content


def json_object(text: str | bytes, source: object) -> JsonObject:
    """Return the object that the JSON text of a file is.

    Raises:
        CheckpointError: It is not JSON or no object, or it is nested more than 50 levels deep.
    """
    try:
        content = json_value(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{source}' is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CheckpointError(f"'{source}' must hold a JSON object, not a {kind}.")
    level: list[object] = [content]
    for _ in range(_DEEPEST):
        level = [
            entry
            for value in level
            if isinstance(value, (dict, list))
            for entry in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return content
    raise CheckpointError(
        f"'{source}' is nested more than {_DEEPEST} levels deep, as no config is; it is damaged or "
        "was made to do harm."
    )


def plain(value: object) -> Any:
    """Return the JSON value for `value`, or `value` itself if there is none; sets and tuples stay.

    Example:
        >>> from pathlib import Path
        >>> plain({"where": Path("a") / "b", "how": torch.float16, "which": range(2)})
        {'where': 'a/b', 'how': 'float16', 'which': [0, 1]}
    """
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, enum.Enum):
        return value if isinstance(value, str) else plain(value.value)
    if isinstance(value, os.PathLike):
        return plain(os.fspath(value))
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # of torch or NumPy
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, range, deque, KeysView, ValuesView)):
        return [plain(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return {plain(entry) for entry in value}
    if isinstance(value, tuple):
        return tuple(plain(entry) for entry in value)
    return value


def unwritable(value: object) -> Iterator[object]:
    """Yield the parts of a plain value that a JSON file can't hold; dataclasses are objects."""
    if value is None or type(value) in _PLAIN:
        return
    if is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, dict):
        yield from (key for key in value if not isinstance(key, str))
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        for entry in value:
            yield from unwritable(entry)
    elif not isinstance(value, (str, int, float, type(None))):
        yield value


def as_list(value: object) -> list[object]:
    """Return a set as a list for a JSON file, in the same order in every process."""
    if isinstance(value, set):
        return sorted(value, key=lambda entry: (str(type(entry)), entry))
    raise PeftTypeError(f"{value!r} can't be written to a file.")


def is_empty(value: object) -> bool:
    """Return True for None and for empty collections and strings."""
    return value is None or (isinstance(value, (str, list, tuple, set, dict)) and not value)
