# SPDX-License-Identifier: Apache-2.0
"""Size of the linear map that a layer computes, and where its parameters are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Size and storage of a linear map `[in] → [out]`; of a convolution, the map over channels.

    Args:
        out_features: Rows of the weight.
        in_features: Columns of the weight; of a convolution, the input channels of a group.
        kernel_size: Empty unless the layer is a convolution.
        transposed: True if the weight is stored `[in, out]`, as in transformers' `Conv1D`.
        groups: Groups of a convolution.
    """

    out_features: int
    in_features: int
    kernel_size: tuple[int, ...] = ()
    transposed: bool = False
    groups: int = 1

    @property
    def is_conv(self) -> bool:
        """True for a convolution."""
        return bool(self.kernel_size)

    @property
    def columns(self) -> int:
        """The columns of the weight as a matrix, `in · Π kernel`."""
        return self.in_features * math.prod(self.kernel_size)

    def as_stored(self, weight: Tensor) -> Tensor:
        """Return a weight `[out, in, *kernel]` in the layout of the layer's weight."""
        return weight.transpose(0, 1) if self.transposed else weight


class Placement(NamedTuple):
    """Device and dtype of an adapter's new parameters."""

    device: torch.device
    dtype: torch.dtype
