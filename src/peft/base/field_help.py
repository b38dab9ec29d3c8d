# SPDX-License-Identifier: Apache-2.0
"""Help texts of a dataclass's fields, from the `Args` section of its docstring."""

from __future__ import annotations

import inspect
import re
from dataclasses import Field
from types import MappingProxyType
from typing import TypeVar

T = TypeVar("T")

_ENTRY = re.compile(r"^ {4}(\w+(?:,\s+\w+)*)(?: \(.*?\))?: (.+(?:\n {5,}.+)*)", re.MULTILINE)


def argument_texts(docstring: str | None) -> dict[str, str]:
    r"""Return the entries of a docstring's `Args` section by name, each on one line.

    Example:
        >>> argument_texts("Summary.\n\nArgs:\n    a, b: Two\n        numbers.\n\nRaises: …")
        {'a': 'Two numbers.', 'b': 'Two numbers.'}
    """
    section = inspect.cleandoc(docstring or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    return {
        name.strip(): " ".join(text.split())
        for names, text in _ENTRY.findall(section)
        for name in names.split(",")
    }


def add_field_help(cls: type[T]) -> type[T]:
    """Copy `Args` entries of a dataclass into its fields' `metadata["help"]`, for command lines;
    return the class.
    """
    # Base classes first: a subclass shares the fields that it inherits.
    for owner in reversed(cls.__mro__):
        fields: dict[str, Field[object]] = getattr(owner, "__dataclass_fields__", {})
        for name, text in argument_texts(owner.__doc__).items() if fields else ():
            if name in fields and "help" not in fields[name].metadata:
                fields[name].metadata = MappingProxyType({"help": text, **fields[name].metadata})
    return cls
