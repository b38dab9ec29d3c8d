# SPDX-License-Identifier: Apache-2.0
"""Runs of a study: each is a line of JSON, written as it ends. A study that was stopped goes on
with the runs that are missing.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .statistics import Scores

RESULTS = Path(__file__).parent / "results"
MEASURING = ("final", "few")
"""Stages whose runs are tested; those before choose tasks and rates."""


@dataclass(frozen=True)
class Run:
    """One training and what is measured on it.

    Args:
        stage: "selection" of tasks, "rates" or "ways", where rates are chosen on validation texts,
            or one of `MEASURING`.
        arm: The arm's name.
        seed: Of initial values, order of texts, and choice of few examples.
        options: Everything else that it depends on.
    """

    stage: str
    arm: str
    seed: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A name that is the same for the same run."""
        content = json.dumps([self.stage, self.arm, self.seed, self.options], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


Record = dict[str, Any]
"""A run's fields, and what it measured."""


class Study(Protocol):
    """A study.

    Attributes:
        name: Its name and its protocol's.
    """

    name: str

    def arms(self) -> list[str]:
        """Return the names of the arms."""
        ...

    def runs(self, records: list[Record], seeds: Iterable[int], quick: bool) -> list[Run]:
        """Return the runs known so far; those of a stage may follow from records of another."""
        ...

    def measure(self, run: Run, quick: bool) -> Record:
        """Do a run and return what it measures."""
        ...

    def scores(self, records: list[Record]) -> dict[str, Scores]:
        """Return the test accuracies by arm, and by way to adapt where there are several."""
        ...

    def report(self, records: list[Record], folder: Path) -> str:
        """Return the tables in Markdown, and draw the figures."""
        ...


def read(path: Path) -> list[Record]:
    """Return the finished runs of a file, without one that was cut off while it was written.

    Raises:
        ValueError: Another line is not a run.
    """
    text = path.read_text() if path.exists() else ""
    records: list[Record] = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if line.endswith("\n"):
                raise ValueError(f"'{path}', line {number}, is not a run: {error}") from error
            warnings.warn(f"'{path}', line {number}, is cut off and left out.", stacklevel=2)
    return records


def _write(path: Path, records: Iterable[Record]) -> None:
    new = path.with_suffix(".new")
    new.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    new.replace(path)


def copy_choices(source: Path, target: Path) -> None:
    """Write the runs that chose tasks and rates to another file, if it is not there yet."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(target, (run for run in read(source) if run["stage"] not in MEASURING))


def go_on(
    study: Study,
    path: Path,
    seeds: Iterable[int],
    workers: int,
    minutes: float,
    quick: bool,
    arms: Collection[str] = (),
) -> bool:
    """Do the runs that are missing, for so many minutes; of `arms` alone, if any is named. Return
    whether none is left.

    A run that is under way when the time is over is finished.
    """
    end, seeds = time.monotonic() + 60 * minutes, list(seeds)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        _write(path, read(path))  # so that what is appended begins a line
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        under_way: dict[Future[Record], Run] = {}
        while True:
            todo = [
                run
                for run in _missing(study, read(path), seeds, quick, under_way.values())
                if not arms or run.arm in arms or run.stage not in MEASURING
            ]
            while todo and len(under_way) < workers and time.monotonic() < end:
                run = todo.pop(0)
                under_way[pool.submit(_measured, study, run, quick)] = run
            if not under_way:
                return not todo
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                record = future.result()
                del under_way[future]
                with path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(f"{record['stage']} {record['arm']} seed {record['seed']} "
                      f"{record['options']}: {record['seconds']:.0f} s, "
                      f"{len(todo) + len(under_way)} runs to go", flush=True)  # fmt: skip


def _end_with_parent() -> None:
    """Let a worker end, and not wait for work forever, when the process that began it is killed."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _missing(
    study: Study, records: list[Record], seeds: list[int], quick: bool, busy: Iterable[Run]
) -> list[Run]:
    done = {record["key"] for record in records} | {run.key for run in busy}
    return [run for run in study.runs(records, seeds, quick) if run.key not in done]


def _measured(study: Study, run: Run, quick: bool) -> Record:
    import torch

    torch.set_num_threads(1)
    # Products with factors rounded to bfloat16, where the processor has them: a third faster.
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    begin = time.perf_counter()
    measured = study.measure(run, quick)
    own = {"key": run.key, "stage": run.stage, "arm": run.arm, "seed": run.seed}
    return {
        **own, "options": run.options, **measured, "seconds": round(time.perf_counter() - begin, 1)
    }  # fmt: skip


def best(records: Iterable[Record], score: Callable[[Record], float]) -> Record:
    """Return the record with the highest score; of equal ones, the first by key."""
    return max(sorted(records, key=lambda record: record["key"]), key=score)


def rates_to_try(scores: Sequence[float | None]) -> list[int]:
    """Return the numbers of the rates to try, given the score of each, None where there is none.

    All but the first and last are tried; then the first or last, where its neighbor was the best.
    """
    inner = range(1, len(scores) - 1)
    known = [score for score in scores[1:-1] if score is not None]
    if len(known) < len(inner):
        return list(inner)
    top = inner[known.index(max(known))]
    return [*inner, *[0] * (top == inner[0]), *[len(scores) - 1] * (top == inner[-1])]
