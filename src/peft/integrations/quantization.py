# SPDX-License-Identifier: Apache-2.0
"""Weights that another library keeps in few bits: read them as numbers, and write numbers back in
the same storage format.

An adapter calls a quantized layer like any other. Only merging and norms of the weight need the
numbers. No library is imported before the model has a layer of it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..base.containers import walk

_Foreign: TypeAlias = Any
"""A layer, tensor or state of a library that need not be installed."""


class StorageFormat(NamedTuple):
    """Functions for the weight of one kind of quantized layer.

    Args:
        name: Name of the format in `get_layer_status`.
        get: Return the stored weight, which stays valid when the layer gets another.
        put: Put a stored weight into the layer.
        read: Return the layer's weight dequantized, float32 `[out, in]`.
        pack: Return numbers `[out, in]` as a stored weight of the layer's present format.
    """

    name: str
    get: Callable[[_Foreign], object]
    put: Callable[[_Foreign, _Foreign], None]
    read: Callable[[_Foreign], Tensor]
    pack: Callable[[_Foreign, Tensor], object]


def quantizer(module: nn.Module) -> str | None:
    """Return the library and bits that keep a layer's weight, None for plain and unknown layers:
    "bnb 8bit", "bnb 4bit" or "torchao".
    """
    bits, torchao = sys.modules.get("bitsandbytes.nn.modules"), sys.modules.get("torchao.utils")
    if bits is not None and isinstance(module, bits.Linear8bitLt):
        return "bnb 8bit"
    if bits is not None and isinstance(module, bits.Linear4bit):
        return "bnb 4bit"
    weight = module._parameters.get("weight")
    if torchao is not None and isinstance(weight, torchao.TorchAOBaseTensor):
        return "torchao"
    return None


def storage_format(module: nn.Module) -> StorageFormat | None:
    """Return the storage format of a layer's weight, None if it is plain or unknown."""
    kind = quantizer(module)
    weight: _Foreign = module._parameters.get("weight")
    if kind == "bnb 8bit":
        return _INT8 if weight.dtype == torch.int8 and _int8_get(module)[1] is not None else None
    if kind == "bnb 4bit":
        return _FOUR_BIT if _quant_state(module) is not None else None
    if kind == "torchao":
        # With `act_pre_scale` the inputs are scaled before they are multiplied by the weight.
        is_plain = getattr(weight, "act_pre_scale", None) is None
        return _TORCHAO if is_plain and type(weight).__name__ in _TORCHAO_OPTIONS else None
    return None


def get_bnb_param_type(param: nn.Parameter) -> Literal[False, "4bit", "8bit"]:
    """Return "4bit" or "8bit" for a parameter of bitsandbytes, False for any other."""
    library = sys.modules.get("bitsandbytes.nn.modules")
    if library is not None and isinstance(param, library.Params4bit):
        return "4bit"
    return "8bit" if library is not None and isinstance(param, library.Int8Params) else False


def numbers_dtype(module: nn.Module) -> torch.dtype:
    """Return the precision that a quantized layer's weight was quantized from, as far as it tells;
    float32 for 8-bit ones.
    """
    kind = quantizer(module)
    weight: _Foreign = module._parameters["weight"]
    if kind == "bnb 4bit":
        state = _quant_state(module)
        return getattr(state, "original_dtype", None) or state.dtype
    return weight.dtype if kind == "torchao" else torch.float32


def is_quantized_tensor(weight: Tensor) -> bool:
    """Return True for a tensor subclass that wraps quantized codes."""
    return hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "to_local")


def _int8_get(layer: _Foreign) -> tuple[Tensor, Tensor]:
    """Return codes `[out, in]` and scales `[out]`, which the first forward moves to the state."""
    scale = getattr(layer.weight, "SCB", None)
    return layer.weight.data, layer.state.SCB if scale is None else scale


def _int8_put(layer: _Foreign, stored: tuple[Tensor, Tensor]) -> None:
    codes, scale = (tensor.to(layer.weight.device) for tensor in stored)
    layer.weight.data = layer.weight.CB = codes
    layer.weight.SCB = scale
    layer.state.reset_grads()


def _int8_read(layer: _Foreign) -> Tensor:
    codes, scale = _int8_get(layer)
    return codes.float() * (scale.float() / 127).unsqueeze(1)


