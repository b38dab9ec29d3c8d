# SPDX-License-Identifier: Apache-2.0
"""Adding a delta to a weight so that it can be taken off again without a trace."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Correction(NamedTuple):
    """The few elements that subtracting the delta again would not give back: flat positions and their values."""

    positions: Tensor
    values: Tensor


def add(weight: Tensor, delta: Tensor) -> tuple[Tensor, Correction]:
    """`weight + delta`, rounded once, and what is needed to undo it exactly.

    The sum is taken in a wider format than the weight's, so rounding moves an element by at most half a unit in its last place and
    subtracting the same delta rounds back to it, except where the sum has a larger exponent; those elements are kept.
    """
    total = _wide(weight) + _wide(delta)
    merged = total.to(weight.dtype)
    lost = (_take_off(merged, delta) != weight).flatten().nonzero().squeeze(1)
    return merged, Correction(lost, weight.flatten()[lost])


def subtract(merged: Tensor, delta: Tensor, correction: Correction) -> Tensor:
    """The weight that `add` was given, to the bit as long as `delta` is the same."""
    weight = _take_off(merged, delta).contiguous()
    weight.view(-1)[correction.positions] = correction.values.to(weight.device)
    return weight


def _take_off(merged: Tensor, delta: Tensor) -> Tensor:
    return (_wide(merged) - _wide(delta)).to(merged.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """`tensor` in a format with room for its sums."""
    return tensor.to(torch.float64 if tensor.dtype == torch.float32 and tensor.device.type != "mps" else _wider(tensor.dtype))


def _wider(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
