# SPDX-License-Identifier: Apache-2.0
"""The tasks: a geometry and a light, so that tasks share parts; and ways of seeing that share none
with them.

A task is a fixed transform of the picture; the label stays the digit. Every picture tells (nearly)
which task it is of, so that methods which are never told the task can do well too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]


def _turned(quarters: int, mirrored: bool) -> Transform:
    return lambda pixels: torch.rot90(pixels.flip(3) if mirrored else pixels, quarters, dims=(2, 3))


def _striped(pixels: Tensor) -> Tensor:
    kept = torch.ones(pixels.shape[-1])
    kept[1::3] = 0
    return pixels * kept.view(1, 1, -1, 1)


def _checked(pixels: Tensor) -> Tensor:
    rows, columns = torch.meshgrid(
        torch.arange(pixels.shape[2]), torch.arange(pixels.shape[3]), indexing="ij"
    )
    odd = ((rows // 2 + columns // 2) % 2).to(pixels.dtype)
    return pixels * (1 - odd) + (1 - pixels) * odd


GEOMETRIES = {
    f"{90 * k}°{' mirrored' if m else ''}": _turned(k, m) for m in (False, True) for k in range(4)
}
LIGHTS: dict[str, Transform] = {
    "": lambda pixels: pixels,
    "inverted": lambda pixels: 1 - pixels,
    "dimmed": lambda pixels: 0.4 * pixels,
    "striped": _striped,
}
NOVEL: dict[str, Transform] = {
    "quadrants swapped": lambda pixels: pixels.roll((4, 4), dims=(2, 3)),
    "checkered": _checked,
}


@dataclass(frozen=True)
class Task:
    """A transform of pictures ``[n, 1, 8, 8]`` in [0, 1], and its name."""

    name: str
    transform: Transform

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.transform(pixels)


def composed() -> list[Task]:
    """Return all 32 pairs of a geometry and a light."""
    tasks = []
    for geometry, turn in GEOMETRIES.items():
        for light, change in LIGHTS.items():
            tasks.append(
                Task(
                    f"{geometry} {light}".strip(),
                    lambda pixels, turn=turn, change=change: change(turn(pixels)),
                )
            )
    return tasks


def draw(seed: int, held_out: int = 4) -> tuple[list[Task], list[Task], list[Task]]:
    """Return tasks to train on, new pairs of their parts, and tasks that share nothing with them.

    Every geometry and every light is in some task to train on, whichever pairs are held out.
    """
    tasks = composed()
    order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(seed)).tolist()
    pairs = [tasks[i] for i in sorted(order[:held_out])]
    trained = [tasks[i] for i in sorted(order[held_out:])]
    return trained, pairs, [Task(name, transform) for name, transform in NOVEL.items()]
