# SPDX-License-Identifier: Apache-2.0
"""Helpers for quantized, sharded and empty weights, at their documented place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..base.placeholders import placeholders
from ..core.weights import dequantize_module_weight
from ..integrations.accelerate import init_empty_weights
from ..integrations.distributed import gather_params_ctx
from ..integrations.quantization import get_bnb_param_type

__all__ = [
    "dequantize_module_weight", "gather_params_ctx", "get_bnb_param_type", "init_empty_weights",
]  # fmt: skip

# Names of the interface that this package does not implement, as placeholders.
TpInfo: type
check_deepspeed_zero3_enabled: type
dequantize_bnb_weight: type
dtensor_from_local_like: type
get_layer_device_map: type
map_cache_to_layer_device_map: type
skip_init_on_device: type

if not TYPE_CHECKING:
    __getattr__ = placeholders(__name__)
