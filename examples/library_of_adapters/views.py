# SPDX-License-Identifier: Apache-2.0
"""The tasks: eight views of the same pictures, and two that come later.

A view swaps dark and light where a pattern says so. A model that sees a picture can tell the view,
so a router can, and the base model reads few of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """One view of a picture of 8 x 8 pixels.

    Args:
        key: Name in tables, in files and of the view's adapter.
        pattern: 1 where dark and light are swapped, else 0, ``[8, 8]``.
        brightness: What all pixels are multiplied with, last.
    """

    key: str
    pattern: Tensor
    brightness: float = 1.0

    @property
    def label(self) -> str:
        return self.key

    def __call__(self, pixels: Tensor) -> Tensor:
        """Transform ``pixels [n, 1, 8, 8]`` in [0, 1]; same shape and range."""
        return self.brightness * (pixels - self.pattern).abs()


def eight_views() -> list[View]:
    """Return the views of the library; the base model was pretrained on the first."""
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    patterns = {
        "plain": row < 0,
        "inverted": row >= 0,
        "columns": column % 2 == 1,
        "rows": row % 2 == 1,
        "checker": (row + column) % 2 == 1,
        "left": column < 4,
        "top": row < 4,
        "wide": column // 2 % 2 == 1,
    }
    return [View(key, pattern.float()) for key, pattern in patterns.items()]


def new_views() -> list[View]:
    """Return two views that no adapter was trained on: a known one dimmed, and a new pattern."""
    known = {view.key: view.pattern for view in eight_views()}
    return [
        View("columns-dim", known["columns"], brightness=0.5),
        View("corner", known["left"] * known["top"]),
    ]
