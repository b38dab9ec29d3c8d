# SPDX-License-Identifier: Apache-2.0
"""`DecomposedLayer`: weight decomposition (DoRA) as methods share it: a weight's lengths are trained apart from its direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..utils.sharding import whole
from ._geometry import dense_weight, is_quantised
from ._layer import BaseTunerLayer


class DecomposedLayer(BaseTunerLayer):
    """A layer whose adapters may be decomposed: `W' = m ⊙ V / ‖V‖` with `V = W + ΔW`, row by row or column by column.

    A method's layer supplies `ΔW`, the lengths `‖V‖` and where it keeps `m`; this one the base weight and arithmetic on outputs.

    Source: arXiv:2402.09353, section 4
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._is_plain = not is_quantised(base_layer)

    def base_weight(self) -> Tensor:
        """The base weight in numbers, as stored, without what is merged into it."""
        if self.merged:
            return self.unmerged_weight()
        base = self.get_base_layer()
        return whole(base.weight) if self._is_plain and base.weight.dtype.itemsize > 1 else dense_weight(base)  # type: ignore

    def by_channel(self, values: Tensor) -> Tensor:
        """`[out]` or `[in]` in a shape that multiplies outputs or inputs."""
        return values.view(-1, *[1] * len(self.geometry.kernel_size))

    def rescaled(self, total: Tensor, factor: Tensor) -> Tensor:
        """`f ⊙ (total - bias) + bias`: an output of `V` as one of `f ⊙ V`.

        Args:
            total: The base layer's output plus the adapter's part.
            factor: `f [out]`.
        """
        bias, factor = self._bias(total.dtype), self.by_channel(factor)
        return factor * total if bias is None else torch.addcmul((1 - factor) * bias, factor, total)

    def without_bias(self, x: Tensor) -> Tensor:
        """The base layer's output less its bias."""
        output = self.base_layer(x)
        bias = self._bias(output.dtype)
        return output if bias is None else output - bias

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        """The base layer's bias as outputs take it; it may be stored in a format that is no precision to compute in."""
        bias = self.get_base_layer()._parameters.get("bias")
        return None if bias is None else self.by_channel(bias).to(dtype)

    def first_lengths(self, lengths: Tensor | None, size: int, place: tuple[torch.device, torch.dtype]) -> Tensor:
        """The lengths that an adapter starts with, where it is made; memory for them if there are none yet."""
        device, dtype = place
        if lengths is None or device.type == "meta":
            return torch.empty(size, device=device, dtype=dtype)
        return lengths.to(device, dtype)
