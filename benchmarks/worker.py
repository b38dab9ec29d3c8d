# SPDX-License-Identifier: Apache-2.0
"""A process that holds one library's adapted model and its frozen twin, and does what it is told:
`prepare` a step, `time` it, or tell its other `facts`.

Reads one JSON object a line, answers with one.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.methods import Adapted, adapt
from benchmarks.work import TARGETS, Shape, Stack, Work, base_model, twin


def main() -> None:
    """Build the frozen model that the first line asks for, then answer the others."""
    warnings.simplefilter("ignore")
    request = json.loads(sys.stdin.readline())
    torch.set_num_threads(request["threads"])
    desk = Desk(request["library"], Shape(**request["shape"]))
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if order["do"] == "prepare":
                _answer(desk.prepare(order["method"], order["kind"]))
            else:
                _answer(desk.times(order["repeat"]) if order["do"] == "time" else desk.facts())
        except Exception as error:
            message = str(error).strip().partition("\n")[0]
            _answer({"failed": f"{type(error).__name__}: {message}"[:300]})


def _answer(content: dict) -> None:
    print("\x1e" + json.dumps(content), flush=True)


class Desk:
    """The frozen model and the adapted twin that is measured now, which shares its weights."""

    def __init__(self, library: str, shape: Shape) -> None:
        self.library, self.shape = library, shape
        self.base = base_model(shape)
        self.method = ""

    def prepare(self, method: str, kind: str) -> dict[str, int]:
        """Make the frozen model's step and the adapted one's, and do each a few times."""
        self.works: dict[str, Work] = {}
        self.kind = kind
        if method != self.method:
            self.adapted = adapt(twin(self.base), self.library, method, self.shape)
            self.method = method
        if self.shape.compiled:
            torch._dynamo.reset()
        for name, model in (("frozen", Adapted(self.base, [])), ("adapted", self.adapted)):
            before = self._graphs()
            self.works[name] = _work(kind, self.shape, model)
            self.works[name]()
            self.first = self._graphs()
            self.breaks = self.first[1] - before[1]
        self._in_turns(2, Work.seconds)
        return {}

    def times(self, repeat: int) -> dict[str, list[float]]:
        """Return seconds of the frozen model's step and of the adapted one's, in turns."""
        self._in_turns(1, Work.seconds)
        return self._in_turns(repeat, Work.seconds)

    def _in_turns(self, repeat: int, measure: Callable[[Work], float]) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in self.works}
        for i in range(repeat):
            for name in sorted(self.works, reverse=bool(i % 2)):
                times[name].append(measure(self.works[name]))
        return times

    def _graphs(self) -> tuple[int, int]:
        """Return how many graphs were compiled, and how many graph breaks there were."""
        if not self.shape.compiled:
            return 0, 0
        counters = torch._dynamo.utils.counters
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    def facts(self) -> dict[str, Any]:
        """Return what else is known of a step: its peak memory in bytes, its error, its time on a
        GPU alone, and the adapted step's graph breaks and the graphs compiled after the first step.
        """
        facts: dict[str, Any] = {}
        if self.shape.compiled:
            facts["breaks"] = self.breaks
            facts["recompilations"] = self._graphs()[0] - self.first[0]
        if self.works["frozen"].on_gpu:
            facts["device"] = self._in_turns(5, Work.device_seconds)
        facts["memory"] = {name: work.peak() for name, work in self.works.items()}
        facts["error"] = error(self.library, self.method, self.kind, self.shape)
        return facts


def _work(kind: str, shape: Shape, model: Adapted) -> Work:
    arguments = model.arguments(shape.rows(kind)[0], shape.device)
    return Work(kind, shape, model.run, arguments, model.trained)


def error(library: str, method: str, kind: str, shape: Shape) -> float:
    """Return the relative error of one adapted layer against the same layer in float64: of its
    output or, of a training step, the largest of the gradients.

    The layer is in evaluation, where no method draws random numbers.
    """
    plain, exact = (_layer(library, method, shape) for _ in range(2))
    exact.run.double()
    random = torch.Generator().manual_seed(2)
    for parameter, other in zip(plain.trained, exact.trained, strict=True):
        parameter.data.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
        other.data = parameter.data.double()
    size = (*shape.rows(kind), shape.width)
    place = shape.device, getattr(torch, shape.dtype)
    x, cotangent = (torch.randn(size, generator=random).to(*place) for _ in range(2))
    results = []
    for model, inputs in ((plain, x), (exact, x.double())):
        run = torch.compile(model.run) if shape.compiled and model is plain else model.run
        inputs.requires_grad_(kind == "train")
        with torch.set_grad_enabled(kind == "train"):
            outputs = [run(inputs, **model.arguments(size[0], shape.device))]
        if kind == "train":
            leaves, last = [inputs, *model.trained], cotangent.to(inputs.dtype)
            found = torch.autograd.grad(outputs, leaves, last, allow_unused=True)
            outputs = [gradient for gradient in found if gradient is not None]
        results.append(outputs)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(*results, strict=True))


def _layer(library: str, method: str, shape: Shape) -> Adapted:
    """Return an adapted stack of one layer; the frozen weights are the same in each call."""
    torch.manual_seed(0)
    with torch.device(shape.device):
        base = Stack(shape.width, 1, TARGETS[:1])
    base.to(getattr(torch, shape.dtype)).requires_grad_(False)
    model = adapt(base, library, method, shape)
    model.run.eval()
    return model


if __name__ == "__main__":
    main()
