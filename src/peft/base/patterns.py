# SPDX-License-Identifier: Apache-2.0
r"""Keys of dictionaries that give modules other values (`rank_pattern`), in a config and in its
file.

A key is a regular expression for a module's whole path, or for its end after a dot. In a config
that is made here, one that begins with `^` also means all modules below the path it describes.
Other implementations read the same key without those, so files have it in a form that means the
same to everybody: `^layers.0` is written as `^layers.0(\..*)?`. `^layers.0` in a file is one
module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_REST = r"(\..*)?"
_EITHER = re.compile(r"(?P<key>\^.*)\|\^\(\?:(?P=key)\)\\\.\.\*")


class SubtreePattern(str):
    """A key that means the modules below a path, too. It is the same text as one that does not."""

    __slots__ = ()


def parse_patterns(patterns: Mapping[str, Any], is_new: bool) -> dict[str, Any]:
    r"""Patterns with their keys told apart.

    Args:
        patterns: Key → value.
        is_new: Whether they were made here, and not read from a file.

    Example:
        >>> [type(key).__name__ for key in parse_patterns({"^a": 1, "^b$": 2, "c": 3, r"^d(\..*)?": 4}, is_new=True)]
        ['SubtreePattern', 'str', 'str', 'SubtreePattern']
        >>> parse_patterns({r"^d(\..*)?": 4}, is_new=False)
        {'^d': 4}
    """
    return {_meant(key, is_new): value for key, value in patterns.items()}


def _meant(key: Any, is_new: bool) -> Any:
    if not isinstance(key, str) or isinstance(key, SubtreePattern) or not key.startswith("^"):
        return key
    if key.endswith(_REST):
        return SubtreePattern(key.removesuffix(_REST))
    if (both := _EITHER.fullmatch(key)) is not None:
        return SubtreePattern(both["key"])
    return SubtreePattern(key) if is_new and not key.endswith("$") else key


def format_patterns(patterns: Mapping[str, Any]) -> dict[str, Any]:
    r"""Patterns as a file has them, the inverse of `meant`.

    Example:
        >>> format_patterns({SubtreePattern("^a"): 1, SubtreePattern("^a|b"): 2, "^c": 3})
        {'^a(\\..*)?': 1, '^a|b|^(?:^a|b)\\..*': 2, '^c': 3}
    """
    return {_written(key): value for key, value in patterns.items()}


def _written(key: str) -> str:
    if not isinstance(key, SubtreePattern):
        return key
    flat, before = re.sub(r"\\.|\[[^\]]*\]", "", key), ""
    while flat != before:
        before, flat = flat, re.sub(r"\([^()]*\)", "", flat)
    return f"{key}|^(?:{key})\\..*" if "|" in flat else f"{key}{_REST}"


def matches_path(pattern: str, path: str) -> bool:
    """Whether a key means the module at a path.

    Example:
        >>> [matches_path(SubtreePattern("^a"), "a.b"), matches_path("^a", "a.b"), matches_path("^a", "a"), matches_path("b", "a.b"), matches_path("a", "a.b")]
        [True, False, True, True, False]
    """
    if re.match(rf"(?:.*\.)?(?:{pattern})$", path):
        return True
    return isinstance(pattern, SubtreePattern) and re.match(rf"(?:{pattern})\.", path) is not None
