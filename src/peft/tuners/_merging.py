# SPDX-License-Identifier: Apache-2.0
"""Adding a delta to a weight so that it can be taken off again without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..utils.error import PeftTypeError
from ..utils.warning import warn


class Correction(NamedTuple):
    """What is needed beside the delta to get a weight back: the few elements that undoing the sum would not give, by flat position
    (or all, where they are not few), and the factor on the sum.
    """

    positions: Tensor | None
    values: Tensor
    factor: Tensor | None = None


def add(weight: Tensor, delta: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Correction]:
    """`factor · (weight + delta)`, rounded once, and what is needed to undo it exactly.

    The sum is taken in a wider format than the weight's, so rounding moves an element by at most half a unit in its last place and
    subtracting the same delta rounds back to it, except where the sum has a larger exponent; those elements are kept. With a factor
    they are more.
    """
    total = _wide(weight) + _wide(delta)
    merged = (total if factor is None else total * _wide(factor)).to(weight.dtype)
    lost = (_take_off(merged, delta, factor) != weight).flatten().nonzero().squeeze(1)
    if 3 * len(lost) > weight.numel():  # a position takes two or four times the memory of a value
        return merged, Correction(None, weight.detach().clone(), factor)
    return merged, Correction(lost, weight.flatten()[lost], factor)


def subtract(merged: Tensor, delta: Tensor, correction: Correction) -> Tensor:
    """The weight that `add` was given, to the bit as long as `delta` is the same."""
    positions, values, factor = correction
    if positions is None:
        return values.to(merged.device)
    weight = _take_off(merged, delta, factor).contiguous()
    weight.view(-1)[positions] = values.to(weight.device)
    return weight


def _take_off(merged: Tensor, delta: Tensor, factor: Tensor | None) -> Tensor:
    total = _wide(merged) if factor is None else _wide(merged) / _wide(factor.to(merged.device))
    return (total - _wide(delta)).to(merged.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """`tensor` in a format with room for its sums."""
    return tensor.to(torch.float64 if tensor.dtype == torch.float32 and tensor.device.type != "mps" else _wider(tensor.dtype))


def _wider(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def names_to_merge(layer: Any, adapter_names: Sequence[str] | None) -> list[str]:
    """The adapters to merge into a layer (or into all layers of a tuner): those named, by default the active ones, less those
    merged already, which a warning names.
    """
    if isinstance(adapter_names, str):
        raise PeftTypeError(f"`adapter_names`={adapter_names!r} should be a list of strings.")
    names = list(layer.active_adapters) if adapter_names is None else list(adapter_names)
    merged = [name for name in names if name in layer.merged_adapters]
    if merged:
        left = [name for name in names if name not in merged]
        if left:
            warn(
                f"Already following adapters were merged {','.join(merged)}. You are now additionally merging {','.join(left)}.",
            )
        else:
            warn("All adapters are already merged, nothing to do.")
        return left
    return names
