# SPDX-License-Identifier: Apache-2.0
"""`FileModule`: the tensors that a file has for one module, their rank and their scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ....base.tables import sizes
from ..shapes import Shapes, sides, tucker_kernel

# An alpha of this size or more means "no scale": some writers put it where factors are full.
_NO_SCALE = 1e9


class SavedScale(NamedTuple):
    """Rank and alpha of a module by the file's config; the scale is `alpha / r`."""

    r: int
    alpha: float


class RowFactor(NamedTuple):
    """A factor of `W2`, and the axis along which it has the rows of `W2`."""

    name: str
    axis: int


@dataclass
class FileModule:
    """A module of a file.

    Args:
        name: Its name in the file, without the component.
        component: As in `Key`.
        flat: As in `Key`.
        factors: Tensors by the fields of `KroneckerFactors`.
        alpha: Value in the file, None if it has none.
        scalar: Number that LyCORIS trained beside the factors (`use_scalar`), None if there is none
            or it is multiplied into a factor.
        dora_scale: Norms of the weight's rows `[out, 1, …]` or columns `[1, in, …]`, None without
            DoRA.
        saved: Rank and alpha from a config, which alone decide the scale; None without a config.

    Example:
        >>> factors = {"w1": torch.ones(4, 4), "w2_a": torch.ones(8, 2), "w2_b": torch.ones(2, 8)}
        >>> module = FileModule("to_q", "lora_unet", True, factors, alpha=1.0)
        >>> module.describe(), module.rank, module.scale
        ('4x4 (x) 8x2·2x8', 2, 0.5)
    """

    name: str
    component: str
    flat: bool
    factors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None
    scalar: float | None = None
    dora_scale: Tensor | None = None
    saved: SavedScale | None = None

    @property
    def rank(self) -> int | None:
        """Rank of the low-rank factors; None if both sides are full."""
        low = next((self.factors[name] for name in ("w2_b", "w1_b") if name in self.factors), None)
        return None if low is None else low.shape[0]

    @property
    def effective_alpha(self) -> float | None:
        """Alpha; None if no reader scales by it: missing, "no scale", or both sides are full."""
        if self.rank is None or self.alpha is None or not abs(self.alpha) < _NO_SCALE:
            return None
        return self.alpha

    @property
    def scale(self) -> float:
        """Factor on the Kronecker product: `alpha / rank`, or 1 without an effective alpha."""
        if self.saved is not None:
            return self.saved.alpha / self.saved.r
        alpha, rank = self.effective_alpha, self.rank
        return 1.0 if alpha is None or rank is None else alpha / rank

    @property
    def shapes(self) -> Shapes:
        """Shapes of the factors."""
        return {name: tuple(tensor.shape) for name, tensor in self.factors.items()}

    @property
    def left(self) -> str:
        """Name of the factor that has the rows of `W1`."""
        return "w1" if "w1" in self.factors else "w1_a"

    @property
    def right(self) -> RowFactor:
        """Factor that has the rows of `W2`; under Tucker's form they are its columns."""
        if "w2" in self.factors:
            return RowFactor("w2", 0)
        return RowFactor("w2_a", 1 if "t2" in self.factors else 0)

    def fold_scalar(self) -> None:
        """Multiply the scalar into `W1`, as later versions of LyCORIS do when they write a file."""
        if self.scalar is not None and self.left in self.factors:
            self.factors[self.left] = widened(self.factors[self.left]) * self.scalar
            self.scalar = None

    def describe(self) -> str:
        """Return the shapes of both sides in words: "4x4 (x) 8x2·2x8"."""
        return " (x) ".join(
            "·".join(sizes(self.factors[name].shape) for name in side if name in self.factors)
            for side in (("w1", "w1_a", "w1_b"), ("w2", "w2_a", "t2", "w2_b"))
        )

    def for_kernel(self, kernel: Sequence[int]) -> FileModule:
        """Return the module with axes of size one, in which writers differ, as in this kernel."""
        factors = dict(self.factors)
        taps = math.prod(kernel)
        for name, end in (("w2", tuple(kernel)), ("t2", tucker_kernel(kernel))):
            tensor = factors.get(name)
            if tensor is None or tensor.dim() < 2 or (name == "t2" and taps == 1):
                continue
            if math.prod(tensor.shape[2:]) == taps:
                factors[name] = tensor.reshape(*tensor.shape[:2], *end)
        return replace(self, factors=factors)

    def with_factors(self, factors: Mapping[str, Tensor], dora_scale: Tensor | None) -> FileModule:
        """Return the module with some factors, and `dora_scale`, in place of its own."""
        return replace(self, factors={**self.factors, **factors}, dora_scale=dora_scale)

    def rows(self, kernel: Sequence[int]) -> int:
        """Return the number of rows of the product."""
        (a, _), (c, _) = sides(self.shapes, math.prod(kernel))
        return a * c


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least, so that a product with it is rounded once."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
