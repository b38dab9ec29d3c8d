# SPDX-License-Identifier: Apache-2.0
"""Weight decomposition (DoRA), for any method: an adapter trains the norms of a weight apart from
its direction.

`W' = f ⊙ V` with `V = W + ΔW` and `f = m / ‖V‖`, row by row or column by column. A layer describes
its decomposed adapters by `Decomposition`, and calls the functions of this file.

Source: arXiv:2402.09353, section 4
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.geometry import Geometry, Placement
from ..ops.low_rank import wide
from .base_layer import AdaptedLayer, convolve


@dataclass(frozen=True)
class Decomposition:
    """The norms of one decomposed adapter on one layer.

    Args:
        magnitude: Returns `m`, `[out]` or `[in]`.
        norms: Returns `‖W + ΔW‖` for a scale of the delta, in that shape, without a gradient.
        by_columns: The norms are of columns: the adapter changes the input of the base layer and of
            its own delta, but not the deltas of other adapters.
    """

    magnitude: Callable[[], Tensor]
    norms: Callable[[float | Tensor], Tensor]
    by_columns: bool = False

    def factor(self, scale: float | Tensor) -> Tensor:
        """Return `f`, which multiplies the rows or columns of `W + ΔW`."""
        return self.magnitude() / self.norms(scale)

    def weight_factor(self, size: Geometry, scale: float | Tensor) -> Tensor:
        """Return `f` in a shape that multiplies the stored weight, without a gradient."""
        shape = [1] * (2 + len(size.kernel_size))
        shape[1 if self.by_columns else 0] = -1
        return size.as_stored(self.factor(scale).detach().view(shape))


def first_magnitude(norms: Callable[[], Tensor] | None, size: int, placement: Placement) -> Tensor:
    """Return the norms that an adapter starts with, `[size]`; on the meta device without values.

    `norms` is None where the weight has no values yet.
    """
    device, dtype = placement
    if norms is None or device.type == "meta":
        return torch.empty(size, device=device, dtype=dtype)
    return norms().to(device, dtype)


def by_channel(layer: AdaptedLayer, values: Tensor) -> Tensor:
    """Return `[out]` or `[in]` in a shape that multiplies outputs or inputs."""
    return values.view(-1, *[1] * len(layer.geometry.kernel_size))


def rescaled(layer: AdaptedLayer, total: Tensor, factor: Tensor) -> Tensor:
    """Return `f ⊙ (total - bias) + bias`, `f [out]`: an output of `V` as one of `f ⊙ V`."""
    bias, factor = _bias(layer, total.dtype), by_channel(layer, factor)
    return factor * total if bias is None else torch.addcmul((1 - factor) * bias, factor, total)


def output_without_bias(layer: AdaptedLayer, x: Tensor) -> Tensor:
    """Return the base layer's output less its bias, with nothing merged into its weight."""
    if not layer.has_merges:
        output = layer.get_base_layer()(x)
        bias = _bias(layer, output.dtype)
        return output if bias is None else output - bias
    weight, size = layer.unmerged_weight().to(x.dtype), layer.geometry
    if not size.is_conv:
        return F.linear(x, size.as_stored(weight))
    return convolve(layer.get_base_layer(), x, weight)


def change(weight: Tensor, factor: Tensor, delta: Tensor) -> Tensor:
    """Return `f ⊙ (W + ΔW) - W`, the change that a decomposed adapter alone makes to the weight."""
    weight = wide(weight)
    return wide(factor) * (weight + wide(delta)) - weight


def _bias(layer: AdaptedLayer, dtype: torch.dtype) -> Tensor | None:
    """Return the bias, which may be computed or stored in another dtype, in the outputs' dtype."""
    bias: Tensor | None = getattr(layer.get_base_layer(), "bias", None)
    return None if bias is None else by_channel(layer, bias).to(dtype)
