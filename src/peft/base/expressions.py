# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of configs, matched in bounded time.

A config can come from anyone, and Python's matcher tries the ways through `(.+)+!` one by one, of
which there are exponentially many. An expression with few ways is left to it. One with many becomes
the states of a machine. A pair of a state and a position in the text is visited once, in time
`states · length`.

Source: Ken Thompson, Regular Expression Search Algorithm (1968)
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, TypeAlias

if sys.version_info >= (3, 11):
    from re import _compiler as compiler
    from re import _constants as sre
    from re import _parser as parser
else:
    import sre_compile as compiler
    import sre_constants as sre
    import sre_parse as parser

# The longest path for which ways are counted, the most that Python's matcher may take (three
# unbounded repetitions and some alternatives), and the most states of a machine.
_LENGTH, _FEW, _MOST_STATES = 100, 2 * 10**7, 2000
# Parts that match in one way.
_SINGLE = (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN, sre.AT, sre.FAILURE)
_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT)
# A test of a text at a position: the position after a match, None if there is no match.
_Test: TypeAlias = Callable[[str, int], int | None]


class TooManyWaysError(ValueError):
    """An expression that may take exponential time and has a problem for our own matcher."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            "its repetitions and alternatives may take exponential time to match, and "
            f"{problem}; write it with fewer"
        )


def fullmatch(pattern: str, text: str, starts: Collection[int] = (0,)) -> bool:
    """Return whether an expression matches all of a text from one of some positions on.

    Example:
        >>> fullmatch("(.+)+!", "a" * 60), fullmatch("(a+)+", "b" * 9 + "a" * 60, [0, 9])
        (False, True)
    """
    machine = _machine(pattern)
    if machine is None:
        match = re.compile(pattern).fullmatch
        return any(match(text, start) is not None for start in starts)
    return len(text) in machine.ends(text, starts)


def match_after(pattern: str, rest: re.Pattern[str], text: str, start: int) -> re.Match[str] | None:
    r"""Return the match of `rest` right after one of `pattern`, which begins at a position.

    Example:
        >>> match_after("h|layers", re.compile(r"\.(\d+)"), "layers.12.mlp", 0)[1]
        '12'
    """
    machine = _machine(pattern)
    if machine is None:
        before = re.compile(f"(?:{pattern})(?={rest.pattern})").match(text, start)
        return None if before is None else rest.match(text, before.end())
    found = (rest.match(text, end) for end in sorted(machine.ends(text, [start]), reverse=True))
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
            _machine(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None


@lru_cache(maxsize=1024)
def _machine(pattern: str) -> _Machine | None:
    """Return the machine of an expression with many ways, None for one with few."""
    tree = parser.parse(pattern)
    return None if _ways(tree) <= _FEW else _Machine(tree)


def _ways(tree: parser.SubPattern) -> int:
    """Return how many ways Python's matcher may go through an expression; all above `_FEW` alike.

    A sequence multiplies, alternatives add, and `low` to `high` repetitions of `w` ways have
    `Σ_k w^k`.
    """
    product = 1
    argument: Any
    for kind, argument in tree.data:
        inside = [_ways(body) for body in _bodies(argument)]
        if str(kind).endswith("_REPEAT"):
            low, high, _ = argument
            counts = range(min(low, _LENGTH), min(high, _LENGTH) + 1)
            ways = sum(inside[0] ** count for count in counts)
        else:
            ways = sum(inside) if kind is sre.BRANCH else math.prod(inside)
        product = min(product * ways, _FEW + 1)
    return product


def _bodies(argument: object) -> Iterator[parser.SubPattern]:
    """Yield the expressions inside a part, whose argument is given."""
    if isinstance(argument, parser.SubPattern):
        yield argument
    elif isinstance(argument, (tuple, list)):
        for item in argument:
            yield from _bodies(item)


class _Machine:
    """The states of an expression: a test each, and the states that follow where it succeeds.

    Args:
        tree: The expression, parsed.
        is_inside: True for one that another expression looks for ahead or behind.
    """

    def __init__(self, tree: parser.SubPattern, is_inside: bool = False) -> None:
        self.parsed, self.is_inside = tree.state, is_inside
        self.states: list[tuple[_Test, list[int]]] = []
        self.last = self._state([])
        self.first = self._sequence(tree, self.last)

    def ends(self, text: str, starts: Collection[int]) -> set[int]:
        """Return all positions at which a match from one of some positions on can end."""
        pairs = [(self.first, start) for start in starts]
        seen = set(pairs)
        while pairs:
            state, at = pairs.pop()
            test, following = self.states[state]
            if (end := test(text, at)) is not None:
                new = {(state, end) for state in following} - seen
                seen |= new
                pairs += new
        return {at for state, at in seen if state == self.last}

    def _state(self, following: list[int], test: _Test = lambda text, at: at) -> int:
        """Return a new state before others; its test succeeds and stays unless it is given."""
        if len(self.states) == _MOST_STATES:
            raise TooManyWaysError("it has too many of them")
        self.states.append((test, following))
        return len(self.states) - 1

    def _sequence(self, tree: parser.SubPattern, following: int) -> int:
        """Return the first state of a sequence before another state."""
        runs = [(k, list(run)) for k, run in groupby(tree.data, lambda part: part[0] in _SINGLE)]
        for is_single, run in reversed(runs):
            if is_single:
                match = compiler.compile(parser.SubPattern(self.parsed, run)).match
                following = self._state([following], partial(_end, match))
            else:
                for kind, argument in reversed(run):
                    following = self._part(kind, argument, following)
        return following

    def _part(self, kind: object, argument: Any, following: int) -> int:
        """Return the first state of a part before another state."""
        if kind in _REPEATS:
            low, high, body = argument
            return self._repetition(low, high, body, following)
        if kind is sre.BRANCH:
            return self._state([self._sequence(body, following) for body in argument[1]])
        if kind is sre.SUBPATTERN and not (argument[1] or argument[2]):
            return self._sequence(argument[3], following)
        if kind in (sre.ASSERT, sre.ASSERT_NOT) and not self.is_inside:
            direction, body = argument
            machine, width = _Machine(body, is_inside=True), min(direction, 0) * body.getwidth()[0]
            test = partial(_look, machine, kind is sre.ASSERT, width)
            return self._state([following], test)
        raise TooManyWaysError(f"{str(kind).lower()} is in it")

    def _repetition(self, low: int, high: int, body: parser.SubPattern, following: int) -> int:
        """Return the first state of a repetition before another state."""
        if not len(body):
            return following
        if high is sre.MAXREPEAT:
            following = self._state(nexts := [following])
            nexts.append(self._sequence(body, following))
        else:
            last = following
            for _ in range(high - low):
                following = self._state([last, self._sequence(body, following)])
        for _ in range(low):
            following = self._sequence(body, following)
        return following


def _end(match: Callable[[str, int], re.Match[str] | None], text: str, at: int) -> int | None:
    found = match(text, at)
    return None if found is None else found.end()


def _look(machine: _Machine, is_wanted: bool, width: int, text: str, at: int) -> int | None:
    """Return the position if an expression is or is not ahead of it, or `-width` letters behind."""
    ends = machine.ends(text, [at + width]) if at + width >= 0 else set[int]()
    return at if (at in ends if width else bool(ends)) == is_wanted else None
