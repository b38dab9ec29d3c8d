# SPDX-License-Identifier: Apache-2.0
"""Hadamard products of low-rank matrices: the pure math of LoHa.

`ΔW = scale · (U1·V1) ∘ (U2·V2)` with `U [out, r]`, `V [r, in · taps]`. Row `p` of the product is
`Σ_ij U1[p,i]·U2[p,j] · V1[i]∘V2[j]`: the product is itself one of rank `r²`, whose factors are the
rows' (and columns') Kronecker products, `U1 ⊙ U2 [out, r²]` and `V1 ⊙ V2 [r², in · taps]`. So it
can be applied without being built:

    full          out·in·taps · (2r + 1)  to build it, and   out·in·taps  for each row of the input
    as factors    r²·(out + in·taps)      to build them, and the same     for each row of the input

The factors are taken where `r²·(out + in·taps) <= out·in·taps`, by the shapes alone, so that a new
batch size or sequence length neither changes the order of computation nor recompiles.

Source: arXiv:2108.06098, proposition 1 (the rank); Khatri and Rao, 1968 (the factors)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base.tracing import shapes

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class HadamardFactors(NamedTuple):
    """One adapter's tensors on one layer.

    Attributes:
        w1_a, w2_a: `[out, r]`; beside `t1`, `t2`: `[r, out]`.
        w1_b, w2_b: `[r, in · taps]`; beside `t1`, `t2`: `[r, in]`.
        t1, t2: None, or `[r, r, *kernel]` (one-dimensional kernels are stored `[r, r, k, 1]`), with
            `W[p, q, κ] = Σ_ij t[i, j, κ] · w_a[i, p] · w_b[j, q]`.

    Source: arXiv:2108.06098, equation 2 and proposition 3
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None


def factor_shapes(
    out_features: int,
    in_features: int,
    kernel: Sequence[int] = (),
    *,
    r: int,
    use_effective_conv2d: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Name and size the tensors of a new adapter; the keys are fields of `HadamardFactors`.

    Args:
        out_features: Features, or output channels of a convolution.
        in_features: Features, or `in_channels // groups` of a convolution.
        kernel: Kernel size of a convolution; empty for a linear layer.
        r: Rank, at least 1.
        use_effective_conv2d: Use Tucker's form for kernels of more than one element.

    Example:
        >>> factor_shapes(6, 4, (3, 3), r=2)["w1_b"]
        (2, 36)
        >>> factor_shapes(6, 4, (3, 3), r=2, use_effective_conv2d=True)["t1"]
        (2, 2, 3, 3)
    """
    taps = math.prod(kernel)
    if use_effective_conv2d and taps > 1:
        core = (r, r, *kernel, *([1] if len(kernel) == 1 else []))
        a, b = (r, out_features), (r, in_features)
        return {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b, "t1": core, "t2": core}
    a, b = (out_features, r), (r, in_features * taps)
    return {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b}


def hadamard_weight(f: HadamardFactors, scale: float | Tensor = 1.0) -> Tensor:
    """Return the dense `ΔW = scale · (U1·V1) ∘ (U2·V2)`, `[out, in · taps]`, at `(2r +
    1)·out·in·taps` multiplications. Factors without Tucker's form may have leading dimensions.
    """
    (U1, V1), (U2, V2) = _sides(f)
    return ((U1 * scale) @ V1) * (U2 @ V2)


def low_rank_pair(f: HadamardFactors, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Return `A [r², in · taps]` and `B [out, r²]` with `B·A = ΔW`, at `r²·(out + in·taps)`
    multiplications. Factors without Tucker's form may have leading dimensions.

    Example:
        >>> U, V = torch.rand(5, 2), torch.rand(2, 7)
        >>> f = HadamardFactors(U, V, U, V)
        >>> A, B = low_rank_pair(f, 3.0)
        >>> torch.allclose(B @ A, 3 * (f.w1_a @ f.w1_b) * (f.w2_a @ f.w2_b))
        True

    Source: Khatri and Rao, 1968
    """
    (U1, V1), (U2, V2) = _sides(f)
    A = (V1.unsqueeze(-2) * V2.unsqueeze(-3)).flatten(-3, -2)
    B = ((U1 * scale).unsqueeze(-1) * U2.unsqueeze(-2)).flatten(-2)
    return A, B


def is_low_rank(f: HadamardFactors) -> bool:
    """Return whether factors of rank `r²` take fewer multiplications than the dense product."""
    out, columns, inner = _sizes(f)
    return inner * (out + columns) <= out * columns


def hadamard_linear(x: Tensor, f: HadamardFactors, scale: float | Tensor = 1.0) -> Tensor:
    """Apply `ΔW [out, in]`, by factors of rank `r²` or the dense product, whichever is cheaper.

    Args:
        x: `[..., in]`.
        f: The adapter's tensors.
        scale: A number or a zero-dimensional tensor.

    Returns:
        `[..., out]`.
    """
    if not is_low_rank(f):
        return F.linear(x, hadamard_weight(f, scale))
    A, B = low_rank_pair(f, scale)
    return F.linear(F.linear(x, A), B)


def hadamard_conv(
    x: Tensor,
    f: HadamardFactors,
    *,
    kernel: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Convolve with `ΔW [out, in // groups, *kernel]`: to `r²` channels in each group and on to the
    output's, or with the dense weight.

    Args:
        x: `[batch, in_channels, *space]` or `[in_channels, *space]`.
        f: The adapter's tensors.
        kernel: Kernel size, one number per spatial dimension.
        stride, padding, dilation, groups: As in `torch.nn.functional.conv2d`.
        scale: A number or a zero-dimensional tensor.

    Returns:
        `[batch, out, *space']` or `[out, *space']`.
    """
    conv = _CONV[len(kernel)]
    if not is_low_rank(f):
        weight = hadamard_weight(f, scale)
        return conv(
            x, weight.view(weight.shape[0], -1, *kernel), None, stride, padding, dilation, groups
        )
    A, B = low_rank_pair(f, scale)
    down = A.view(A.shape[0], -1, *kernel).repeat(groups, *[1] * (1 + len(kernel)))
    hidden = conv(x, down, None, stride, padding, dilation, groups)
    return conv(hidden, B.view(*B.shape, *[1] * len(kernel)), groups=groups)


def _sides(f: HadamardFactors) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return both matrices as `U [out, r]` and `V [r, in · taps]`."""
    return _side(f.w1_a, f.w1_b, f.t1), _side(f.w2_a, f.w2_b, f.t2)


def _side(a: Tensor, b: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
    if t is None:
        return a, b
    return a.mT, torch.einsum("ij...,jq->iq...", t, b).flatten(1)


def _sizes(f: HadamardFactors) -> tuple[int, int, int]:
    """Return `out`, `in · taps` and the rank of the factors."""
    a1, b1, a2 = shapes(f.w1_a, f.w1_b, f.w2_a)
    if f.t1 is None or f.t2 is None:
        return a1[-2], b1[-1], a1[-1] * a2[-1]
    return a1[1], b1[1] * math.prod(shapes(f.t1)[0][2:]), a1[0] * a2[0]
