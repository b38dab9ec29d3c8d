# SPDX-License-Identifier: Apache-2.0
"""The tasks: eight ways of looking at the same picture, and two that come later.

A task is a fixed transform of the input; the labels stay what they are. The eight share structure
(four rotations, each plain and inverted), which is what a shared inventory of skills can use and
eight separate adapters cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """One transform of an image batch.

    Args:
        key: Name in files and of the task's adapter.
        label: Name in tables and figures.
        quarter_turns: Anticlockwise rotation, in units of 90 degrees.
        inverted: Swap dark and light.
        mirrored: Swap left and right, before the rotation.
        brightness: What all pixels are multiplied with, last.
    """

    key: str
    label: str
    quarter_turns: int = 0
    inverted: bool = False
    mirrored: bool = False
    brightness: float = 1.0

    def __call__(self, pixels: Tensor) -> Tensor:
        """Transform ``pixels [n, channels, side, side]`` in [0, 1]; same shape and range."""
        if self.mirrored:
            pixels = pixels.flip(3)
        pixels = torch.rot90(pixels, self.quarter_turns, dims=(2, 3))
        return self.brightness * (1 - pixels if self.inverted else pixels)


def eight_tasks() -> list[Task]:
    """Four rotations, plain and inverted; the first is the view that the base model was pretrained
    on.
    """
    plain = [Task(f"rot{90 * k}", f"{90 * k}°", k) for k in range(4)]
    inverted = [Task(f"rot{90 * k}-inv", f"{90 * k}° inv", k, inverted=True) for k in range(4)]
    return plain + inverted


def late_tasks() -> list[Task]:
    """Unseen in the joint training: one that is close to the eight, and one that is not.

    The dimmed quarter turn recombines what the eight hold (a rotation, a change of brightness). No
    rotation or inversion gives a mirror image, so there the skills lack what the task needs; it is
    shown because mixing skills has this limit.
    """
    return [
        Task("rot90-dim", "90° dimmed", 1, brightness=0.5),
        Task("mirror", "mirrored", mirrored=True),
    ]
