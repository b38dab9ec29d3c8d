# SPDX-License-Identifier: Apache-2.0
"""Worker processes, one for each library, that take turns at the same work."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .work import Shape

HERE = Path(__file__).parent
ROOT = HERE.parent
# Where each library is imported from; peers are installed in folders of their own.
LIBRARIES = {"ours": ROOT / "src", "peft": ROOT / ".peer", "lycoris": ROOT / ".peer-lycoris"}
METHODS = ("lora", "lokr", "lokr-full", "vblora", "poly", "mhr")
# Which methods a library has, under which name.
_NAMES = {
    "ours": {name: name for name in (*METHODS, "arrow")},
    "peft": {name: name for name in (*METHODS, "arrow")},
    "lycoris": {"lokr": "lycoris-lokr"},
}


# Seconds of steps, the frozen model's and the adapted one's.
Turn = dict[str, list[float]]


class Worker:
    """A process with one library.

    Args:
        library: Which library.
        request: The size of the work.

    Raises:
        RuntimeError: It failed; the process's errors are in the message.
    """

    def __init__(self, library: str, request: dict[str, Any]) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(LIBRARIES[library]),
            "OMP_NUM_THREADS": str(request["threads"]),
        }
        command = [sys.executable, str(HERE / "worker.py")]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.ask(request)

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Give an order and wait for the answer."""
        assert (
            self.process.stdin is not None
            and self.process.stdout is not None
            and self.process.stderr is not None
        )
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self.process.stdout:
            if line.startswith("\x1e"):
                return json.loads(line[1:])
        raise RuntimeError(f"{self.process.args}: {self.process.stderr.read()[-2000:]}")

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


class Workers:
    """A worker for each library, at work of one size; a context that ends them.

    Args:
        shape: The size.
        libraries: Names of libraries; those that are not installed are left out.
        threads: For each.
    """

    def __init__(self, shape: Shape, libraries: Iterable[str], threads: int) -> None:
        self.shape = shape
        self.workers: dict[str, Worker] = {}
        request = {"threads": threads, "shape": dataclasses.asdict(shape)}
        try:
            for library in libraries:
                if LIBRARIES[library].is_dir():
                    self.workers[library] = Worker(library, request)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: Any) -> None:
        for worker in self.workers.values():
            worker.close()

    def measure(self, method: str, kind: str, rounds: int, repeat: int) -> list[dict[str, Any]]:
        """Return the ratio of the adapted step's time to the frozen step's, for each library that
        has the method.
        """
        able = {
            library: worker for library, worker in self.workers.items() if method in _NAMES[library]
        }
        orders = {library: {"kind": kind, "method": _NAMES[library][method]} for library in able}
        times: dict[str, list[Turn]] = {library: [] for library in able}
        for i in range(rounds):
            for library, worker in able.items():
                order = {
                    "do": "time",
                    "warmup": 2 if i == 0 else 1,
                    "repeat": repeat,
                    **orders[library],
                }
                times[library].append(worker.ask(order))
        rows = []
        for library, worker in able.items():
            memory = worker.ask({"do": "memory", **orders[library]})
            rows.append(
                {
                    "library": library,
                    "method": method,
                    "mode": kind,
                    **self._figures(times[library], memory),
                }
            )
        return rows

    def _figures(self, turns: list[Turn], memory: dict[str, int]) -> dict[str, Any]:
        ratios = [
            a / f for turn in turns for a, f in zip(turn["adapted"], turn["frozen"], strict=True)
        ]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
        return {
            **dataclasses.asdict(self.shape),
            "ratio": quartiles[1],
            "low": quartiles[0],
            "high": quartiles[2],
            "frozen_ms": 1e3 * statistics.median(t for turn in turns for t in turn["frozen"]),
            "extra_MB": (memory["adapted"] - memory["frozen"]) / 2**20,
            "steps": len(ratios),
        }
