# SPDX-License-Identifier: Apache-2.0
"""Save on file systems that lack something: object stores that are mounted, network shares.

What a file system lacks is put in the place of the functions of `os`. Without renames a save is
refused, and nothing has changed. Without locks, syncs or modes it works. Where a rename is a copy
and a deletion, a save is killed at each step: a reader then finds the old content, the new, or an
error of this package, never a mixture.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from peft import PeftError

from .scenarios import Write, fresh, state_of, writes

_RENAMES = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EIO)
_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EBADF)
_SYNCS = (errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
_MODES = (errno.EPERM, errno.ENOTSUP)


class Lack(NamedTuple):
    """What a file system lacks: the function, the errors it may give, and whether saves work."""

    what: str
    function: str
    numbers: tuple[int, ...]
    works: bool


LACKS = (
    Lack("renames", "os.replace", _RENAMES, False),
    Lack("locks", "fcntl.flock", _LOCKS, True),
    Lack("syncs", "os.fsync", _SYNCS, True),
    Lack("modes", "os.chmod", _MODES, True),
)


def scenarios() -> Iterator[Write]:
    """Yield the saves that replace files."""
    yield from (write for write in writes() if " of a library" not in write.name)


def saving(scenario: Write, folder: Path, seed: int = 0) -> Iterator[tuple[str, str | None]]:
    """Yield each try and what was wrong, None if nothing was."""
    place = folder / "place"

    def start() -> object:
        fresh(folder)
        place.mkdir()
        scenario.prepare(place)
        return scenario.read(place)

    old, before = start(), state_of(scenario.model)
    scenario.work(place)
    new, after = scenario.read(place), _names(place)
    for lack in LACKS:
        for number in lack.numbers:
            start()
            there = _names(place)
            with mock.patch(lack.function, _failing(number)):
                failure = _failure(lambda: scenario.work(place))
                found = _read(scenario, place)
            wrong = None
            if lack.works and (failure is not None or found != new or _names(place) != after):
                wrong = f"the save does not work: {failure}"
            if not lack.works and (not isinstance(failure, PeftError) or found != old):
                wrong = f"it is not refused as it should: {failure}, a reader finds {found}"
            if not lack.works and _names(place) != there:
                wrong = f"a refused save leaves {_names(place)}"
            if state_of(scenario.model) != before:
                wrong = "the model has changed"
            yield f"no {lack.what}, {errno.errorcode[number]}", wrong
    if "of a pack" not in scenario.name:  # which reads the file that it changes
        yield from _torn(scenario, place, start, (old, new))


def _torn(
    scenario: Write, place: Path, start: Callable[[], object], wanted: tuple[object, object]
) -> Iterator[tuple[str, str | None]]:
    """Kill a save at each step of its renames, which copy."""
    for step in range(100):
        start()
        if not _is_killed(lambda: scenario.work(place), step):
            return
        try:
            found = scenario.read(place)
            wrong = None if found in wanted else f"a reader finds {found}"
        except PeftError:
            wrong = None
        except Exception as error:
            wrong = f"a bare error: {type(error).__name__}: {error}"
        scenario.work(place)
        if (last := _read(scenario, place)) != wanted[1]:
            wrong = f"after the next save a reader finds {last}"
        yield f"killed at step {step} of renames that copy", wrong


def _is_killed(work: Callable[[], object], step: int) -> bool:
    """Work in a child process that ends at a step; return whether it came there."""
    child = os.fork()
    if child == 0:
        try:
            with _copying(step):
                work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 9


@contextmanager
def _copying(last: int) -> Iterator[None]:
    """Context in which a rename copies and deletes, and the process ends at a step."""
    taken = 0

    def step() -> None:
        nonlocal taken
        if taken == last:
            os._exit(9)
        taken += 1

    def replace(source: Any, target: Any) -> None:
        content = Path(source).read_bytes()
        with open(target, "wb") as file:
            step()
            file.write(content[: len(content) // 2])
            file.flush()
            step()
            file.write(content[len(content) // 2 :])
        step()
        os.unlink(source)
        step()

    with mock.patch("os.replace", replace):
        yield


def _failing(number: int) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _failure(work: Callable[[], object]) -> Exception | None:
    try:
        work()
    except Exception as error:
        return error
    return None


def _read(scenario: Write, place: Path) -> object:
    try:
        return scenario.read(place)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _names(place: Path) -> list[str]:
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*"))
