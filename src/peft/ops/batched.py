# SPDX-License-Identifier: Apache-2.0
"""Batched products with thin factors, in the order that is fastest on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import is_eager

_MOST_COLUMNS = 10
_FEWEST_ROWS = 32


def batched_product(activation: Tensor, factor: Tensor) -> Tensor:
    """Return `activation · factor`, for a CPU in float32 as `(factorᵀ · activationᵀ)ᵀ` where that
    is faster: for factors of up to ten columns, which BLAS multiplies by slowly, and 32 rows or
    more (`benchmarks/NOTES.md`).

    Args:
        activation: `[n, rows, k]`.
        factor: `[n, k, m]`.
    """
    if (
        activation.device.type == "cpu"
        and factor.dtype is torch.float32
        and factor.stride(2) == 1
        and is_eager()
        and 1 < factor.shape[2] <= _MOST_COLUMNS
        and activation.shape[1] >= _FEWEST_ROWS
    ):
        return torch.bmm(factor.mT, activation.mT).mT
    return torch.bmm(activation, factor)
