# SPDX-License-Identifier: Apache-2.0
"""Factors with room for a larger rank than they have: zeros that fill up the rank of a low-rank
pair leave its product as it is.

They are no part of the adapter. What is filled up is noted beside the adapter's config, and left
out again on saving.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor


class RankRoom(NamedTuple):
    """Where a tensor has its rank `r`.

    Args:
        dim: The dimension along which it has `r // share` entries.
        blocks: How many equal blocks they come in, each filled up by itself (the groups of a
            convolution).
        share: In how many parts the rank is.
    """

    dim: int
    blocks: int = 1
    share: int = 1

    def size(self, rank: int) -> int:
        """Entries along the dimension for a rank."""
        return rank // self.share

    def holds(self, rank: int) -> bool:
        """Whether a rank can be had: it has to come in whole parts and blocks."""
        return rank % (self.share * self.blocks) == 0

    def fits(self, tensor: Tensor, other: Tensor) -> bool:
        """Whether two tensors differ in rank only."""
        first, second = list(tensor.shape), list(other.shape)
        first[self.dim : self.dim + 1] = second[self.dim : self.dim + 1] = []
        return tensor.dim() == other.dim() and first == second

    def filled(self, tensor: Tensor, size: int) -> Tensor:
        """A tensor filled up with zeros to `size` entries along the dimension."""
        parts = tensor.unflatten(self.dim, (self.blocks, -1))
        extra = size // self.blocks - parts.shape[self.dim + 1]
        padding = [0, 0] * (parts.dim() - self.dim - 2) + [0, extra]
        return F.pad(parts, padding).flatten(self.dim, self.dim + 1)

    def cut(self, tensor: Tensor, size: int) -> Tensor:
        """The first `size` entries along the dimension, of each block its share: what `filled` was
        given.
        """
        parts = tensor.unflatten(self.dim, (self.blocks, -1))
        return (
            parts.narrow(self.dim + 1, 0, size // self.blocks)
            .flatten(self.dim, self.dim + 1)
            .contiguous()
        )


def filled_up(config: Any) -> dict[str, tuple[RankRoom, int]]:
    """How many entries of tensors that are filled up are the adapter's own, by checkpoint key: none
    of a layer that it does not have. To be changed by what fills up.
    """
    return vars(config).setdefault("_filled_up", {})


def without_filling(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """An adapter's tensors as they are without zeros that fill them up."""
    own = vars(config).get("_filled_up", {})
    result = {}
    for key, tensor in state.items():
        room, size = own.get(key, (None, None))
        if size != 0:
            result[key] = tensor if room is None else room.cut(tensor, size)
    return result
