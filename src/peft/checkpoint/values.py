# SPDX-License-Identifier: Apache-2.0
"""Warnings about NaN, infinite and too large values in a checkpoint.

All readers load such a checkpoint, since a user may want to inspect a run that diverged, and warn
with the names of its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..base.errors import warn


def warn_of_values(
    source: str,
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    masked: Collection[str] = (),
) -> None:
    """Warn about tensors with values that are NaN, infinite, or too large for the adapter's dtype.

    Args:
        source: Name of the checkpoint, for the message.
        state: Its tensors. Meta, fake and distributed tensors are not checked.
        expected: The adapter's tensors, by the same keys.
        masked: Parts of keys of tensors in which minus infinity stands for a masked entry.
    """
    diverged, too_large = [], []
    for key, (low, high) in _extremes(state).items():
        if low == -math.inf and not math.isinf(high) and not set(masked).isdisjoint(key.split(".")):
            continue
        kind = expected[key].dtype
        if not (math.isfinite(low) and math.isfinite(high)):
            diverged.append(key)
        elif kind.is_floating_point and max(-low, high) > torch.finfo(kind).max:
            too_large.append(f"{key} ({max(-low, high):.4g})")
    if diverged:
        warn(
            f"{source} has values that are NaN or infinite, and so will the outputs be: "
            f"{some(diverged)}. It is loaded as it is; the training that wrote it went wrong, take "
            "a checkpoint of an earlier step."
        )
    if too_large:
        warn(
            f"{source} has values that are infinite in the dtype of the adapter in the model: "
            f"{some(too_large)}. It is loaded so; give the adapter a wider dtype "
            "(`autocast_adapter_dtype=True`, or cast the model before)."
        )


def some(keys: Collection[str]) -> str:
    """Return keys for a message, at most eight of them."""
    return ", ".join(list(keys)[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


@torch.no_grad()
def _extremes(state: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Return the smallest and largest value of each tensor, NaN if it has any, with one device
    synchronization per dtype.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor, Tensor]]] = {}
    for key, tensor in state.items():
        if (
            type(tensor) not in (Tensor, nn.Parameter)
            or tensor.is_meta
            or not tensor.is_floating_point()
            or not tensor.numel()
        ):
            continue
        low, high = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).aminmax()
        if type(low) is Tensor:  # fake tensors have no values
            groups.setdefault((low.device, low.dtype), []).append((key, low, high))
    result: dict[str, tuple[float, float]] = {}
    for group in groups.values():
        numbers = torch.stack([number for _, *pair in group for number in pair]).tolist()
        result |= {
            key: (low, high)
            for (key, *_), low, high in zip(group, numbers[::2], numbers[1::2], strict=True)
        }
    return result
