# SPDX-License-Identifier: Apache-2.0
"""LoftQ: quantize a weight, and start from the best low-rank part of what that loses."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..factors import Factors
from .weight import pissa

# Quantiles of a normal distribution with equally many values between them, scaled to [-1, 1].
# Source: arXiv:2305.14314, appendix E
_NORMAL_FLOATS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_BLOCK = 64  # values that share a scale, as in a 4-bit layer of bitsandbytes


class QuantizedWeight(NamedTuple):
    """A weight as small codes and scales.

    Args:
        codes: Of 4 bits: indices of normal floats `[blocks, 64]`. Of 8 bits: `[out, in]`.
        scales: The largest magnitude of each block or row.
        shape: `[out, in]`.
    """

    codes: Tensor
    scales: Tensor
    shape: torch.Size

    def dense(self) -> Tensor:
        """Return the weight in float32, `[out, in]`."""
        if self.codes.dtype == torch.int8:
            return self.codes.float() * (self.scales / 127).unsqueeze(1)
        values = _normal_floats(self.codes.device)[self.codes.int()] * self.scales.unsqueeze(1)
        return values.flatten()[: self.shape.numel()].view(self.shape)


def quantized(W: Tensor, bits: int) -> QuantizedWeight:
    """Quantize a weight to 4 bits (NF4, in blocks of 64) or 8 bits (integers, row by row).

    A quantized weight that is quantized again stays the same. bitsandbytes computes the same codes.

    Args:
        W: `[out, in]`.
        bits: 4 or 8.

    Example:
        >>> quantized(torch.tensor([[0.5, -1.0], [0.1, 2.0]]), 8).dense()
        tensor([[ 0.5039, -1.0000],
                [ 0.0945,  2.0000]])
    """
    if bits == 8:
        rows = W.to(torch.float16).float()  # the precision that bitsandbytes quantizes from
        scales = rows.abs().amax(1)
        codes = torch.round(rows * (127 / scales.clamp_min(1e-30)).unsqueeze(1))
        return QuantizedWeight(codes.to(torch.int8), scales, W.shape)
    flat = W.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    scales = blocks.abs().amax(1)
    table = _normal_floats(W.device)
    shares = blocks / scales.clamp_min(1e-30).unsqueeze(1)
    codes = torch.bucketize(shares, (table[1:] + table[:-1]) / 2)
    return QuantizedWeight(codes.to(torch.uint8), scales, W.shape)


@torch.no_grad()
def loftq(
    W: Tensor, r: int, scale: float, bits: int, iterations: int
) -> tuple[QuantizedWeight, Factors]:
    """Return a quantized weight `Q` and factors with `W ≈ Q + s·B·A`.

    `Q = q(W - s·B·A)` and `s·B·A = SVD_r(W - Q)` in turns, from `B·A = 0`.

    Args:
        W: `[out, in]`.
        r: Rank.
        scale: `s`.
        bits: 4 or 8.
        iterations: How many turns.

    Source: arXiv:2310.08659, algorithm 1
    """
    W = W.float()
    rest = W
    for _ in range(iterations):
        Q = quantized(rest, bits)
        factors = pissa(W - Q.dense(), r, scale)
        rest = W - scale * factors.B @ factors.A
    return Q, factors


def _normal_floats(device: torch.device) -> Tensor:
    return torch.tensor(_NORMAL_FLOATS, device=device)
