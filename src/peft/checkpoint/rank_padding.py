# SPDX-License-Identifier: Apache-2.0
"""Rank padding: zeros in low-rank factors up to a larger rank, which leave the product as it is.

The zeros are not part of the adapter. Layers keep the unpadded sizes of padded tensors, and saving
cuts the tensors to them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class RankPadding(NamedTuple):
    """The dimension of a tensor that is its rank `r`, for padding.

    Args:
        dim: The dimension, with `r // share` entries.
        blocks: Number of equal blocks in it that are padded separately (groups of a convolution).
        share: Number of parts that the rank is split into.
    """

    dim: int
    blocks: int = 1
    share: int = 1

    def size(self, rank: int) -> int:
        """Return the size of the dimension for a rank."""
        return rank // self.share

    def allows(self, rank: int) -> bool:
        """Return True if a rank can be split into the parts and blocks."""
        return rank % (self.share * self.blocks) == 0

    def differs_in_rank_only(self, tensor: Tensor, other: Tensor) -> bool:
        """Return True if the shapes of two tensors are equal except for this dimension."""
        first, second = list(tensor.shape), list(other.shape)
        first[self.dim : self.dim + 1] = second[self.dim : self.dim + 1] = []
        return tensor.dim() == other.dim() and first == second

    def pad(self, tensor: Tensor, size: int) -> Tensor:
        """Return a tensor with zeros up to `size` entries of the dimension."""
        parts = tensor.unflatten(self.dim, (self.blocks, -1))
        extra = size // self.blocks - parts.shape[self.dim + 1]
        padding = [0, 0] * (parts.dim() - self.dim - 2) + [0, extra]
        return F.pad(parts, padding).flatten(self.dim, self.dim + 1)

    def cut(self, tensor: Tensor, size: int) -> Tensor:
        """Return the first `size` entries of the dimension, the inverse of `pad`."""
        parts = tensor.unflatten(self.dim, (self.blocks, -1))
        kept = parts.narrow(self.dim + 1, 0, size // self.blocks)
        return kept.flatten(self.dim, self.dim + 1).contiguous()


class Unpadded(NamedTuple):
    """The size of a padded tensor without its padding.

    Args:
        padding: The dimension that is padded.
        size: Its entries that are the adapter's; 0 if the adapter does not have the tensor.
    """

    padding: RankPadding
    size: int

    def cut(self, tensor: Tensor) -> Tensor:
        """Return a tensor without padding."""
        has_rank = tensor.dim() > self.padding.dim
        return self.padding.cut(tensor, self.size) if has_rank else tensor
