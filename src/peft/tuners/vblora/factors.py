# SPDX-License-Identifier: Apache-2.0
"""Low-rank factors of one layer from its logits and the bank: one Triton kernel where it can run,
else plain operations.

Source: arXiv:2405.15179, section 3
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...ops.triton_support import with_kernel
from .bank import compose_factors_plain


def _example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """Make arguments of `compose_factors` to try a kernel with: no powers of two, no ties."""
    shapes = (3, 2, 37), (5, 3, 37), (37, 20)
    numbers = (
        torch.arange(math.prod(shape), device=device, dtype=torch.float32).sin().view(shape)
        for shape in shapes
    )
    logits_A, logits_B, bank = (tensor.requires_grad_() for tensor in numbers)
    return logits_A, logits_B, bank, 3


@with_kernel(3, _example)
def compose_factors(
    logits_A: Tensor, logits_B: Tensor, bank: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """Compose both low-rank factors of one layer, `ΔW = B @ A`.

    `A[j, t*v + e] = tile_A[j, t, e]` and `B[t*v + e, j] = tile_B[t, j, e]` with
    `v = vector_length`: a tile always runs along the features.

    Args:
        logits_A: `[r, in / vector_length, num_vectors]`.
        logits_B: `[out / vector_length, r, num_vectors]`.
        bank: `[num_vectors, vector_length]`.
        topk: Vectors summed into each tile.

    Returns:
        `A [r, in]` and `B [out, r]`, at the cost of `bank.compose` for
        `r * (in + out) / vector_length` tiles. Runs as one kernel of `factors_triton.py` on GPUs
        where that can be launched, unless `torch.use_deterministic_algorithms` is on.

    Source: arXiv:2405.15179, section 3
    """
    return compose_factors_plain(logits_A, logits_B, bank, topk)
