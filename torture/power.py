# SPDX-License-Identifier: Apache-2.0
"""Cut the power during each write, in all states of the disk that POSIX allows.

A disk may keep any of the changes since the last sync: a folder's entries in any order (a rename is
one step), a file's bytes all, none, half of them, or zeros in their place. `fsync` of a file keeps
its bytes, `fsync` of a folder its entries. After the cut a reader has to find the old content or
the new one, and the new one after the write has returned.

Source: ALICE (Pillai et al., OSDI 2014), CrashMonkey (Mohan et al., OSDI 2018).
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import scenarios
from .scenarios import Write, fresh
from .tracer import Call, run

STATES_A_CUT = 256  # beyond, a sample of so many
FOLDER = None  # the "file" of an entry that is a folder


@dataclass
class File:
    """A file's bytes now, and what of them is safe on the disk."""

    now: bytearray = field(default_factory=bytearray)
    safe: bytes = b""

    def versions(self) -> list[bytes]:
        """Return what may be on the disk after a cut."""
        now = bytes(self.now)
        if now == self.safe:
            return [now]
        half = now[: len(now) // 2]
        return list(dict.fromkeys([self.safe, half, half + bytes(len(now) - len(half)), now]))


class Disk:
    """The entries and bytes of a folder tree, with the changes that are not safe yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.entries: dict[str, File | None] = {}  # now
        for path in sorted(folder.rglob("*")):
            content = path.read_bytes() if path.is_file() else b""
            file = File(bytearray(content), content) if path.is_file() else FOLDER
            self.entries[str(path)] = file
        self.safe = dict(self.entries)
        self.pending: list[dict[str, File | str | None]] = []  # by step; "gone" removes
        self.positions: dict[int, int] = {}

    def apply(self, call: Call) -> None:
        """Follow a call that succeeded."""
        name, paths, arguments = call.name, call.paths, call.arguments
        if call.result < 0:
            return
        if name == "openat":
            flags, path = arguments[2], paths[0]
            self.positions[call.result] = 0
            if flags & os.O_CREAT and path not in self.entries:
                self._change({path: File()})
            if flags & os.O_TRUNC and isinstance(self.entries.get(path), File):
                self.entries[path].now = bytearray()
        elif name in ("write", "pwrite64"):
            file, data = self.entries[paths[0]], call.data[: call.result]
            start = arguments[3] if name == "pwrite64" else self.positions[arguments[0]]
            file.now.extend(bytes(max(0, start - len(file.now))))
            file.now[start : start + len(data)] = data
            if name == "write":
                self.positions[arguments[0]] = start + len(data)
        elif name == "lseek":
            self.positions[arguments[0]] = call.result
        elif name == "ftruncate":
            file = self.entries[paths[0]]
            file.now = file.now[: arguments[1]] + bytes(max(0, arguments[1] - len(file.now)))
        elif name in ("fsync", "fdatasync"):
            self._sync(paths[0])
        elif name in ("rename", "renameat", "renameat2"):
            self._rename(*paths)
        elif name in ("unlink", "unlinkat", "rmdir"):
            self._change({paths[0]: "gone"})
        elif name in ("mkdir", "mkdirat"):
            self._change({paths[0]: FOLDER})

    def states(self, chance: random.Random) -> Iterator[dict[str, bytes | None]]:
        """Yield what may be on the disk: a file's bytes, or None for a folder, by path."""
        steps = len(self.pending)
        choices = list(itertools.islice(itertools.product((False, True), repeat=steps), 1 << 12))
        if len(choices) > STATES_A_CUT:
            choices = [choices[0], choices[-1], *chance.sample(choices, STATES_A_CUT - 2)]
        for choice in choices:
            entries = dict(self.safe)
            for taken, step in zip(choice, self.pending, strict=False):
                if taken:
                    _merge(entries, step)
            paths = list(entries)
            versions = [f.versions() if isinstance(f, File) else [None] for f in entries.values()]
            for contents in itertools.islice(itertools.product(*versions), 16):
                yield dict(zip(paths, contents, strict=True))

    def _change(self, step: dict[str, File | str | None]) -> None:
        self.pending.append(step)
        _merge(self.entries, step)

    def _rename(self, source: str, target: str) -> None:
        step: dict[str, File | str | None] = {target: self.entries[source], source: "gone"}
        for path, file in self.entries.items():
            if path.startswith(source + "/"):
                step |= {target + path[len(source) :]: file, path: "gone"}
        self._change(step)

    def _sync(self, path: str) -> None:
        if path != self.folder and isinstance(file := self.entries.get(path), File):
            file.safe = bytes(file.now)
            return
        kept = []
        for step in self.pending:
            if any(os.path.dirname(entry) == path for entry in step):
                _merge(self.safe, step)
            else:
                kept.append(step)
        self.pending = kept


def _merge(entries: dict[str, File | None], step: dict[str, File | str | None]) -> None:
    for path, file in step.items():
        if file == "gone":
            entries.pop(path, None)
        else:
            entries[path] = file


def _lay_out(state: dict[str, bytes | None], folder: Path, place: str) -> None:
    """Write a state of the disk into a folder, without entries whose own folder is lost."""
    fresh(folder)
    for path, content in sorted(state.items()):
        target = folder / os.path.relpath(path, place)
        if not target.parent.is_dir():
            continue
        if content is None:
            target.mkdir(exist_ok=True)
        elif not target.is_dir():
            target.write_bytes(content)


def cutting(scenario: Write, folder: Path, seed: int = 0) -> Iterator[tuple[str, str | None]]:
    """Cut the power after each call of a write; yield each state and what was wrong, or None."""
    place, restored = fresh(folder) / "place", folder / "restored"
    place.mkdir()
    scenario.prepare(place)
    old, disk = scenario.read(place), Disk(place)
    trace = run(lambda: scenario.work(place), place)
    if trace.error:
        raise RuntimeError(f"{scenario.name} fails without a fault:\n{trace.error}")
    new = scenario.read(place)
    chance, seen = random.Random(seed), {}
    for at, call in enumerate([*trace.calls, None]):
        for state in disk.states(chance):
            key = tuple(sorted(state.items()))
            if key not in seen:
                _lay_out(state, restored, str(place))
                seen[key] = _read(scenario, restored)
            wanted = (new,) if call is None else (old, new)
            wrong = None if seen[key] in wanted else f"a reader finds {seen[key]}"
            when = "after the end" if call is None else f"before call {at}, {call.name}"
            yield when, wrong
        if call is not None:
            disk.apply(call)


def _read(scenario: Write, folder: Path) -> object:
    try:
        return scenario.read(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def all_of(folder: Path, seed: int = 0) -> Iterator[tuple[str, str, str | None]]:
    """Yield scenario, moment and finding for everything."""
    for scenario in scenarios.writes():
        for when, wrong in cutting(scenario, folder, seed):
            yield scenario.name, when, wrong
