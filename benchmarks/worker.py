# SPDX-License-Identifier: Apache-2.0
"""A process that holds one library's adapted model and its frozen twin, and does what it is told:
`time` or `memory`.

Reads one JSON object a line, answers with one.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.work import Shape, Work, adapt, base_model, twin


def main() -> None:
    """Build the frozen model that the first line asks for, then answer the others."""
    warnings.simplefilter("ignore")
    request = json.loads(sys.stdin.readline())
    torch.set_num_threads(request["threads"])
    desk = Desk(Shape(**request["shape"]))
    _answer({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        works = desk.works(order["kind"], order["method"])
        _answer({"time": _times, "memory": _memory}[order["do"]](works, order))


class Desk:
    """The frozen model and its adapted twins, which share its weights."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.base = base_model(shape)
        self.adapted: dict[str, Any] = {}

    def works(self, kind: str, method: str) -> dict[str, Work]:
        """Return the frozen model's step and the adapted one's. Only the last twin is kept."""
        if method not in self.adapted:
            self.adapted.clear()
            model = twin(self.base)
            self.adapted[method] = model, *adapt(model, method, self.shape)
        model, run, arguments = self.adapted[method]
        frozen = Work(kind, self.shape, self.base, self.base, lambda batch: {})
        return {"frozen": frozen, "adapted": Work(kind, self.shape, model, run, arguments)}


def _answer(content: dict) -> None:
    print("\x1e" + json.dumps(content), flush=True)


def _times(works: dict[str, Work], order: dict) -> dict:
    """Return seconds of the frozen model's step and of the adapted one's, in turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        for _ in range(order["warmup"]):
            work()
    for i in range(order["repeat"]):
        for name in sorted(works, reverse=bool(i % 2)):
            start = time.perf_counter()
            works[name]()
            times[name].append(time.perf_counter() - start)
    return times


def _memory(works: dict[str, Work], order: dict) -> dict:
    """Return the peak memory that a step adds, in bytes."""
    return {name: _peak(work) for name, work in works.items()}


def _peak(work: Work) -> int:
    work()
    if work.ids.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    held = peak = 0
    for event in sorted(
        profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()
    ):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main()
