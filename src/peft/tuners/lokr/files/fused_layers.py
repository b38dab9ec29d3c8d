# SPDX-License-Identifier: Apache-2.0
"""Exact division of a Kronecker product among several layers, and the way back: implementations
differ in whether `q`, `k` and `v` are one layer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .file_module import FileModule


@dataclass
class Piece:
    """A layer's factors and its first row in their product; None if all rows are the layer's."""

    module: FileModule
    row_offset: int | None = None


def split(module: FileModule, sizes: Sequence[int], kernel: Sequence[int]) -> list[Piece]:
    """Divide the module of a fused layer among the layers that it fuses, exactly.

    Row `i·c + p` of `W1 ⊗ W2` is row `i` of `W1` times row `p` of `W2`. So the rows from `start` to
    `stop` need the rows of `W1` from `start // c` to `⌈stop / c⌉`. If a block of `c` rows crosses
    an end, the layer takes its rows of a slightly larger product.

    Example:
        >>> module = FileModule("qkv", "", False, {"w1": torch.ones(8, 2), "w2": torch.ones(9, 3)})
        >>> pieces = split(module, [24, 24, 24], ())
        >>> [(tuple(piece.module.factors["w1"].shape), piece.row_offset) for piece in pieces]
        [((3, 2), 0), ((4, 2), 6), ((3, 2), 3)]
    """
    left, right = module.left, module.right
    a = module.factors[left].shape[0]
    c = module.rows(kernel) // a
    pieces, start = [], 0
    for size in sizes:
        stop = start + size
        first, last = start // c, -(-stop // c)
        factors = {left: module.factors[left][first:last].clone()}
        offset: int | None = start - first * c
        if a == 1:  # each layer has rows of W2 to itself
            rows = module.factors[right.name].narrow(right.axis, start, size)
            factors[right.name] = rows.clone()
            offset = None
        elif (last - first) * c == size:
            offset = None
        norms = None if module.dora_scale is None else module.dora_scale[start:stop].clone()
        pieces.append(Piece(module.with_factors(factors, norms), offset))
        start = stop
    return pieces


def join(pieces: Sequence[Piece], sizes: Sequence[int], kernel: Sequence[int]) -> FileModule | None:
    """Make one module of the pieces of several layers, the inverse of `split`; None if no Kronecker
    product is exactly that.
    """
    first = pieces[0].module
    names, left, right = set(first.factors), first.left, first.right
    modules = [piece.module for piece in pieces]
    if any(set(module.factors) != names or module.scale != first.scale for module in modules):
        return None
    if _share(modules, names - {left}):
        c = first.rows(kernel) // first.factors[left].shape[0]
        stacked = _stacked(pieces, sizes, left, c)
        return None if stacked is None else first.with_factors({left: stacked}, _norms(modules))
    if first.factors[left].shape[0] > 1 or any(piece.row_offset is not None for piece in pieces):
        return None
    if not _share(modules, names - {right.name}):
        return None
    rows = torch.cat([module.factors[right.name] for module in modules], dim=right.axis)
    return first.with_factors({right.name: rows}, _norms(modules))


def _stacked(pieces: Sequence[Piece], sizes: Sequence[int], left: str, c: int) -> Tensor | None:
    """Return the `W1` that has all pieces' rows; None if shared rows differ or rows are missing."""
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
            present = rows[i]
            if present is not None and not torch.equal(present, row):
                return None
            rows[i] = row
        start += size
    complete = [row for row in rows if row is not None]
    return torch.stack(complete) if len(complete) == len(rows) else None


def _norms(modules: Sequence[FileModule]) -> Tensor | None:
    norms = [module.dora_scale for module in modules if module.dora_scale is not None]
    return torch.cat(norms) if len(norms) == len(modules) else None


def _share(modules: Sequence[FileModule], names: Collection[str]) -> bool:
    """Return whether all modules have the same tensors of some names."""
    first = modules[0].factors
    return all(torch.equal(module.factors[n], first[n]) for module in modules for n in names)