def _int8_pack(layer: _Foreign, weight: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes import functional

    # float16 is the precision that the library quantizes from.
    return functional.int8_vectorwise_quant(weight.to(torch.float16))[:2]


_INT8 = StorageFormat("bnb 8bit", _int8_get, _int8_put, _int8_read, _int8_pack)


def _quant_state(layer: _Foreign) -> _Foreign:
    """Return the state that the codes are read with, the parameter's or else the layer's."""
    state = getattr(layer.weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state


def _four_bit_get(layer: _Foreign) -> tuple[Tensor, _Foreign]:
    return layer.weight.data, _quant_state(layer)


def _four_bit_put(layer: _Foreign, stored: tuple[Tensor, _Foreign]) -> None:
    codes, state = stored
    device = layer.weight.device
    state.to(device)
    layer.weight.data = codes.to(device)
    layer.weight.quant_state = layer.quant_state = state


def _four_bit_read(layer: _Foreign) -> Tensor:
    from bitsandbytes import functional

    return functional.dequantize_4bit(*_unpacked(*_four_bit_get(layer))).float()


def _unpacked(codes: Tensor, state: _Foreign, nested: bool = False) -> tuple[Tensor, _Foreign]:
    """Return codes and state in the library's general format, which some CPUs repack."""
    if not getattr(state, "packing_format_for_cpu", False):
        return codes, state
    from bitsandbytes import functional

    state = copy.copy(state)
    state.original_nested = state.original_nested and nested
    codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
    if not state.nested:
        state.absmax = state.absmax.T.float().flatten()
    return codes, state


def _four_bit_pack(layer: _Foreign, weight: Tensor) -> tuple[Tensor, _Foreign]:
    from bitsandbytes import functional

    codes, state = _four_bit_get(layer)
    repacked = getattr(state, "packing_format_for_cpu", False)
    storage = getattr(state, "original_storage_type", None) if repacked else codes.dtype
    return functional.quantize_4bit(
        weight.to(state.original_dtype if repacked else state.dtype),
        blocksize=state.blocksize,
        compress_statistics=state.original_nested if repacked else state.nested,
        quant_type=state.quant_type,
        quant_storage=storage or codes.dtype,
    )


_FOUR_BIT = StorageFormat("bnb 4bit", _four_bit_get, _four_bit_put, _four_bit_read, _four_bit_pack)


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit layers from repacking their weights in evaluation on a CPU with bfloat16.

    A repacked layer passes no gradient and rounds its scales; its state dict may damage it.
    """
    for layer in _four_bit_layers(model):
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu, layer._repacks_when_plain = False, True
            if getattr(_quant_state(layer), "packing_format_for_cpu", False):
                _four_bit_put(layer, _unpacked(*_four_bit_get(layer), nested=True))


def allow_repacking(model: nn.Module) -> None:
    """Undo `keep_differentiable`."""
    for layer in _four_bit_layers(model):
        if layer.__dict__.pop("_repacks_when_plain", False):
            layer.support_avx512bf16_for_cpu = True


def _four_bit_layers(model: nn.Module) -> Iterator[_Foreign]:
    bits = sys.modules.get("bitsandbytes.nn.modules")
    if bits is None:
        return
    for _, module in walk(model):
        if isinstance(module, bits.Linear4bit):
            yield module


def _int8_tensor_options(weight: _Foreign) -> dict[str, object]:
    names = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "reduce_range")
    return {"granularity": _blocks(weight), **{name: getattr(weight, name) for name in names}}


def _float8_tensor_options(weight: _Foreign) -> dict[str, object]:
    names = ("mm_config", "kernel_preference", "act_quant_kwargs")
    return {
        "granularity": _blocks(weight),
        "float8_dtype": weight.qdata.dtype,
        **{name: getattr(weight, name) for name in names},
    }


def _intx_tensor_options(weight: _Foreign) -> dict[str, object]:
    from torchao.quantization import MappingType

    symmetric = not weight.zero_point.any()
    names = ("block_size", "target_dtype", "activation_quantization")
    return {
        "mapping_type": MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        **{name: getattr(weight, name) for name in names},
    }


def _blocks(weight: _Foreign) -> object:
    """Return the blocks that share a scale, as torchao describes them."""
    from torchao.quantization import PerBlock

    return PerBlock(tuple(weight.block_size))


# The arguments that torchao made a tensor with, by the name of its class.
_TORCHAO_OPTIONS: dict[str, Callable[[_Foreign], dict[str, object]]] = {
    "Int8Tensor": _int8_tensor_options,
    "Float8Tensor": _float8_tensor_options,
    "IntxUnpackedToInt8Tensor": _intx_tensor_options,
}


def _torchao_get(layer: _Foreign) -> nn.Parameter:
    return layer.weight


def _torchao_put(layer: _Foreign, stored: nn.Parameter) -> None:
    device = layer.weight.device
    layer.weight = (
        stored if stored.device == device else nn.Parameter(stored.to(device), requires_grad=False)
    )


def _torchao_read(layer: _Foreign) -> Tensor:
    return layer.weight.dequantize().float()


def _torchao_pack(layer: _Foreign, weight: Tensor) -> nn.Parameter:
    like = layer.weight
    options = _TORCHAO_OPTIONS[type(like).__name__](like)
    return nn.Parameter(type(like).from_hp(weight.to(like.dtype), **options), requires_grad=False)


_TORCHAO = StorageFormat("torchao", _torchao_get, _torchao_put, _torchao_read, _torchao_pack)
