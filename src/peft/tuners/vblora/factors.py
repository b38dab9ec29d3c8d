# SPDX-License-Identifier: Apache-2.0
"""Both low-rank factors of a layer from its logits and the bank: one kernel where that can be had,
else plain operations.

Source: arXiv:2405.15179
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...ops.triton_support import agrees, can_launch
from .bank import compose_in_full


def compose_factors(
    logits_A: Tensor, logits_B: Tensor, bank: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """Compose both low-rank factors of one layer, `delta_W = B @ A`.

    `A[j, t*v + e] = tile_A[j, t, e]` and `B[t*v + e, j] = tile_B[t, j, e]`, with
    `v = vector_length`: a tile always runs along the feature dimension.

    Args:
        logits_A: `[r, in / vector_length, num_vectors]`.
        logits_B: `[out / vector_length, r, num_vectors]`.
        bank: `[num_vectors, vector_length]`.
        topk: vectors mixed per position.

    Returns:
        `A [r, in]` and `B [out, r]`, at the cost of `compose` for `r * (in + out) / vector_length`
        positions. On a GPU it is one kernel where that can be had (`kernels.py`), unless
        `torch.use_deterministic_algorithms` is on.

    Source: arXiv:2405.15179
    """
    if can_launch(logits_A, logits_B, bank) and not torch.are_deterministic_algorithms_enabled():
        from . import factors_triton as kernels

        ours = kernels.compose_factors
        if kernels.fits(logits_A, logits_B, bank, topk) and agrees(
            ours, compose_in_full, _example, bank.device
        ):
            return ours(logits_A, logits_B, bank, topk)
    return compose_in_full(logits_A, logits_B, bank, topk)


def _example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """Arguments of `compose_factors` to try a kernel with: no sizes that are powers of two, no
    ties.
    """
    shapes = (3, 2, 37), (5, 3, 37), (37, 20)
    numbers = (
        torch.arange(math.prod(shape), device=device, dtype=torch.float32).sin().view(shape)
        for shape in shapes
    )
    logits_A, logits_B, bank = (tensor.requires_grad_() for tensor in numbers)
    return logits_A, logits_B, bank, 3
