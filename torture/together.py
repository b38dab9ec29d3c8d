# SPDX-License-Identifier: Apache-2.0
"""Let several processes write and read one folder at once.

Writers save two contents again and again; readers load all the time. Every load gives one
of the contents, whole, and none fails.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

from . import scenarios
from .scenarios import Write, fresh


def meeting(
    scenario: Write,
    folder: Path,
    seed: int = 0,
    seconds: float = 10.0,
    readers: int = 4,
    writers: int = 2,
) -> Iterator[tuple[str, str | None]]:
    """Yield each read and what was wrong, None if nothing was."""
    place = fresh(folder) / "place"
    place.mkdir()
    scenario.prepare(place)
    wanted = {scenario.read(place)}
    scenario.work(place)
    wanted.add(scenario.read(place))
    context = multiprocessing.get_context("fork")
    over, results = context.Event(), context.SimpleQueue()
    works = itertools.islice(itertools.cycle((scenario.prepare, scenario.work)), writers)
    processes = [context.Process(target=_write, args=(work, place, over)) for work in works]
    processes += [
        context.Process(target=_read, args=(scenario, place, over, results)) for _ in range(readers)
    ]
    for process in processes:
        process.start()
    time.sleep(seconds)
    over.set()
    for number in range(readers):
        for found, times in results.get().items():
            for _ in range(times):
                yield f"reader {number}", None if found in wanted else f"it finds {found}"
    for process in processes:
        process.join()
        if process.exitcode:
            yield "a process", f"it ended with {process.exitcode}"


def lasting(
    seconds: float, readers: int, writers: int
) -> Callable[..., Iterator[tuple[str, str | None]]]:
    """Return `meeting` for so many seconds, readers and writers."""
    return functools.partial(meeting, seconds=seconds, readers=readers, writers=writers)


def _write(work: object, place: Path, over: Event) -> None:
    while not over.is_set():
        work(place)


def _read(scenario: Write, place: Path, over: Event, results: object) -> None:
    found: dict[object, int] = {}
    while not over.is_set():
        try:
            value = scenario.read(place)
        except Exception as error:
            value = f"{type(error).__name__}: {error}"
        found[value] = found.get(value, 0) + 1
    results.put(found)


def pairs() -> Iterator[Write]:
    """Yield the writes whose old and new content can take turns."""
    yield from (s for s in scenarios.writes() if "over another" in s.name)
