# SPDX-License-Identifier: Apache-2.0
"""Run the campaigns: `python -m torture --minutes 10`.

Prints what was enumerated and what failed. Scenarios that were finished are skipped by the next
run with `--resume`. The exit code is 1 if anything was lost. `--only mutants` tests the tests
(`mutants.py`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import (
    allocations,
    faults,
    file_systems,
    hostile,
    power,
    resuming,
    scenarios,
    sharded,
    threads,
    together,
    tracer,
)


class Campaign(NamedTuple):
    """A kind of damage, its scenarios, and what tries one of them."""

    name: str
    scenarios: Callable[[], Iterator[Any]]
    tries: Callable[..., Iterator[tuple[str, str | None]]]


def _faults(scenario: object, folder: Path, seed: int) -> Iterator[tuple[str, str | None]]:
    if isinstance(scenario, scenarios.Write):
        return faults.writing(scenario, folder)
    return faults.reading(scenario, folder)


def _operations() -> Iterator[scenarios.Write | scenarios.Read]:
    yield from scenarios.writes()
    yield from scenarios.reads()


def campaigns(options: argparse.Namespace) -> tuple[Campaign, ...]:
    """Return the campaigns, of the sizes that the options say."""
    meeting = together.lasting(options.seconds, options.readers, options.writers)
    return (
        Campaign("memory", allocations.changes, allocations.exhausting),
        Campaign("power", scenarios.writes, power.cutting),
        Campaign("faults", _operations, _faults),
        Campaign("threads", threads.scenarios, threads.meeting),
        Campaign("together", together.pairs, meeting),
        Campaign("sharded", sharded.scenarios, sharded.killing),
        Campaign("resuming", resuming.scenarios, resuming.resuming),
        Campaign("file systems", file_systems.scenarios, file_systems.saving),
        Campaign("hostile", hostile.targets, hostile.inputs(options.inputs, options.parsed)),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run campaigns and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:2] == ["--only", "mutants"]:  # it has options of its own
        from . import mutants

        return mutants.main(arguments[2:])
    if "--guided" in arguments:  # in a process that has not imported what is followed
        rest = [word for word in arguments if word != "--guided"]
        return subprocess.run([sys.executable, "-m", f"{__package__}.guided", *rest]).returncode
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so many")
    parser.add_argument("--only", nargs="*", help="campaigns or words of scenarios' names")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--inputs", type=int, default=20_000, help="damaged files of each kind")
    parser.add_argument("--parsed", type=int, help="of each that needs no model; 25 times as many")
    parser.add_argument("--guided", action="store_true", help="hostile, guided by coverage")
    parser.add_argument("--seconds", type=float, default=10.0, help="that processes meet")
    parser.add_argument("--readers", type=int, default=4, help="processes that read one folder")
    parser.add_argument("--writers", type=int, default=2, help="processes that write it")
    parser.add_argument("--resume", action="store_true", help="skip what was finished")
    parser.add_argument("--output", type=Path, default=Path("torture_output"))
    options = parser.parse_args(arguments)
    if not tracer.is_supported():
        print("Processes are traced on Linux on x86-64 only; nothing was tried.")
        return 2
    torch.set_num_threads(1)
    options.output.mkdir(exist_ok=True)
    record = options.output / "done.json"
    done = json.loads(record.read_text()) if options.resume and record.exists() else {}
    end = time.monotonic() + 60 * options.minutes
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        for campaign in campaigns(options):
            for scenario in campaign.scenarios():
                name = f"{campaign.name}: {scenario.name}"
                if name in done or (options.only and not any(w in name for w in options.only)):
                    continue
                tries = campaign.tries(scenario, Path(folder) / "work", options.seed)
                number, wrong = _count(tries, end)
                lost += sum(wrong.values())
                if number is None:
                    print("The time is over.")
                    return _verdict(lost, done)
                _print(name, number, wrong)
                if not wrong:
                    done[name] = number
                    record.write_text(json.dumps(done, indent=1) + "\n")
    return _verdict(lost, done)


def _count(
    tries: Iterator[tuple[str, str | None]], end: float
) -> tuple[int | None, Counter[tuple[str, str]]]:
    """Return the number of tries, None if the time was over, and what was wrong."""
    number, wrong = 0, Counter[tuple[str, str]]()
    for what, finding in tries:
        number += 1
        if finding is not None:
            wrong[finding, what] += 1
        if time.monotonic() > end:
            return None, wrong
    return number, wrong


def _print(name: str, number: int, wrong: Counter[tuple[str, str]]) -> None:
    print(f"{name}: {number:,} tried, {sum(wrong.values())} lost", flush=True)
    for (finding, what), times in wrong.most_common(10):
        print(f"    {times} x {what}: {finding}")


def _verdict(lost: int, done: dict[str, int]) -> int:
    print(f"{sum(done.values()):,} tried and kept in {len(done)} scenarios; {lost} lost.")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
