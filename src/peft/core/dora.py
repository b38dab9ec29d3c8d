# SPDX-License-Identifier: Apache-2.0
"""`DecomposedLayer`: weight decomposition (DoRA) as methods share it: a weight's lengths are
trained apart from its direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.errors import PeftNotSupportedError
from ..integrations.distributed import gathered_tensor
from ..ops.exact_merge import Recipe, as_it_is
from ..ops.low_rank import wide
from .base_layer import conv_options, pad_input
from .layer import BaseTunerLayer
from .merges import Merge
from .weights import dense_weight, is_quantized


class DecomposedLayer(BaseTunerLayer):
    """A layer whose adapters may be decomposed: `W' = m ⊙ V / ‖V‖` with `V = W + ΔW`, row by row or
    column by column.

    A method's layer supplies `ΔW`, the lengths `‖V‖` and where it keeps `m`; this one the base
    weight and arithmetic on outputs.

    Source: arXiv:2402.09353, section 4
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._is_plain = not is_quantized(base_layer)

    def is_decomposed(self, adapter_name: str) -> bool:
        """Whether an adapter is, so that what it does to the output is not a sum."""
        return False

    def is_by_columns(self, adapter_name: str) -> bool:
        """Whether a decomposed adapter has lengths of columns: it changes the input of the base
        layer and of its own delta, and so leaves what others add as it is.
        """
        return False

    def merge_of(self, adapter_name: str, options: Mapping[str, Any], is_first: bool) -> Merge:
        """As for all methods; lengths of columns where something else is merged before as the sum
        that they are.
        """
        merge = super().merge_of(adapter_name, options, is_first)
        if is_first or not self.is_by_columns(adapter_name):
            return merge
        weight = wide(self.base_weight())
        total = wide(merge.factor) * (weight + wide(self.get_delta_weight(adapter_name, **options)))  # type: ignore[arg-type]
        return merge._replace(delta=Recipe(as_it_is, (total - weight,)), factor=None)

    def check_mergeable(self, adapter_names: Sequence[str]) -> None:
        """A merge must not change what the active adapters compute, who apply one after the other,
        the merged ones first.

        Raises:
            PeftNotSupportedError: A decomposed adapter would come before or after others than it
                does in the forward.
        """
        super().check_mergeable(adapter_names)
        active = [name for name in self.active_adapters if name in self.scaling]
        merged = [*self.merged_adapters, *adapter_names]
        order = [name for name in merged if name in active] + [
            name for name in active if name not in merged
        ]
        for name in (
            name for name in active if self.is_decomposed(name) and not self.is_by_columns(name)
        ):
            before = active[: active.index(name)]
            if set(order[: order.index(name)]) != set(before):
                raise PeftNotSupportedError(
                    f"Adapter {name} is decomposed and applies after "
                    f"{', '.join(before) or 'no other'} in the forward, where "
                    f"{', '.join(active)} are active; merge them in that order."
                )

    def base_weight(self) -> Tensor:
        """The base weight in numbers, as stored, without what is merged into it."""
        if self.merged:
            return self.unmerged_weight()
        base = self.get_base_layer()
        weight: Any = base._parameters.get("weight")
        is_at_hand = self._is_plain and weight is not None and weight.dtype.itemsize > 1
        return gathered_tensor(weight) if is_at_hand else dense_weight(base)

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
        """The base layer's output less its bias, with nothing merged into its weight."""
        if self.merged:
            return self._product(x, self.unmerged_weight().to(x.dtype))
        output = self.base_layer(x)
        bias = self._bias(output.dtype)
        return output if bias is None else output - bias

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The base layer's output with another weight, less its bias."""
        if not self.geometry.is_conv:
            return F.linear(x, self.geometry.as_stored(weight))
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.geometry.kernel_size) - 1]
        return convolve(pad_input(self, x), weight, **conv_options(self))

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        """The base layer's bias as outputs take it; it may be stored in a format that is no
        precision to compute in.
        """
        bias: Any = getattr(self.get_base_layer(), "bias", None)  # it may be computed
        return None if bias is None else self.by_channel(bias).to(dtype)

    def first_lengths(
        self, lengths: Tensor | None, size: int, place: tuple[torch.device, torch.dtype]
    ) -> Tensor:
        """The lengths that an adapter starts with, where it is made; memory for them if there are
        none yet.
        """
        device, dtype = place
        if lengths is None or device.type == "meta":
            return torch.empty(size, device=device, dtype=dtype)
        return lengths.to(device, dtype)
