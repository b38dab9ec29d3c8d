# SPDX-License-Identifier: Apache-2.0
"""Adding a delta to a weight so that it can be taken off again without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.geometry import Geometry
from ..base.tensors import ordinary_tensors


class Recipe(NamedTuple):
    """A dense delta as a function of small tensors, from which it can be computed again to the bit.

    Args:
        compute: A function at the top of a module, so that a merged model can be pickled.
        arguments: What it takes: tensors, named tuples of tensors, and plain values.
    """

    compute: Callable[..., Tensor]
    arguments: tuple[Any, ...]

    def weight(self) -> Tensor:
        """Compute the delta."""
        return self.compute(*self.arguments)

    def copied(self) -> Recipe:
        """Copy the tensors, so that the delta stays what it is whatever becomes of the parameters."""
        return Recipe(self.compute, _mapped(self.arguments, lambda tensor: tensor.detach().clone()))

    def on(self, device: torch.device) -> Recipe:
        """Move the tensors to a device."""
        return Recipe(self.compute, _mapped(self.arguments, lambda tensor: tensor.to(device)))


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


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the tensors in nested tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        parts = [_mapped(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


class Correction(NamedTuple):
    """What is needed beside the delta to get a weight back: the few elements that undoing the sum
    would not give, by flat position (or all, where they are not few), and the factor on the sum.
    """

    positions: Tensor | None
    values: Tensor
    factor: Tensor | None = None


def add(weight: Tensor, delta: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Correction]:
    """`factor · (weight + delta)`, rounded once, and what is needed to undo it exactly.

    The sum is taken in a wider format than the weight's, so rounding moves an element by at most
    half a unit in its last place and subtracting the same delta rounds back to it, except where the
    sum has a larger exponent; those elements are kept. With a factor they are more.
    """
    total = _wide(weight) + _wide(delta)
    merged = (total if factor is None else total * _wide(factor)).to(weight.dtype)
    return merged, correction(weight, merged, delta, factor)


def correction(
    weight: Tensor, merged: Tensor, delta: Tensor, factor: Tensor | None = None
) -> Correction:
    """What is needed beside the delta to get `weight` back from `merged`, however that was rounded."""
    if weight.is_meta:
        return Correction(None, weight, factor)
    lost = (_take_off(merged, delta, factor) != weight).flatten().nonzero().squeeze(1)
    if 3 * len(lost) > weight.numel():  # a position takes two or four times the memory of a value
        return Correction(None, weight.detach().clone(), factor)
    return Correction(lost, weight.flatten()[lost], factor)


def subtract(merged: Tensor, delta: Tensor, correction: Correction) -> Tensor:
    """The weight that `add` was given, to the bit as long as `delta` is the same."""
    positions, values, factor = correction
    if positions is None:
        return values.to(merged.device)
    weight = _take_off(merged, delta, factor).contiguous()
    weight.view(-1)[positions.to(weight.device)] = values.to(weight.device)
    return weight


def _take_off(merged: Tensor, delta: Tensor, factor: Tensor | None) -> Tensor:
    total = _wide(merged) if factor is None else _wide(merged) / _wide(factor.to(merged.device))
    return (total - _wide(delta)).to(merged.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """`tensor` in a format with room for its sums."""
    return tensor.to(
        torch.float64
        if tensor.dtype == torch.float32 and tensor.device.type != "mps"
        else _wider(tensor.dtype)
    )


def _wider(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """A context whose results do not depend on the caller's: without gradients, autocast, and
    inference tensors, which nobody could train later.
    """
    with ordinary_tensors():
        if device.type == "meta" or not torch.is_autocast_enabled(device.type):
            yield
            return
        with torch.autocast(device.type, enabled=False):
            yield
