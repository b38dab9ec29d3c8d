# SPDX-License-Identifier: Apache-2.0
"""Rules for the fields of configs: each yields the offence, if any, as a sentence. And checks of
arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from .errors import PeftTypeError, PeftValueError
from .suggestions import did_you_mean, no_adapter


def is_int(value: Any) -> bool:
    """Whether `value` is an integer proper (True and False are not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def at_least(name: str, value: Any, least: int = 1) -> Iterator[str]:
    """`value` must be an integer of at least `least`."""
    if not is_int(value) or value < least:
        yield f"`{name}`={value!r} must be an integer of at least {least}."


def number(name: str, value: Any, *, positive: bool = False) -> Iterator[str]:
    """`value` must be a finite number, `positive` if asked."""
    finite = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) != float("inf")
        and value == value
    )
    if not finite or (positive and value <= 0):
        yield f"`{name}`={value!r} must be a {'positive ' if positive else ''}finite number."


def probability(name: str, value: Any) -> Iterator[str]:
    """`value` must be a probability below one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        yield f"`{name}`={value!r} must be a probability of at least 0 and below 1."


def boolean(name: str, value: Any) -> Iterator[str]:
    """`value` must be True or False."""
    if not isinstance(value, bool):
        yield f"`{name}`={value!r} must be True or False."


def check_flags(**flags: Any) -> None:
    """Insist on arguments, by name, that are True or False; 0 and 1 and NumPy's are as good.

    Raises:
        PeftTypeError: One is not.
    """
    for name, value in flags.items():
        if type(value).__name__ not in ("bool", "bool_") and not (
            isinstance(value, int) and value in (0, 1)
        ):
            raise PeftTypeError(f"`{name}`={value!r} must be True or False.")


def check_adapter(name: Any, known: Iterable[str] | None = None, verb: str = "not found") -> None:
    """Insist on an adapter's name: one of the `known` ones, where they are given.

    Raises:
        PeftTypeError: It is no string.
        PeftValueError: There is no such adapter.
    """
    if not isinstance(name, str):
        raise PeftTypeError(
            f"An adapter is named by one string, not {name!r}; pass several one by one."
        )
    if known is not None and name not in known:
        raise PeftValueError(no_adapter(name, known, verb))


def choice(name: str, value: Any, allowed: Iterable[Any]) -> Iterator[str]:
    """`value` must be one of `allowed`."""
    allowed = list(allowed)
    strings = [option for option in allowed if isinstance(option, str)]
    if value not in strings and not any(value is option for option in allowed):
        yield f"`{name}`={value!r} must be one of {', '.join(map(repr, allowed))}.{did_you_mean(str(value), strings)}"


def name_list(name: str, value: Any) -> Iterator[str]:
    """`value` must be a collection of strings, or None."""
    if value is None:
        return
    if (
        isinstance(value, str)
        or not isinstance(value, (list, tuple, set))
        or not all(isinstance(v, str) for v in value)
    ):
        yield f"`{name}`={value!r} must be a list of strings or None."


def name_patterns(name: str, value: Any) -> Iterator[str]:
    """`value` must be a regular expression, a collection of names, or None."""
    if isinstance(value, str):
        yield from regex(name, value)
    else:
        yield from name_list(name, value)


def regex(name: str, value: str) -> Iterator[str]:
    """`value` must compile as a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        yield f"`{name}`={value!r} is not a valid regular expression: {error}."


def pattern_dict(name: str, value: Any, rule: Any) -> Iterator[str]:
    """`value` must map names or regular expressions to values that pass `rule`."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        yield f"`{name}`={value!r} must be a dictionary with names or regular expressions as keys."
        return
    for key, entry in value.items():
        yield from regex(f"{name}[{key!r}]", key)
        yield from rule(f"{name}[{key!r}]", entry)
