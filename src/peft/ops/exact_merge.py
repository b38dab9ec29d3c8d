# SPDX-License-Identifier: Apache-2.0
"""Adding a delta to a weight, and subtracting it so that the weight is bit by bit the original."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..base.errors import warn
from ..base.geometry import Geometry
from ..base.tensors import ordinary_tensors


class Recipe(NamedTuple):
    """A dense delta as a function of small tensors, which computes the same bits each time.

    Args:
        compute: A function at the top of a module, so that a merged model can be pickled.
        arguments: Its arguments: tensors, named tuples of tensors, and plain values.
    """

    compute: Callable[..., Tensor]
    arguments: tuple[object, ...]

    def weight(self) -> Tensor:
        """Compute the delta."""
        return self.compute(*self.arguments)

    def copied(self) -> Recipe:
        """Copy the tensors, so that later changes of the parameters leave the delta as it is."""
        return self._mapped(lambda tensor: tensor.detach().clone())

    def on(self, device: torch.device) -> Recipe:
        """Move the tensors to a device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Recipe:
        return Recipe(self.compute, tuple(_mapped(entry, function) for entry in self.arguments))


def unchanged(delta: Tensor) -> Tensor:
    """Return a delta that is kept as it is."""
    return delta


def scaled_product(geometry: Geometry, A: Tensor, B: Tensor, scale: float | Tensor) -> Tensor:
    """Return `scale · B·A` in a layer's layout, with `A [r, in · taps]` and `B [out, r]`."""
    return _as_stored(geometry, (B @ A) * scale)


def sum_of_products(geometry: Geometry, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Return `Σ B·A` in a layer's layout, with pairs `A [r, in · taps]`, `B [out, r]`."""
    delta = pairs[0][1] @ pairs[0][0]
    for A, B in pairs[1:]:
        delta = delta + B @ A
    return _as_stored(geometry, delta)


def _as_stored(geometry: Geometry, delta: Tensor) -> Tensor:
    return geometry.as_stored(delta.view(-1, geometry.in_features, *geometry.kernel_size))


def _mapped(value: object, function: Callable[[Tensor], Tensor]) -> object:
    """Apply a function to the tensors in nested tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        parts = tuple(_mapped(part, function) for part in value)
        make = getattr(value, "_make", None)  # a named tuple's
        return parts if make is None else make(parts)
    return value


class Correction(NamedTuple):
    """The data that undoes a sum, in addition to the delta: the elements that subtraction would not
    restore, by flat position (or all, if they are many), and the factor on the sum.
    """

    positions: Tensor | None
    values: Tensor
    factor: Tensor | None = None


def add(weight: Tensor, delta: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Correction]:
    """Return `factor · (weight + delta)`, rounded once, and the correction that undoes it.

    The sum is taken in a wider dtype than the weight's, so rounding moves an element by at most
    half a unit in its last place. Subtracting the same delta rounds back to it, unless the sum has
    a larger exponent; those elements are kept. With a factor there are more.
    """
    total = _wide(weight) + _wide(delta)
    merged = (total if factor is None else total * _wide(factor)).to(weight.dtype)
    return merged, correction(weight, merged, delta, factor)


def correction(
    weight: Tensor, merged: Tensor, delta: Tensor, factor: Tensor | None = None
) -> Correction:
    """Return the data that recovers `weight` from `merged`, in addition to the delta."""
    if weight.is_meta:
        return Correction(None, weight, factor)
    lost = (_take_off(merged, delta, factor) != weight).flatten().nonzero().squeeze(1)
    if 3 * len(lost) > weight.numel():  # a position takes two or four times the memory of a value
        return Correction(None, weight.detach().clone(), factor)
    return Correction(lost, weight.flatten()[lost], factor)


def subtract(
    merged: Tensor, delta: Tensor, correction: Correction, is_changed: bool = False
) -> Tensor:
    """Return the weight that `add` was given, bit by bit if `delta` is the same. Of a sum that was
    changed since, return `merged / f - delta`, rounded.
    """
    positions, values, factor = correction
    if is_changed:
        return _take_off(merged, delta, factor)
    if positions is None:
        return values.to(merged.device)
    weight = _take_off(merged, delta, factor)
    lost = torch.unravel_index(positions.to(weight.device), weight.shape)
    weight[lost] = values.to(weight.device)  # by index: the weight may be in channels_last
    return weight


class Written:
    """A merged weight as it was last written, to notice later changes by others.

    Args:
        before: The record that this one replaces, while earlier merges stay.
        is_final: False if the weight is about to be loaded.
    """

    def __init__(
        self, weight: Tensor, before: Written | None = None, is_final: bool = True
    ) -> None:
        self.dtype = weight.dtype
        self.checksum = _checksum(weight) if is_final else None
        self.is_changed: bool = before is not None and before.is_changed

    def look(self, weight: Tensor, names: Iterable[str]) -> None:
        """Note if a weight was changed since, and warn with the names of the merged adapters."""
        if self.is_changed or self.checksum is None or torch.compiler.is_compiling():
            return
        if weight.dtype == self.dtype and _checksum(weight) not in (None, self.checksum):
            self.is_changed = True
            warn(
                "A base weight was changed while adapters were merged into it: "
                f"{', '.join(names)}. Unmerging subtracts their deltas from the changed "
                "weight, up to rounding. Call `unmerge_adapter` before base weights are changed."
            )


def _checksum(weight: Tensor) -> int | None:
    """Return a number that almost any change changes; None for a meta or sharded weight."""
    dtypes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    dtype = dtypes.get(weight.element_size())
    if dtype is None or weight.is_meta or type(weight) not in (Tensor, nn.Parameter):
        return None
    return int(weight.detach().contiguous().view(dtype).sum(dtype=torch.int64))


def _take_off(merged: Tensor, delta: Tensor, factor: Tensor | None) -> Tensor:
    total = _wide(merged) if factor is None else _wide(merged) / _wide(factor.to(merged.device))
    return (total - _wide(delta)).to(merged.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """Return `tensor` in a dtype that can hold its sums."""
    if tensor.dtype == torch.float32 and tensor.device.type != "mps":
        return tensor.double()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Context whose results don't depend on the caller's gradient, autocast and inference modes."""
    is_on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    off = torch.autocast(device.type, enabled=False) if is_on else nullcontext()
    with ordinary_tensors(), off:
        yield
