# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of configs, matched in bounded time.

A config can come from anyone, and Python's matcher tries the ways through `(.+)+!` one by one, of
which there are exponentially many. An expression with few choices is left to it. One with many is
matched here, by the set of positions at which each of its parts can end, in time
`parts · length²`.

Source: Ken Thompson, Regular Expression Search Algorithm (1968)
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as sre
    from re import _parser as parser
else:
    import sre_constants as sre
    import sre_parse as parser

# Python's matcher is used up to so many repetitions and so many choices in all: some 10⁵ steps
# for a path of 100 letters.
_FEW_REPEATS, _FEW_CHOICES = 3, 7
# The most that are matched here, and levels of parentheses.
_MOST_CHOICES, _DEEPEST = 200, 50
_CATEGORIES = {
    sre.CATEGORY_DIGIT: re.compile(r"\d"),
    sre.CATEGORY_NOT_DIGIT: re.compile(r"\D"),
    sre.CATEGORY_SPACE: re.compile(r"\s"),
    sre.CATEGORY_NOT_SPACE: re.compile(r"\S"),
    sre.CATEGORY_WORD: re.compile(r"\w"),
    sre.CATEGORY_NOT_WORD: re.compile(r"\W"),
}
_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT)
# A parsed part: an operation and its argument, which the parser's module describes.
_Part = tuple[Any, Any]


class TooManyWaysError(ValueError):
    """An expression that may take exponential time and has parts that can't be matched here."""


def fullmatch(pattern: str, text: str, start: int = 0) -> bool:
    """Return whether an expression matches all of a text from a position on.

    Example:
        >>> fullmatch("(.+)+!", "a" * 60), fullmatch("(a+)+", "b" * 9 + "a" * 60, 9)
        (False, True)
    """
    ways = _ways(pattern)
    if ways is None:
        return re.compile(pattern).fullmatch(text, start) is not None
    return len(text) in ways.ends(text, start)


def match_after(pattern: str, rest: re.Pattern[str], text: str, start: int) -> re.Match[str] | None:
    r"""Return the match of `rest` right after one of `pattern`, which begins at a position.

    Example:
        >>> match_after("h|layers", re.compile(r"\.(\d+)"), "layers.12.mlp", 0)[1]
        '12'
    """
    ways = _ways(pattern)
    if ways is None:
        before = re.compile(f"(?:{pattern})(?={rest.pattern})").match(text, start)
        return None if before is None else rest.match(text, before.end())
    found = (rest.match(text, end) for end in sorted(ways.ends(text, start), reverse=True))
    return next((match for match in found if match is not None), None)


def check_expression(pattern: str, inside: bool = False) -> None:
    """Raise an error unless an expression can be used, alone, or `inside` another one.

    Raises:
        ValueError: It is not valid, or may take exponential time; the message says why.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            re.compile(pattern)
            re.compile(f"(?:{pattern})" if inside else pattern)
            _ways(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None


@lru_cache(maxsize=1024)
def _ways(pattern: str) -> _Ways | None:
    """Return what matches an expression with many choices, None for one with few."""
    tree = parser.parse(pattern)
    repeats, choices, nested = _choices(tree)
    if not nested and repeats <= _FEW_REPEATS and choices <= _FEW_CHOICES:
        return None
    problem = None
    if choices > _MOST_CHOICES or _depth(tree) > _DEEPEST:
        problem = "it has too many of them"
    elif tree.state.flags & ~re.UNICODE:
        problem = "it has flags"
    if problem is None:
        problem = next(_unknown(tree), None)
    if problem:
        raise TooManyWaysError(
            "its repetitions and alternatives may take exponential time to match, and "
            f"{problem}; write it with fewer"
        )
    return _Ways(tree)


def _choices(tree: Any) -> tuple[int, int, bool]:
    """Return the number of repetitions, of all choices, and whether one is in a repetition."""
    repeats = choices = 0
    nested = False
    for kind, argument in tree:
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT, getattr(sre, "POSSESSIVE_REPEAT", None)):
            low, high, body = argument
            is_simple = len(body) == 1 and not list(_bodies(*body[0]))
            inside = (0, 0, False) if is_simple else _choices(body)
            repeats += inside[0] + (high > 1 and high != low)
            choices += inside[1] + (high != low)
            nested |= inside[2] or (high > 1 and inside[1] > 0)
        else:
            for body in _bodies(kind, argument):
                more = _choices(body)
                repeats, choices, nested = repeats + more[0], choices + more[1], nested | more[2]
            choices += kind is sre.BRANCH
    return repeats, choices, nested


def _bodies(kind: Any, argument: Any) -> Iterator[Any]:
    """Yield the expressions inside a part."""
    if kind is sre.BRANCH:
        yield from argument[1]
    elif kind in (*_REPEATS, getattr(sre, "POSSESSIVE_REPEAT", None)):
        yield argument[2]
    elif kind is sre.SUBPATTERN:
        yield argument[3]
    elif kind in (sre.ASSERT, sre.ASSERT_NOT):
        yield argument[1]
    elif kind is sre.GROUPREF_EXISTS:
        yield from (body for body in argument[1:] if body)
    elif kind is getattr(sre, "ATOMIC_GROUP", None):
        yield argument


def _depth(tree: Any) -> int:
    bodies = [body for part in tree for body in _bodies(*part)]
    return 1 + max(map(_depth, bodies), default=0)


def _unknown(tree: Any) -> Iterator[str]:
    """Yield the parts that can't be matched by sets of positions."""
    for kind, argument in tree:
        if kind not in _Ways.known or (kind is sre.SUBPATTERN and (argument[1] or argument[2])):
            yield f"{str(kind).lower()} is in it"
        for body in _bodies(kind, argument):
            yield from _unknown(body)


