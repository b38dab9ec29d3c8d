# SPDX-License-Identifier: Apache-2.0
"""A file's modules: their tensors, their rank and scale, and what becomes of them where a layer is
in one or several parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..shapes import sides, tucker_kernel

# An alpha of this size is no number to scale by: writers put the rank there, and an impossible one
# where factors are whole.
PLACEHOLDER = 1e9


@dataclass
class FileModule:
    """A module of a file.

    Args:
        name: As in the file, without its component.
        component: See `Key`.
        flat: Whether the name has `_` for dots.
        factors: Tensors by the fields of `KroneckerFactors`.
        alpha: What the file says, None for nothing.
        scalar: A factor on the product that LyCORIS trained (`use_scalar`), None where the factors
            have it in them.
        dora_scale: Lengths of the weight's rows `[out, 1, …]` or columns `[1, in, …]`, None without
            decomposition.
        known: `r` and `alpha` as a config says them, which then decide the scale alone, None
            without a config.
    """

    name: str
    component: str
    flat: bool
    factors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None
    scalar: float | None = None
    dora_scale: Tensor | None = None
    known: tuple[int, float] | None = None

    @property
    def rank(self) -> int | None:
        """The rank, None where both sides are whole: then the file does not show it."""
        low = next((self.factors[name] for name in ("w2_b", "w1_b") if name in self.factors), None)
        return None if low is None else low.shape[0]

    @property
    def has_placeholder(self) -> bool:
        """Whether alpha stands for "no scale"."""
        return self.alpha is not None and not abs(self.alpha) < PLACEHOLDER

    @property
    def scale(self) -> float:
        """The factor on the product: `alpha / rank`; 1 where both sides are whole, or alpha is
        missing or a placeholder.
        """
        if self.known is not None:
            return self.known[1] / self.known[0]
        if self.rank is None or self.alpha is None or self.has_placeholder:
            return 1.0
        return self.alpha / self.rank

    def take_in_scalar(self) -> None:
        """Multiply the scalar into `W1`, as later versions of LyCORIS do when they write a file."""
        left = next((name for name in ("w1", "w1_a") if name in self.factors), None)
        if self.scalar is not None and left is not None:
            tensor = self.factors[left]
            self.factors[left] = (
                tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * self.scalar
            )
            self.scalar = None

    @property
    def form(self) -> str:
        """The form of the factors in words, such as "4x4 (x) 8x2·2x8"."""

        def size(tensor: Tensor) -> str:
            return "x".join(map(str, tensor.shape))

        f = self.factors
        left = (
            size(f["w1"]) if "w1" in f else "·".join(size(f[n]) for n in ("w1_a", "w1_b") if n in f)
        )
        right = (
            size(f["w2"])
            if "w2" in f
            else "·".join(size(f[n]) for n in ("w2_a", "t2", "w2_b") if n in f)
        )
        return f"{left} (x) {right}"

    def for_kernel(self, kernel: Sequence[int]) -> FileModule:
        """The same with its tensors in the shapes of a layer with this kernel: writers differ in
        what they do with axes of one.
        """
        factors = dict(self.factors)
        taps = math.prod(kernel)
        for name, end in (("w2", tuple(kernel)), ("t2", tucker_kernel(kernel))):
            tensor = factors.get(name)
            if (
                tensor is not None
                and tensor.dim() >= 2
                and math.prod(tensor.shape[2:]) == taps
                and (name == "w2" or taps > 1)
            ):
                factors[name] = tensor.reshape(*tensor.shape[:2], *end)
        return replace(self, factors=factors)

    def rows(self, kernel: Sequence[int]) -> int:
        """Rows of the product."""
        (a, _), (c, _) = sides(
            {name: tensor.shape for name, tensor in self.factors.items()}, math.prod(kernel)
        )
        return a * c


@dataclass
class Piece:
    """What one layer gets of a module.

    Args:
        module: With the layer's factors.
        row_offset: Which rows of their product are the layer's; None: the product has no others.
    """

    module: FileModule
    row_offset: int | None = None


def split(module: FileModule, sizes: Sequence[int], kernel: Sequence[int]) -> list[Piece]:
    """A module for a layer, as pieces for layers that have its outputs between them; exact.

    Row `i·c + p` of `W1 ⊗ W2` is row `i` of `W1` times row `p` of `W2`. So the rows from `start` to
    `stop` need the rows of `W1` from `start // c` to `⌈stop / c⌉`; where blocks of `c` rows go
    across the ends, the layer takes its rows of a slightly larger product.

    Args:
        module: With factors that fit a layer of `sum(sizes)` outputs.
        sizes: Outputs of the layers.
        kernel: Kernel size of all of them.

    Example:
        >>> module = FileModule("qkv", "", False, {"w1": torch.ones(8, 2), "w2": torch.ones(9, 3)})
        >>> [(tuple(p.module.factors["w1"].shape), p.row_offset) for p in split(module, [24, 24, 24], ())]
        [((3, 2), 0), ((4, 2), 6), ((3, 2), 3)]
    """
    a = (module.factors["w1"] if "w1" in module.factors else module.factors["w1_a"]).shape[0]
    c = module.rows(kernel) // a
    pieces, start = [], 0
    for size in sizes:
        stop = start + size
        first, last = start // c, -(-stop // c)
        factors = dict(module.factors)
        left = "w1" if "w1" in factors else "w1_a"
        factors[left] = factors[left][first:last].clone()
        offset: int | None = start - first * c
        if a == 1:  # then the layers have rows of W2 to themselves
            name, axis = ("w2", 0) if "w2" in factors else ("w2_a", 1 if "t2" in factors else 0)
            factors[name] = factors[name].narrow(axis, start - first * c, size).clone()
            offset = None
        elif (last - first) * c == size:
            offset = None
        dora = module.dora_scale
        dora = None if dora is None else dora[start:stop].clone()
        pieces.append(Piece(replace(module, factors=factors, dora_scale=dora), offset))
        start = stop
    return pieces


def join(pieces: Sequence[Piece], sizes: Sequence[int], kernel: Sequence[int]) -> FileModule | None:
    """The inverse of `split`: one module with the outputs of several, None where no Kronecker
    product is exactly that.

    Args:
        pieces: What the layers have.
        sizes: Their outputs.
        kernel: Kernel size of all of them.
    """
    first = pieces[0].module
    names = set(first.factors)
    left = "w1" if "w1" in names else "w1_a"
    if any(
        set(piece.module.factors) != names or piece.module.scale != first.scale for piece in pieces
    ):
        return None
    shared = names - {left}
    if all(_same(piece.module.factors, first.factors, shared) for piece in pieces):
        stacked = _stacked(pieces, sizes, left, first.rows(kernel) // first.factors[left].shape[0])
        return (
            None
            if stacked is None
            else replace(
                first, factors={**first.factors, left: stacked}, dora_scale=_lengths(pieces)
            )
        )
    name, axis = ("w2", 0) if "w2" in names else ("w2_a", 1 if "t2" in names else 0)
    one_row = first.factors[left].shape[0] == 1 and all(
        piece.row_offset is None for piece in pieces
    )
    if one_row and all(
        _same(piece.module.factors, first.factors, names - {name}) for piece in pieces
    ):
        whole = torch.cat([piece.module.factors[name] for piece in pieces], dim=axis)
        return replace(first, factors={**first.factors, name: whole}, dora_scale=_lengths(pieces))
    return None


def _stacked(pieces: Sequence[Piece], sizes: Sequence[int], left: str, c: int) -> Tensor | None:
    """`W1` of which the pieces have rows, some of them twice; None where these differ or leave
    gaps.
    """
    total = sum(sizes)
    if total % c:
        return None
    rows: list[Tensor | None] = [None] * (total // c)
    start = 0
    for piece, size in zip(pieces, sizes, strict=True):
        offset = piece.row_offset or 0
        if (start - offset) % c or start < offset:
            return None
        for i, row in enumerate(piece.module.factors[left], (start - offset) // c):
            if i >= len(rows):
                return None
            known = rows[i]
            if known is not None and not torch.equal(known, row):
                return None
            rows[i] = row
        start += size
    found = [row for row in rows if row is not None]
    return torch.stack(found) if len(found) == len(rows) else None


def _lengths(pieces: Sequence[Piece]) -> Tensor | None:
    lengths = [piece.module.dora_scale for piece in pieces]
    known = [tensor for tensor in lengths if tensor is not None]
    return torch.cat(known) if len(known) == len(lengths) else None


def _same(a: dict[str, Tensor], b: dict[str, Tensor], names: set[str]) -> bool:
    return all(a[name].shape == b[name].shape and torch.equal(a[name], b[name]) for name in names)
