# SPDX-License-Identifier: Apache-2.0
"""Rules for config fields, which yield a sentence for each bad value; checks of arguments."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

from torch import Tensor

from .errors import PeftTypeError, PeftValueError
from .expressions import check_expression
from .plain_values import is_empty, plain
from .suggestions import did_you_mean, no_adapter

if TYPE_CHECKING:
    LayerIndices: TypeAlias = list[int] | int
    TokenIndices: TypeAlias = list[int] | dict[str, list[int]]
else:  # transformers' HfArgumentParser makes options of fields that have one type
    LayerIndices = TokenIndices = list[int]


def is_int(value: object) -> TypeGuard[int]:
    """Return True for an integer, but not for True and False."""
    return isinstance(value, int) and not isinstance(value, bool)


LARGEST_SIZE = 2**31 - 1


def at_least(
    name: str, value: object, least: int = 1, most: int | None = LARGEST_SIZE
) -> Iterator[str]:
    """Require an integer of at least `least`, and at most `most`: by default what a tensor's size
    can be, None for numbers of bytes and other large ones.
    """
    if not is_int(value) or value < least:
        yield f"`{name}`={value!r} must be an integer of at least {least}."
    elif most is not None and value > most:
        yield f"`{name}`={value!r} must be at most {most}."


def number(name: str, value: object, *, positive: bool = False) -> Iterator[str]:
    """Require a finite number, a `positive` one if asked."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not abs(value) <= sys.float_info.max  # also an integer that no float can hold
        or (positive and value <= 0)
    ):
        yield f"`{name}`={value!r} must be a {'positive ' if positive else ''}finite number."


def probability(name: str, value: object) -> Iterator[str]:
    """Require a probability below one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        yield f"`{name}`={value!r} must be a probability of at least 0 and below 1."


def boolean(name: str, value: object) -> Iterator[str]:
    """Require True or False."""
    if not isinstance(value, bool):
        yield f"`{name}`={value!r} must be True or False."


def text(name: str, value: object) -> Iterator[str]:
    """Require a string, or None."""
    if not isinstance(value, (str, type(None))):
        yield f"`{name}`={value!r} must be a string or None."


def choice(name: str, value: object, allowed: Iterable[object]) -> Iterator[str]:
    """Require one of `allowed`."""
    allowed = list(allowed)
    strings = [option for option in allowed if isinstance(option, str)]
    if value not in strings and not any(
        type(value) is type(option) and value == option for option in allowed
    ):
        listed = ", ".join(map(repr, allowed))
        yield f"`{name}`={value!r} must be one of {listed}.{did_you_mean(str(value), strings)}"


def name_list(name: str, value: object) -> Iterator[str]:
    """Require a collection of strings, or None."""
    is_list = isinstance(value, (list, tuple, set)) and all(isinstance(v, str) for v in value)
    if value is not None and not is_list:
        yield f"`{name}`={value!r} must be a list of strings or None."


def module_names(name: str, value: object) -> Iterator[str]:
    """Require a collection of names, none of them empty, or None."""
    yield from name_list(name, value)
    if isinstance(value, (list, tuple, set)) and "" in value:
        yield f"`{name}`={value!r} has an empty name, which would stand for every module."


def name_patterns(name: str, value: object) -> Iterator[str]:
    """Require a regular expression, a collection of names, or None."""
    if isinstance(value, str):
        yield from regex(name, value)
    else:
        yield from name_list(name, value)


def regex(name: str, value: str, inside: bool = False) -> Iterator[str]:
    """Require a regular expression, one that can be `inside` another if asked."""
    try:
        check_expression(value, inside)
    except ValueError as error:
        yield f"`{name}`={value!r} is not a valid regular expression: {error}."


def pattern_dict(
    name: str, value: object, rule: Callable[[str, object], Iterable[str]]
) -> Iterator[str]:
    """Require a dictionary from names or regular expressions to values that pass `rule`."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        yield f"`{name}`={value!r} must be a dictionary with names or regular expressions as keys."
        return
    for key, entry in value.items():
        yield from regex(f"{name}[{key!r}]", key, inside=key.startswith("^"))
        yield from rule(f"{name}[{key!r}]", entry)


def token_indices(name: str, value: object) -> Iterator[str]:
    """Require a list of distinct token ids, a dictionary of such lists, or None."""
    for module, indices in value.items() if isinstance(value, dict) else [("", value or [])]:
        entry = f"`{name}`{f'[{module!r}]' if module else ''}"
        if not isinstance(indices, (list, tuple)) or not all(is_int(i) and i >= 0 for i in indices):
            yield f"{entry}={indices!r} must be a list of token ids."
        elif len(set(indices)) != len(indices):
            yield f"{entry} names a token twice."


def layer_selection(indices: object, pattern: object) -> Iterator[str]:
    """Require layer indices or None, and a pattern only with indices."""
    listed = [indices] if isinstance(indices, int) else indices
    is_list = isinstance(listed, (list, tuple, set)) and all(is_int(i) and i >= 0 for i in listed)
    if listed is not None and not is_list:
        yield (
            f"`layers_to_transform`={indices!r} must be a non-negative integer, a list of them, or "
            "None."
        )
    if not is_empty(pattern) and indices is None:
        yield "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
    names = [pattern] if isinstance(pattern, str) else pattern
    yield from name_list("layers_pattern", names)
    for name in names if isinstance(names, (list, tuple, set)) else ():
        yield from regex("layers_pattern", str(name), inside=True)


def check_scale(scale: object, is_divisor: bool = False) -> None:
    """Check that a scale is a finite number, as a divisor not 0; a tensor is not read."""
    if isinstance(scale, Tensor):
        return
    value = plain(scale)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PeftTypeError(f"`scale`={scale!r} must be a number.")
    if not math.isfinite(value):
        raise PeftValueError(f"`scale`={scale!r} must be finite.")
    if is_divisor and value == 0:
        raise PeftValueError("`scale`=0 is not a divisor; None returns to the configured scale.")


def check_flags(**flags: object) -> None:
    """Check that arguments, passed by name, are True or False, 0 or 1, or NumPy's."""
    for name, value in flags.items():
        if type(value).__name__ not in ("bool", "bool_") and not (
            isinstance(value, int) and value in (0, 1)
        ):
            raise PeftTypeError(f"`{name}`={value!r} must be True or False.")


def check_functions(**functions: object) -> None:
    """Check that arguments, passed by name, can be called."""
    for name, value in functions.items():
        if not callable(value):
            raise PeftTypeError(f"`{name}`={value!r} must be a function.")


def check_adapter(
    name: object, known: Iterable[str] | None = None, verb: str = "not found"
) -> None:
    """Check that `name` is a string and, if `known` is given, one of the known adapters."""
    if not isinstance(name, str):
        raise PeftTypeError(
            f"An adapter is named by one string, not {name!r}; pass several one by one."
        )
    if known is not None and name not in known:
        raise PeftValueError(no_adapter(name, known, verb))
