# SPDX-License-Identifier: Apache-2.0
"""What several adapters train whole beside their layers (heads, rows of embeddings), made into one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..utils.error import PeftTypeError, PeftValueError

# Each adapter's tensors by checkpoint key.
Parts = Mapping[str, Mapping[str, Tensor]]


def combine(parts: Parts, heads: str | None, weights: Mapping[str, float] | None = None, remedy: str = "") -> dict[str, Tensor]:
    """Return one set of what adapters train beside their layers.

    Args:
        parts: Each adapter's tensors by checkpoint key. What only one adapter has is taken as it is.
        heads: What to take where several have the same: "mean", or one's name. A name goes before "mean".
        weights: For the mean, by adapter; it is `Σ w·t / Σ w`. By default all count alike.
        remedy: What else can be done, for messages.

    Raises:
        PeftTypeError: `heads` is no string.
        PeftValueError: Several train the same and `heads` is not given, or is no adapter's name, or there is no mean.
    """
    if heads is not None and not isinstance(heads, str):
        raise PeftTypeError(f"`heads`={heads!r} must be 'mean' or the name of an adapter.")
    if heads not in (None, "mean", *parts):
        raise PeftValueError(f"`heads`={heads!r} must be 'mean' or one of {', '.join(map(repr, parts))}.")
    result: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for own in parts.values() for key in own):
        owners = [name for name, own in parts.items() if key in own]
        if len(owners) == 1 or heads in owners:
            result[key] = parts[heads if heads in owners else owners[0]][key].detach().clone()  # type: ignore[index]
        elif heads is None or heads in parts:
            raise PeftValueError(
                f'Adapters {", ".join(owners)} each train a copy of the same module (`{key}`). Pass `heads="mean"`, or '
                f"as `heads` the name of the one whose copy is taken{remedy}."
            )
        else:
            result[key] = _mean(key, {name: parts[name][key] for name in owners}, weights, remedy)
    return result


def _mean(key: str, tensors: Mapping[str, Tensor], weights: Mapping[str, float] | None, remedy: str) -> Tensor:
    """Return the weighted mean of tensors.

    Raises:
        PeftValueError: Their shapes differ, or the weights sum to zero.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{list(tensor.shape)} ({name})" for name, tensor in tensors.items())
        raise PeftValueError(f"`{key}` has the shapes {shapes}, which have no mean; pass one adapter's name as `heads`{remedy}.")
    first = next(iter(tensors.values()))
    if not first.is_floating_point():
        return first.clone()
    shares = {name: 1.0 if weights is None else weights[name] for name in tensors}
    total = sum(shares.values())
    if abs(total) < 1e-12:
        raise PeftValueError(f"`{key}`: the weights {shares} sum to zero, so there is no mean; pass one adapter's name as `heads`.")
    wide = torch.promote_types(first.dtype, torch.float32)
    summed = sum((tensor.detach().to(first.device, wide) * shares[name] for name, tensor in tensors.items()), torch.zeros(()))
    return (summed / total).to(first.dtype)
