# SPDX-License-Identifier: Apache-2.0
"""Worker processes, one for each library, that take turns at the same work."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .methods import libraries_with
from .work import Shape

HERE = Path(__file__).parent
ROOT = HERE.parent
# Where each library is imported from; peers are installed in folders of their own.
LIBRARIES = {"ours": ROOT / "src", "peft": ROOT / ".peer", "lycoris": ROOT / ".peer-lycoris"}
# Seconds of steps, the frozen model's and the adapted one's.
Turn = dict[str, list[float]]


class Worker:
    """A process with one library.

    Args:
        library: Which library.
        request: The size of the work.
    """

    def __init__(self, library: str, request: dict[str, Any]) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(LIBRARIES[library]),
            "OMP_NUM_THREADS": str(request["threads"]),
        }
        command = [sys.executable, str(HERE / "worker.py")]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)
        self.send(request | {"library": library})

    def send(self, order: dict[str, Any]) -> None:
        """Give an order."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # there will be no answer

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to an order.

        Raises:
            RuntimeError: It failed; the message is what the process says of that.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("\x1e"):
                answer = json.loads(line[1:])
                if "failed" in answer:
                    raise RuntimeError(answer["failed"])
                return answer
        self.errors.seek(0)
        last = self.errors.read().strip().rpartition("\n")[2]
        raise RuntimeError(f"the process ended: {last}")

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
        self.errors.close()


class Workers:
    """A worker for each library, at work of one size; a context that ends them.

    Args:
        shape: The size.
        libraries: Names of libraries; those that are not installed are left out.
        threads: For each.
    """

    def __init__(self, shape: Shape, libraries: Iterable[str], threads: int) -> None:
        self.shape = shape
        self.libraries = [name for name in libraries if LIBRARIES[name].is_dir()]
        self.workers: dict[str, Worker] = {}
        self.request = {"threads": threads, "shape": dataclasses.asdict(shape)}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: Any) -> None:
        for worker in self.workers.values():
            worker.close()

    def measure(self, method: str, kind: str, rounds: int, repeat: int) -> list[dict[str, Any]]:
        """Return the ratio of the adapted step's time to the frozen step's, for each library that
        has the method; where a library fails, what it says.
        """
        able = [name for name in self.libraries if name in libraries_with(method)]
        order = {"kind": kind, "method": method, "repeat": repeat}
        answers: dict[str, list[Any]] = {library: [] for library in able}
        failed: dict[str, str] = {}

        def ask(do: str, libraries: list[str]) -> None:
            libraries = [library for library in libraries if library not in failed]
            for library in libraries:
                self._worker(library).send(order | {"do": do})
            for library in libraries:
                try:
                    answers[library].append(self.workers[library].answer())
                except RuntimeError as error:
                    failed[library] = str(error)
                    # An error can leave a GPU in no state for further work.
                    self.workers.pop(library).close()

        ask("prepare", able)
        for _ in range(rounds):
            for library in able:
                ask("time", [library])
        for library in able:
            ask("facts", [library])
        rows = []
        for library in able:
            row = {"library": library, "method": method, "mode": kind}
            row |= dataclasses.asdict(self.shape)
            if library in failed:
                rows.append(row | {"failed": failed[library]})
            else:
                _, *turns, facts = answers[library]
                rows.append(row | _figures(turns, facts))
        return rows

    def _worker(self, library: str) -> Worker:
        """Return a library's worker, started when it is needed."""
        if library not in self.workers:
            self.workers[library] = Worker(library, self.request)
        return self.workers[library]


def _figures(turns: list[Turn], facts: dict[str, Any]) -> dict[str, Any]:
    ratios = [a / f for turn in turns for a, f in zip(turn["adapted"], turn["frozen"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
    memory = facts.pop("memory")
    figures = {
        "ratio": quartiles[1],
        "low": quartiles[0],
        "high": quartiles[2],
        "frozen_ms": 1e3 * statistics.median(t for turn in turns for t in turn["frozen"]),
        "peak_MB": memory["adapted"] / 2**20,
        "extra_MB": (memory["adapted"] - memory["frozen"]) / 2**20,
        "steps": len(ratios),
    }
    if "device" in facts:
        device = {name: statistics.median(times) for name, times in facts.pop("device").items()}
        figures["device_ratio"] = device["adapted"] / device["frozen"]
        figures["frozen_device_ms"] = 1e3 * device["frozen"]
    return figures | facts
