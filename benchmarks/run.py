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
    "ours": dict(zip(METHODS, METHODS, strict=True)),
    "peft": dict(zip(METHODS, METHODS, strict=True)),
    "lycoris": {"lokr": "lycoris-lokr"},
}


class Worker:
    """A process with one library's model.

    Args:
        library: Which library.
        request: What to build.

    Raises:
        RuntimeError: It could not be built; the process's errors are in the message.
    """

    def __init__(self, library: str, request: dict[str, Any]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(LIBRARIES[library]), "OMP_NUM_THREADS": str(request["threads"])}
        command = [sys.executable, str(HERE / "worker.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.ask(request)

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Give an order and wait for the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None and self.process.stderr is not None
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


def measure(
    shape: Shape, method: str, kind: str, libraries: Iterable[str], rounds: int, repeat: int, threads: int
) -> list[dict[str, Any]]:
    """Rows of results: for each library that has the method, the adapted step's time over the frozen one's."""
    workers: dict[str, Worker] = {}
    times: dict[str, list[dict[str, list[float]]]] = {}
    rows = []
    try:
        for library in libraries:
            name = _NAMES[library].get(method)
            if name is not None and LIBRARIES[library].is_dir():
                request = {"threads": threads, "shape": dataclasses.asdict(shape), "kind": kind, "method": name}
                workers[library], times[library] = Worker(library, request), []
        for i in range(rounds):
            for library, worker in workers.items():
                times[library].append(worker.ask({"do": "time", "warmup": 2 if i == 0 else 1, "repeat": repeat}))
        for library, worker in workers.items():
            memory = worker.ask({"do": "memory"})
            ratios = [a / f for turn in times[library] for a, f in zip(turn["adapted"], turn["frozen"], strict=True)]
            quartiles = statistics.quantiles(ratios, n=4)
            rows.append(
                {
                    "library": library,
                    "method": method,
                    "mode": kind,
                    **{name: getattr(shape, name) for name in ("width", "layers", "rank", "tasks", "bank", "dtype", "device")},
                    "ratio": quartiles[1],
                    "low": quartiles[0],
                    "high": quartiles[2],
                    "frozen_ms": 1e3 * statistics.median(t for turn in times[library] for t in turn["frozen"]),
                    "extra_MB": (memory["adapted"] - memory["frozen"]) / 2**20,
                    "steps": len(ratios),
                }
            )
    finally:
        for worker in workers.values():
            worker.close()
    return rows
