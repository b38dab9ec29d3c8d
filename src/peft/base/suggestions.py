# SPDX-License-Identifier: Apache-2.0
"""Names that were probably meant in place of one that is not there, for messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# How much less alike than the nearest another near miss may be.
_NEAREST = 0.05
# How many adapters a message lists; a model may have thousands.
_LISTED = 8


def near_misses(name: str, choices: Iterable[str], n: int = 3, cutoff: float = 0.6) -> list[str]:
    """Return the `choices` that look like `name`, the most alike first; case, `_`, `-` and `.`
    count little.

    Example:
        >>> near_misses("vproj", ["q_proj", "v_proj", "o_proj"], n=1)
        ['v_proj']
    """
    scored = []
    for choice in dict.fromkeys(choices):
        likeness = max(
            _likeness(name, choice, cutoff), _likeness(_bare(name), _bare(choice), cutoff) - 0.01
        )
        if likeness >= cutoff:
            scored.append((-likeness, choice))
    return [choice for score, choice in sorted(scored)[:n] if score < min(scored)[0] + _NEAREST]


def did_you_mean(name: str, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a sentence to put behind a message, or nothing if none of the `choices` looks like
    `name`.

    Example:
        >>> did_you_mean("stile", ["style", "tasks"])
        " Did you mean 'style'?"
    """
    near = near_misses(name, choices, cutoff=cutoff)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def no_adapter(name: object, known: Iterable[str], verb: str = "not found") -> str:
    """Return the message for the name of an adapter that a model does not have; `known` are those
    it has.

    Example:
        >>> no_adapter("stile", ["style", "tasks"])
        "Adapter stile not found; this model has style, tasks. Did you mean 'style'?"
    """
    return f"Adapter {name} {verb}; this model has {adapters_there(name, known)}"


def adapters_there(name: object, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown adapter `name`: the `known` ones, and which was
    meant.
    """
    names = list(known)
    shown = ", ".join(names[:_LISTED]) + (
        f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    )
    return f"{shown or 'none'}.{did_you_mean(str(name), names)}"


def _likeness(a: str, b: str, cutoff: float) -> float:
    matcher = difflib.SequenceMatcher(None, a, b)
    return (
        matcher.ratio()
        if matcher.real_quick_ratio() >= cutoff and matcher.quick_ratio() >= cutoff
        else 0.0
    )


def _bare(name: str) -> str:
    return re.sub(r"[_.\-]", "", name.lower())
