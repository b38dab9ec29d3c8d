# SPDX-License-Identifier: Apache-2.0
"""Size and storage of the linear map that a layer computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Size and storage of a linear map `[in] → [out]`, over channels where the layer is a
    convolution.

    Args:
        out_features: Rows of the weight.
        in_features: Columns of the weight: for a convolution, input channels of one group.
        kernel_size: Empty for a plain linear map.
        transposed: Whether the weight is stored `[in, out]` (transformers' `Conv1D`).
    """

    out_features: int
    in_features: int
    kernel_size: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def is_conv(self) -> bool:
        """Whether the map slides over one or more spatial dimensions."""
        return bool(self.kernel_size)

    def as_stored(self, weight: Tensor) -> Tensor:
        """A weight `[out, in, *kernel]` in the layout of the layer's own."""
        return weight.transpose(0, 1) if self.transposed else weight


class Placement(NamedTuple):
    """Where and in which precision an adapter's parameters are made."""

    device: torch.device
    dtype: torch.dtype


def columns(size: Geometry) -> int:
    """Columns of a layer's weight, the kernel's elements among them: `in · taps`."""
    return size.in_features * math.prod(size.kernel_size)
