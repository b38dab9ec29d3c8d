# SPDX-License-Identifier: Apache-2.0
"""The kinds of layers that LoRA adapts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base.errors import PeftNotSupportedError
from ...base.geometry import Placement
from ...base.modules import on_accelerator
from ...base.placeholders import placeholders
from ...core.base_layer import embedding_scale
from ...core.weights import base_weight, is_quantized
from ...ops.dispatch import are_unhooked
from ...ops.fused_linear import Chain
from ...ops.mixed_precision import scaled
from .base import LoraLayer, Start
from .config import LoraConfig
from .factors import Factors, draw_for_embedding
from .multihead_attention import MultiheadAttention
from .param_wrapper import LoraParameterProxy, ParamWrapper
from .starts.first import First, first_factors

__all__ = [
    "Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer", "MultiheadAttention",
    "ParamWrapper",
]  # fmt: skip


# The name in the interface.
_LoraParameterProxy = LoraParameterProxy

# Names of the interface that this package does not implement, as placeholders.
LoraVariant: type
_ConvNd: type
_LoraFactorsProxy: type
dispatch_default: type

if not TYPE_CHECKING:  # type checkers would accept any name
    __getattr__ = placeholders(__name__)


class Linear(LoraLayer):
    """A linear layer (`nn.Linear`, `Conv1D`, quantized) with LoRA adapters."""

    def _delta(self, adapter_name: str, x: Tensor) -> Tensor:
        delta = super()._delta(adapter_name, x)
        if adapter_name in self.lora_start:
            scale = self._scale(adapter_name, x, delta.dtype)
            delta = delta - self.lora_start[adapter_name](x) * scale
        return delta

    def delta_chain(self, adapter_name: str, x: Tensor) -> Chain | None:
        """Return `s·B·A·x` as a chain, if nothing is hooked into the factors' modules."""
        modules = self._modules
        A, B = modules["lora_A"]._modules[adapter_name], modules["lora_B"]._modules[adapter_name]
        if (
            adapter_name in modules["lora_magnitude_vector"]._modules
            or adapter_name in modules["lora_start"]._modules
            or not are_unhooked((A, B), nn.Linear)
            or B._parameters["bias"] is not None
        ):
            return None
        down, up = A._parameters["weight"], B._parameters["weight"]
        scale: float | Tensor = self.scaling[adapter_name]
        if adapter_name in self.alora_invocation_tokens:
            scale = self._scale(adapter_name, x, down.dtype, flat=True)
        x = (
            self._dropped(adapter_name, x)
            if self._drops(adapter_name)
            else self._chain_input(x, down.dtype)
        )
        return Chain(x, down.mT, (up.mT,), scale=scale)

    def _start_from_weight(
        self, adapter_name: str, config: LoraConfig, initialize: bool, start: Factors | None
    ) -> None:
        """Start from a part of the base weight, or from what quantizing it loses."""
        A, B = self._weights(adapter_name)
        if start is None:
            first = self._first_factors(adapter_name, config, initialize)
            if first is None:
                return
            start = first.factors
            self.quantized_weight = first.weight
        start = Factors(*(tensor.to(A.dtype) for tensor in start))
        if initialize:
            A.data.copy_(start.A)
            B.data.copy_(start.B)
        if not config.quantizes_weight:
            device = base_weight(self).device
            self.lora_start[adapter_name] = Start(Factors(*(t.to(device) for t in start)))

    def _first_factors(
        self, adapter_name: str, config: LoraConfig, initialize: bool
    ) -> First | None:
        """Return the first factors; None if there are none to start from or to subtract."""
        if config.quantizes_weight and is_quantized(self.base_layer):
            return None  # the checkpoint that fills the adapter was trained with this weight
        weight = self.geometry.as_stored(base_weight(self))
        if weight.is_meta:
            raise PeftNotSupportedError(
                f"`init_lora_weights`={config.init_lora_weights!r} reads the base weight, which is "
                "on the meta device yet; load it."
            )
        if config.offloads_ephemerally and not config.quantizes_weight:
            weight = on_accelerator(weight)
        r, scale = self.r[adapter_name], self.base_scaling(adapter_name)
        first = first_factors(self.get_base_layer(), weight, r, scale, config)
        if first is None and not initialize:
            # The start of another adapter, which this one is a copy of, is written later.
            sizes = (r, self.in_features), (self.out_features, r)
            first = First(Factors(*(weight.new_full(size, math.nan) for size in sizes)))
        return first


class Embedding(LoraLayer):
    """`nn.Embedding` with LoRA adapters, without dropout."""

    def _make(self, adapter_name: str, place: Placement) -> None:
        r, (device, dtype) = self.r[adapter_name], place
        self.lora_embedding_A[adapter_name] = nn.Parameter(
            torch.empty(r, self.in_features, device=device, dtype=dtype)
        )
        self.lora_embedding_B[adapter_name] = nn.Parameter(
            torch.empty(self.out_features, r, device=device, dtype=dtype)
        )

    def reset_lora_parameters(
        self, adapter_name: str, init_lora_weights: bool | str = True
    ) -> None:
        """Draw an adapter's factors again: all starts except False are the same."""
        draw_for_embedding(
            self.lora_embedding_A[adapter_name],
            self.lora_embedding_B[adapter_name],
            init_lora_weights,
        )

    def factors(self, adapter_name: str) -> Factors:  # noqa: D102
        return Factors(self.lora_embedding_A(adapter_name), self.lora_embedding_B(adapter_name))

    def _drops(self, adapter_name: str) -> bool:
        return False

    def _dropped(self, adapter_name: str, x: Tensor) -> Tensor:
        return x

    def _delta(self, adapter_name: str, x: Tensor) -> Tensor:
        return self._looked_up(adapter_name, x, self.get_base_layer())

    def _looked_up(self, adapter_name: str, x: Tensor, base: Any) -> Tensor:
        """Return `s·B·A[:, x]`, times a base embedding's factor on its rows."""
        A, B = self.factors(adapter_name)
        h = F.embedding(
            x, A.mT, padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq
        )
        scale = self._scale(adapter_name, x, h.dtype)
        return F.linear(scaled(h, embedding_scale(base) * scale), B)

    def follower_delta(self, adapter_name: str, base: nn.Module, x: Tensor) -> Tensor:
        """Return `s·Bᵀ·x` looked up in `A`, for a head with the weight of this embedding, or the
        delta of another embedding with it.
        """
        if isinstance(base, nn.Embedding):
            return self._looked_up(adapter_name, x, base)
        A, B = self.factors(adapter_name)
        x = self._cast_input_dtype(x, A.dtype)
        x = self.lora_dropout[adapter_name](x)
        return F.linear(scaled(F.linear(x, B.mT), self.scaling[adapter_name]), A.mT)


class Conv1d(LoraLayer):
    """`nn.Conv1d` with LoRA adapters."""


class Conv2d(LoraLayer):
    """`nn.Conv2d` with LoRA adapters."""


class Conv3d(LoraLayer):
    """`nn.Conv3d` with LoRA adapters."""
