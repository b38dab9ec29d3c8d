# SPDX-License-Identifier: Apache-2.0
"""Fail or kill each operation at each of its system calls in turn.

After a fault in a write, a reader finds the old content or the new one; without an error it finds
the new one; the model is as it was; the next try works and leaves no other files than a save
without faults. After a fault in a read, the model is to the bit as it was, or the read is whole.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from peft import PeftError

from . import scenarios
from .scenarios import Read, Write, fresh, state_of
from .tracer import WRITES, Call, Fault, Outcome, run

# Read-only questions about a file can't fail for want of space.
ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EINTR)
CHANGES = {
    "openat",
    "write",
    "pwrite64",
    "fsync",
    "ftruncate",
    "mkdir",
    "rename",
    "renameat",
    "close",
}


def faults_of(calls: list[Call]) -> Iterator[Fault]:
    """Yield every fault of a run with these calls."""
    for at, call in enumerate(calls):
        yield Fault(at, "kill")
        if call.name == "close":
            continue  # the descriptor is closed all the same, and an injected error would leave it
        for number in ERRORS:
            if number == errno.ENOSPC and call.name not in CHANGES:
                continue
            yield Fault(at, "error", number)
        if call.name in WRITES and call.arguments[2] > 1:
            yield Fault(at, "short")


def writing(scenario: Write, folder: Path) -> Iterator[tuple[str, str | None]]:
    """Try a write with every fault; yield each fault and what was wrong, None if nothing was."""
    place, after = folder / "place", folder / "after"
    before = state_of(scenario.model)

    def start() -> None:
        fresh(folder)
        place.mkdir()
        scenario.prepare(place)

    start()
    old = scenario.read(place)
    clean = run(lambda: scenario.work(place), place)
    if clean.error:
        raise RuntimeError(f"{scenario.name} fails without a fault:\n{clean.error}")
    new, files = scenario.read(place), sorted(os.listdir(place))
    if old == new:
        raise RuntimeError(f"{scenario.name}: the old content and the new one are the same")

    def work() -> dict[str, object]:
        report: dict[str, object] = {}
        try:
            scenario.work(place)
        except Exception as error:
            report["error"] = f"{type(error).__name__}: {error}"
            report["expected"] = isinstance(error, OSError | PeftError)
            shutil.copytree(place, after)
            report["same"] = state_of(scenario.model) == before
            scenario.work(place)
        return report

    for fault in faults_of(clean.calls):
        start()
        outcome = run(work, place, fault)
        yield _label(fault, clean.calls), _wrong_write(scenario, outcome, folder, old, new, files)


def _wrong_write(
    scenario: Write, outcome: Outcome, folder: Path, old: object, new: object, files: list[str]
) -> str | None:
    """Return what is wrong after a fault in a write, None if nothing is."""
    place, after = folder / "place", folder / "after"
    if outcome.killed:
        if (found := _read(scenario, place)) not in (old, new):
            return f"after the kill a reader finds {found}"
        scenario.work(place)
    elif outcome.error:
        return f"the next try failed: {outcome.error}"
    else:
        report = outcome.value
        if "error" in report:
            if not report["expected"]:
                return f"a bare error: {report['error']}"
            if not report["same"]:
                return "the model has changed"
            if (found := _read(scenario, after)) not in (old, new):
                return f"after {report['error']} a reader finds {found}"
    if (found := _read(scenario, place)) != new:
        return f"in the end a reader finds {found}"
    if sorted(os.listdir(place)) != files:  # a cleaning that failed is made up for by the next
        scenario.work(place)
    if (left := sorted(os.listdir(place))) != files:
        return f"other files than without a fault: {sorted(set(left) ^ set(files))}"
    return None


def _read(scenario: Write, folder: Path) -> object:
    try:
        return scenario.read(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def reading(scenario: Read, folder: Path) -> Iterator[tuple[str, str | None]]:
    """Try a read with every fault; yield each fault and what was wrong, None if nothing was."""
    place = fresh(folder) / "place"
    place.mkdir()
    scenario.prepare(place)

    def result(model: object) -> str:
        return state_of(model)

    def work(expected: str | None = None) -> dict[str, object]:
        model = scenario.model()
        before = state_of(model)
        report: dict[str, object] = {}
        try:
            changed = scenario.work(model, place) or model
        except Exception as error:
            report["error"] = f"{type(error).__name__}: {error}"
            report["expected"] = isinstance(error, OSError | PeftError)
            report["same"] = state_of(model) == before
            changed = scenario.work(model, place) or model
        return {**report, "result": result(changed)}

    clean = run(work, place)
    if clean.error:
        raise RuntimeError(f"{scenario.name} fails without a fault:\n{clean.error}")
    expected = clean.value["result"]
    for fault in faults_of(clean.calls):
        if fault.kind == "kill":
            continue  # a reader that is killed leaves nothing
        outcome = run(work, place, fault)
        yield _label(fault, clean.calls), _wrong_read(outcome, expected)


def _wrong_read(outcome: Outcome, expected: object) -> str | None:
    """Return what is wrong after a fault in a read, None if nothing is."""
    if outcome.killed or outcome.error:
        return f"the next try failed: {outcome.error}"
    report = outcome.value
    if not report.get("expected", True):
        return f"a bare error: {report['error']}"
    if not report.get("same", True):
        return f"the model has changed after {report['error']}"
    if report["result"] != expected:
        return "another model than without a fault"
    return None


def _label(fault: Fault, calls: list[Call]) -> str:
    call = calls[fault.at]
    return f"{fault}, {call.name} {' '.join(os.path.basename(path) for path in call.paths)}"


def all_of(folder: Path) -> Iterator[tuple[str, str, str | None]]:
    """Yield scenario, fault and finding for everything."""
    for scenario in scenarios.writes():
        for fault, wrong in writing(scenario, folder):
            yield scenario.name, fault, wrong
    for scenario in scenarios.reads():
        for fault, wrong in reading(scenario, folder):
            yield scenario.name, fault, wrong
