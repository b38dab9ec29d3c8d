# SPDX-License-Identifier: Apache-2.0
"""Which lines each test reaches, recorded once, and forks in which tests run.

A test file is recorded again when it has changed. Lines are kept as they were in the sources of the
first recording, and those of changed sources are matched to them.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from difflib import SequenceMatcher
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

MEMORY = 4 * 2**30  # what a fork may take beside what the process has
Line = tuple[str, int]


def in_fork(work: Callable[[Path], int], seconds: float) -> int | None:
    """Return what `work` returns in a fork, given a folder of its own; None if it was killed.

    The fork may use so many seconds of a processor, and six times as long if it waits.
    """
    folder = Path(tempfile.mkdtemp())
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 3
        try:
            _limit(seconds)
            code = work(folder)
        finally:
            os._exit(code)
    ended = os.pidfd_open(child)
    for _ in range(math.ceil(6 * seconds)):  # in steps, since both may be stopped for a while
        if select.select([ended], [], [], 1)[0]:
            break
    else:
        os.killpg(child, signal.SIGKILL)
    os.close(ended)
    status = os.waitpid(child, 0)[1]
    with suppress(ProcessLookupError):  # the processes that it started
        os.killpg(child, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None


def _limit(seconds: float) -> None:
    os.setsid()
    time.sleep = partial(_nap, time.sleep)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    for what, limit in (
        (resource.RLIMIT_AS, used + MEMORY),
        (resource.RLIMIT_FSIZE, 2**30),
        (resource.RLIMIT_CPU, math.ceil(seconds)),
    ):
        resource.setrlimit(what, (limit, limit))


def _nap(sleep: Callable[[float], None], seconds: float) -> None:
    sleep(min(seconds, 0.01))  # of a lock that a broken writer keeps, a minute


def run_tests(items: list[pytest.Item], folder: Path) -> str | None:
    """Run tests with temporary files in a folder, and return the first that fails."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    session = items[0].session
    session.config._tmp_path_factory._basetemp = folder  # type: ignore[attr-defined]
    session.testsfailed = 0
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return item.nodeid
    return None


class _Watch:
    """Lines of files that are reached, noted in memory that forks share."""

    def __init__(self, starts: dict[str, int], size: int) -> None:
        self.starts, self.seen, self.size = starts, mmap.mmap(-1, size), size

    def __enter__(self) -> _Watch:
        self.seen[:] = bytes(self.size)
        threading.settrace(self._called)
        sys.settrace(self._called)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    def reached(self) -> list[int]:
        """Return the places of the lines among those of all files."""
        content = self.seen[:]
        return [place for place in range(self.size) if content[place]]

    def _called(self, frame: FrameType, event: str, argument: object) -> Any:
        start = self.starts.get(frame.f_code.co_filename)
        if start is None:
            return None
        seen = self.seen

        def note(frame: FrameType, event: str, argument: object) -> Any:
            seen[start + frame.f_lineno] = 1
            return note

        return note(frame, event, argument)


class Tests:
    """Tests, the seconds that they take, and the lines of source files that they reach."""

    def __init__(self, items: list[pytest.Item], files: list[Path], folder: Path, store: Path):
        self.items = {item.nodeid: item for item in items}
        self.store = store
        self.sources = {str(file.relative_to(folder)): file.read_text() for file in files}
        known = json.loads(store.read_text()) if store.exists() else {}
        if set(known.get("sources", {})) != set(self.sources):
            known = {"sources": self.sources, "files": {}}
        self.known = known
        self.places = self._places()
        self._record(files)
        self.seconds: dict[str, float] = {}
        by_place: dict[int, list[str]] = defaultdict(list)
        for file in known["files"].values():
            for test, (seconds, places) in file["tests"].items():
                if test in self.items:
                    self.seconds[test] = seconds
                    for place in places:
                        by_place[place].append(test)
        self.by_line = {line: by_place.get(at, []) for line, at in self.places.items()}

    def _places(self) -> dict[Line, int]:
        """Return for each line of a source the place of the line that it was when recorded."""
        result = {}
        old = {name: text.splitlines() for name, text in self.known["sources"].items()}
        starts = dict(zip(old, accumulate((len(t) + 1 for t in old.values()), initial=0)))  # noqa: B905
        for name, text in self.sources.items():
            new = text.splitlines()
            matcher = SequenceMatcher(None, old[name], new, autojunk=False)
            for _, i, to_i, j, to_j in matcher.get_opcodes():
                for at in range(j, to_j):
                    was = min(i + at - j, max(to_i - 1, i), len(old[name]) - 1)
                    result[name, at + 1] = starts[name] + was + 1
        return result

    def _record(self, files: list[Path]) -> None:
        lengths = [len(text.splitlines()) + 1 for text in self.sources.values()]
        starts = [*accumulate(lengths, initial=0)]
        watch = _Watch({str(f): at for f, at in zip(files, starts)}, starts[-1])  # noqa: B905
        lines = [
            self.places.get((name, line), 0)
            for name, length in zip(self.sources, lengths, strict=True)
            for line in range(length)
        ]
        by_file: dict[Path, list[pytest.Item]] = defaultdict(list)
        for item in self.items.values():
            by_file[item.path].append(item)
        for file, items in by_file.items():
            key = os.path.relpath(file)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            if self.known["files"].get(key, {}).get("digest") == digest or (
                file in files and key in self.known["files"]  # doctests
            ):
                continue
            found = self._record_file(items, watch, lines)
            self.known["files"][key] = {"digest": digest, "tests": found}
            self.store.write_text(json.dumps(self.known))
            print(f"recorded {key}: {len(found)} of {len(items)} tests", flush=True)

    def _record_file(
        self, items: Iterable[pytest.Item], watch: _Watch, lines: list[int]
    ) -> dict[str, tuple[float, list[int]]]:
        """Return the seconds and lines of the tests that pass and reach any."""
        answer = self.store.with_name("recording.json")

        def work(folder: Path) -> int:
            found = {}
            for item in items:
                start = time.process_time()
                with watch:
                    failed = run_tests([item], folder)
                if failed is None and (reached := watch.reached()):
                    seconds = round(time.process_time() - start, 3)
                    found[item.nodeid] = seconds, sorted({lines[place] for place in reached})
            answer.write_text(json.dumps(found))
            return 0

        answer.unlink(missing_ok=True)
        in_fork(work, 600)
        return json.loads(answer.read_text()) if answer.exists() else {}
