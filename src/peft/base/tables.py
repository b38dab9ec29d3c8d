# SPDX-License-Identifier: Apache-2.0
"""Tables of text, for reports that are printed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import compress

_NUMBER = re.compile(r"(?<![^.])\d+(?=\.|$)")


def table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Return rows, the first of which is the heading, in columns of equal width.

    Args:
        rows: Cells, as many in each row.
        right: Columns that end at the right, for numbers.

    Example:
        >>> print(table([("module", "bytes"), ("q_proj", "12"), ("v_proj", "1,024")], right=[1]))
        module  bytes
        q_proj     12
        v_proj  1,024
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def left_out(number: int, shown: int, noun: str) -> list[str]:
    """Return the line below a table that shows some of a number of rows; none if it shows all.

    Example:
        >>> left_out(23, 20, "layers"), left_out(20, 20, "layers")
        (['… 3 more layers'], [])
    """
    return [f"… {number - shown} more {noun}"] if number > shown else []


def in_bytes(number: int) -> str:
    """Return a size in the largest unit that gives at least 1.

    Example:
        >>> in_bytes(900), in_bytes(2_500), in_bytes(13_400_000)
        ('900 B', '2.5 kB', '13.4 MB')
    """
    if number < 1000:
        return f"{number} B"
    value = float(number)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 layer", "2,500 layers"."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def sizes(shape: Iterable[int]) -> str:
    """Return a shape in short: "64x8"; "1" for a single number."""
    return "x".join(map(str, shape)) or "1"


def linear_map(in_features: int, out_features: int, kernel_size: Collection[int] = ()) -> str:
    """Return the size of a layer in short: "8->4", or "8->4 3x3" with a kernel."""
    return f"{in_features}->{out_features}{f' {sizes(kernel_size)}' if kernel_size else ''}"


def starred(path: str) -> str:
    """Return a path with `*` in place of each number."""
    return _NUMBER.sub("*", path)


def alike(
    rows: Mapping[str, Sequence[str]], paths: Collection[str] = ()
) -> Iterator[tuple[str, ...]]:
    """Yield rows by path with one row for paths that differ by numbers only and have equal cells.

    Args:
        rows: The other cells of each path's row.
        paths: All paths of the model. `layers.*.q` stands for all such paths, `layers.{0-3,7}.q`
            for some; by default the paths of the rows are all.

    Example:
        >>> rows = {"0.a": ["2"], "1.a": ["2"], "2.a": ["4"]}
        >>> list(alike(rows)), list(alike({"0.a": ["2"], "1.a": ["2"]}))
        ([('{0-1}.a (2x)', '2'), ('2.a', '4')], [('*.a (2x)', '2')])
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for path, cells in rows.items():
        groups.setdefault((starred(path), *cells), []).append(path)
    counts = Counter(map(starred, paths or rows))
    for (pattern, *cells), group in groups.items():
        is_all = len(group) == counts[pattern] and len(group) > 1
        for name, count in [(pattern, len(group))] if is_all else numbered(group):
            yield (f"{name} ({count}x)" if count > 1 else name, *cells)


def numbered(paths: list[str]) -> Iterator[tuple[str, int]]:
    """Yield names for paths that differ by numbers only, with the number of paths of each.

    Example:
        >>> list(numbered(["a.0.b", "a.1.b", "a.2.b", "a.5.b"]))
        [('a.{0-2,5}.b', 4)]
        >>> list(numbered(["0.1", "0.2", "1.1"]))
        [('0.{1-2}', 2), ('1.1', 1)]
    """
    numbers = [tuple(map(int, _NUMBER.findall(path))) for path in paths]
    choices = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    if math.prod(map(len, choices)) == len(paths):
        shown = iter(map(_ranges, choices))
        yield _NUMBER.sub(lambda _: next(shown), paths[0]), len(paths)
        return
    position = next(i for i, choice in enumerate(choices) if len(choice) > 1)
    for value in choices[position]:
        has_value = (in_path[position] == value for in_path in numbers)
        yield from numbered(list(compress(paths, has_value)))


def _ranges(numbers: list[int]) -> str:
    """Return sorted numbers in short: "7" for one, "{0-3,7}" for several."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = (str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{{{','.join(texts)}}}"
