# SPDX-License-Identifier: Apache-2.0
"""Names of adapters: by their places, and as arguments."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from ..base.errors import PeftTypeError, PeftValueError
from ..core.adapter_names import check_name
from .entry import PACK_SUFFIX, AdapterEntry, Place

Names = str | AdapterEntry | Iterable[str | AdapterEntry]
"""A name or entry, or several."""


def default_name(place: Place) -> str:
    """Return the name that an adapter gets by its place: its path, without dots.

    Example:
        >>> [default_name(Place(path)) for path in ("users/ada", "qwen2.5-math", ".")]
        ['users/ada', 'qwen2_5-math', 'default']
        >>> default_name(Place("users.adapters.safetensors", "ada"))
        'users/ada'
    """
    path = place.path
    if place.repo:
        path = place.repo + (f"/{place.subfolder}" if place.subfolder else "")
    elif place.member:
        path = f"{path.removesuffix(PACK_SUFFIX)}/{place.member}"
    name = "default" if path == "." else path.replace(".", "_").lstrip("/")
    try:
        check_name(name, ())
    except PeftValueError:
        name = f"adapter_{name}"
    return name


def free_name(name: str, taken: Collection[str]) -> str:
    """Return a name, with a number after it if it is taken."""
    result, number = name, 1
    while result in taken:
        number += 1
        result = f"{name}-{number}"
    return result


def listed(names: Names, argument: str = "names") -> list[str | AdapterEntry]:
    """Return a name, or several, as a list; raise `PeftTypeError` for anything else."""
    if isinstance(names, (str, AdapterEntry)):
        return [names]
    if not isinstance(names, Iterable):
        raise PeftTypeError(f"`{argument}`={names!r} must be a name or a list of names.")
    return list(names)


def name_of(name: Any) -> Any:
    """Return the name of an entry, and anything else as it is."""
    return name.name if isinstance(name, AdapterEntry) else name
