# SPDX-License-Identifier: Apache-2.0
"""Parts of messages: suggestions for misspelt names, and lists that are cut."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Suggestions whose similarity is further below that of the best are left out.
_MARGIN = 0.05


def near_misses(name: str, choices: Iterable[str], n: int = 3, cutoff: float = 0.6) -> list[str]:
    """Return the `choices` most similar to `name`, the best first; case, `_`, `-` and `.` count
    little.

    Example:
        >>> near_misses("vproj", ["q_proj", "v_proj", "o_proj"], n=1)
        ['v_proj']
    """
    scored = []
    for choice in dict.fromkeys(choices):
        similarity = max(
            _similarity(name, choice, cutoff),
            _similarity(_letters(name), _letters(choice), cutoff) - 0.01,
        )
        if similarity >= cutoff:
            scored.append((-similarity, choice))
    return [choice for score, choice in sorted(scored)[:n] if score < min(scored)[0] + _MARGIN]


def did_you_mean(name: str, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """Return " Did you mean …?" with the `choices` similar to `name`, "" if there are none.

    Example:
        >>> did_you_mean("stile", ["style", "tasks"])
        " Did you mean 'style'?"
    """
    near = near_misses(name, choices, cutoff=cutoff)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def no_adapter(name: object, known: Iterable[str], verb: str = "not found") -> str:
    """Return the message for an unknown adapter of a model that has the `known` ones.

    Example:
        >>> no_adapter("stile", ["style", "tasks"])
        "Adapter stile not found; this model has style, tasks. Did you mean 'style'?"
    """
    return f"Adapter {name} {verb}; this model has {adapters_there(name, known)}"


def adapters_there(name: object, known: Iterable[str]) -> str:
    """Return the end of a message on an unknown adapter: the `known` ones and a suggestion."""
    names = list(known)
    return f"{listed(names) or 'none'}.{did_you_mean(str(name), names)}"


def listed(names: Iterable[str], most: int = 8) -> str:
    """Return names for a message; of more than `most`, the first and the number of the others.

    Example:
        >>> listed("abc"), listed("abc", most=2)
        ('a, b, c', 'a, b and 1 more')
    """
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _similarity(a: str, b: str, cutoff: float) -> float:
    matcher = difflib.SequenceMatcher(None, a, b)
    is_near = matcher.real_quick_ratio() >= cutoff and matcher.quick_ratio() >= cutoff
    return matcher.ratio() if is_near else 0.0


def _letters(name: str) -> str:
    return re.sub(r"[_.\-]", "", name.lower())
