# SPDX-License-Identifier: Apache-2.0
r"""Keys of config fields that give some modules other values (`rank_pattern`), in a config and in
its file.

A key is a regular expression for a module's path, or for the end of it after a dot. In a new
config, a key that begins with `^` also matches all modules below. Other implementations match the
same key against one module only, so a file has it in a form that all read alike: `^layers.0` is
written as `^layers.0(\..*)?`. A plain `^layers.0` in a file matches one module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from .expressions import fullmatch, match_after

V = TypeVar("V")

_REST, _DOT = r"(\..*)?", re.compile(r"\.")
_EITHER = re.compile(r"(?P<key>\^.*)\|\^\(\?:(?P=key)\)\\\.\.\*")


class SubtreePattern(str):
    """A key that matches the modules below a path too, with the text of one that does not."""

    __slots__ = ()


def parse_patterns(patterns: Mapping[str, V], is_new: bool) -> dict[str, V]:
    r"""Return patterns with a `SubtreePattern` for each key that matches modules below a path.

    Args:
        patterns: Key → value.
        is_new: True for keys that a user wrote, False for those of a file.

    Example:
        >>> new = parse_patterns({"^a": 1, "^b$": 2, "c": 3, r"^d(\..*)?": 4}, is_new=True)
        >>> [type(key).__name__ for key in new]
        ['SubtreePattern', 'str', 'str', 'SubtreePattern']
        >>> parse_patterns({r"^d(\..*)?": 4}, is_new=False)
        {'^d': 4}
    """
    return {_parsed(key, is_new): value for key, value in patterns.items()}


def _parsed(key: str, is_new: bool) -> str:
    if not isinstance(key, str) or isinstance(key, SubtreePattern) or not key.startswith("^"):
        return key
    if key.endswith(_REST):
        return SubtreePattern(key.removesuffix(_REST))
    if (both := _EITHER.fullmatch(key)) is not None:
        return SubtreePattern(both["key"])
    return SubtreePattern(key) if is_new and not key.endswith("$") else key


def format_patterns(patterns: Mapping[str, V]) -> dict[str, V]:
    r"""Return patterns as a file has them, the inverse of `parse_patterns`.

    Example:
        >>> format_patterns({SubtreePattern("^a"): 1, SubtreePattern("^a|b"): 2, "^c": 3})
        {'^a(\\..*)?': 1, '^a|b|^(?:^a|b)\\..*': 2, '^c': 3}
    """
    return {_formatted(key): value for key, value in patterns.items()}


def _formatted(key: str) -> str:
    if not isinstance(key, SubtreePattern):
        return key
    flat, before = re.sub(r"\\.|\[[^\]]*\]", "", key), ""
    while flat != before:
        before, flat = flat, re.sub(r"\([^()]*\)", "", flat)
    return f"{key}|^(?:{key})\\..*" if "|" in flat else f"{key}{_REST}"


def matches_path(pattern: str, path: str) -> bool:
    """Return True if a key matches the module at a path.

    Example:
        >>> matches_path(SubtreePattern("^a"), "a.b"), matches_path("^a", "a.b")
        (True, False)
        >>> matches_path("^a", "a"), matches_path("b", "a.b"), matches_path("a", "a.b")
        (True, True, False)
    """
    starts = [0, *(i + 1 for i, sign in enumerate(path) if sign == ".")]
    if fullmatch(pattern, path, starts):
        return True
    return isinstance(pattern, SubtreePattern) and match_after(pattern, _DOT, path, 0) is not None
