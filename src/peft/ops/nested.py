# SPDX-License-Identifier: Apache-2.0
"""Nested tensors, whose samples differ in length, as one dense tensor of all tokens, and back; and
sparse tensors as dense ones.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """Return a sparse tensor as a dense one, any other as it is."""
    return x if x.layout is torch.strided or x.is_nested or x.is_mkldnn else x.to_dense()


def as_tokens(nested: Tensor) -> Tensor:
    """Return all samples' tokens, in order, `[tokens, …, features]`."""
    if nested.layout is torch.jagged:
        return nested.values()
    return torch.cat([sample.reshape(-1, sample.shape[-1]) for sample in nested.unbind()])


def nested_like(nested: Tensor, tokens: Tensor) -> Tensor:
    """Return tokens as a nested tensor with the sample lengths of another."""
    if nested.layout is torch.jagged:
        offsets = nested.offsets()  # type: ignore[attr-defined]  # the same: both can be added
        return torch.nested.nested_tensor_from_jagged(tokens, offsets)
    samples = nested.unbind()
    parts = tokens.split([sample[..., 0].numel() for sample in samples])
    pairs = zip(parts, samples, strict=True)
    shaped = [part.reshape(*sample.shape[:-1], part.shape[-1]) for part, sample in pairs]
    return torch.nested.as_nested_tensor(shaped)


def are_tokens(nested: Tensor) -> Tensor:
    """Return a mask `[samples, longest]`, true where samples padded to one length have tokens."""
    if nested.layout is torch.jagged:
        lengths = nested.offsets().diff()  # type: ignore[attr-defined]
    else:
        sizes = [sample[..., 0].numel() for sample in nested.unbind()]
        lengths = torch.tensor(sizes, device=nested.device)
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths.unsqueeze(1)