@dataclass
class _Ways:
    """An expression, matched by the sets of positions at which its parts can end.

    Args:
        tree: The expression, parsed.
    """

    tree: Any
    _text: str = ""
    _known: dict[tuple[int, int, int], frozenset[int]] = field(default_factory=dict)

    known = (
        *_REPEATS, sre.BRANCH, sre.SUBPATTERN, sre.ASSERT, sre.ASSERT_NOT, sre.AT, sre.LITERAL,
        sre.NOT_LITERAL, sre.ANY, sre.IN,
    )  # fmt: skip

    def ends(self, text: str, start: int) -> frozenset[int]:
        """Return all positions at which a match from `start` on can end."""
        return _Ways(self.tree, text)._sequence(self.tree, start)

    def _sequence(self, tree: Any, start: int) -> frozenset[int]:
        found = frozenset([start])
        for number, part in enumerate(tree):
            found = frozenset(
                end for at in found for end in self._part(part, (id(tree), number, at))
            )
            if not found:
                break
        return found

    def _part(self, part: _Part, key: tuple[int, int, int]) -> frozenset[int]:
        if key not in self._known:
            self._known[key] = frozenset(self._ends(part, key[2]))
        return self._known[key]

    def _ends(self, part: _Part, at: int) -> frozenset[int] | set[int]:
        kind, argument = part
        if kind in _REPEATS:
            low, high, body = argument
            return self._repeated(low, high, body, at)
        if kind is sre.BRANCH:
            return {end for body in argument[1] for end in self._sequence(body, at)}
        if kind is sre.SUBPATTERN:
            return self._sequence(argument[3], at)
        if kind in (sre.ASSERT, sre.ASSERT_NOT):
            direction, body = argument
            return {at} if self._is_seen(direction, body, at) == (kind is sre.ASSERT) else set()
        if kind is sre.AT:
            return {at} if self._is_at(argument, at) else set()
        is_there = at < len(self._text) and _is_letter(kind, argument, self._text[at])
        return {at + 1} if is_there else set()

    def _repeated(self, low: int, high: int, body: Any, at: int) -> set[int]:
        last = {at}
        for _ in range(min(low, len(self._text) + 1)):
            before, last = last, {end for at in last for end in self._sequence(body, at)}
            if last in (before, set()):
                break
        result = set(last)
        for _ in range(min(high - low, len(self._text) + 1)):
            last = {end for at in last for end in self._sequence(body, at)} - result
            if not last:
                break
            result |= last
        return result

    def _is_seen(self, direction: int, body: Any, at: int) -> bool:
        """Return whether what is ahead or behind matches."""
        if direction > 0:
            return bool(self._sequence(body, at))
        begin = at - body.getwidth()[0]
        return begin >= 0 and at in self._sequence(body, begin)

    def _is_at(self, kind: Any, at: int) -> bool:
        """Return whether a position is a beginning, an end, or an edge of a word."""
        rest = self._text[at:]
        if kind in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
            return at == 0
        if kind is sre.AT_END:
            return rest in ("", "\n")
        if kind is sre.AT_END_STRING:
            return not rest
        if not self._text:  # Python finds no edge there, and nothing that is none
            return False
        words = [bool(re.match(r"\w", letter)) for letter in (self._text[:at][-1:], rest[:1])]
        return (words[0] != words[1]) == (kind is sre.AT_BOUNDARY)


def _is_letter(kind: Any, argument: Any, letter: str) -> bool:
    """Return whether a part that stands for one letter stands for this one."""
    if kind is sre.ANY:
        return letter != "\n"
    if kind is sre.LITERAL:
        return ord(letter) == argument
    if kind is sre.NOT_LITERAL:
        return ord(letter) != argument
    if kind is sre.RANGE:
        return argument[0] <= ord(letter) <= argument[1]
    if kind is sre.CATEGORY:
        return _CATEGORIES[argument].match(letter) is not None
    negated = argument[0][0] is sre.NEGATE
    return negated != any(_is_letter(own, value, letter) for own, value in argument[negated:])
