# SPDX-License-Identifier: Apache-2.0
"""Weights that a library keeps in few bits: reading them as numbers, and writing numbers back in
the same form.

A layer with such a weight is adapted like any other, since adapters call it and never look inside.
Only what needs the numbers themselves comes here: merging, and norms of the weight. No library is
imported before the model has a layer of its.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..base.containers import walk


class Form(NamedTuple):
    """How one kind of layer keeps its weight.

    Args:
        get: The stored weight, whatever it is made of. It stays valid when another is put in its
            place.
        put: Put a stored weight into the layer.
        read: The layer's weight in numbers, float32 `[out, in]`.
        pack: Numbers `[out, in]` in the form of the layer's weight at present, to be put into it.
    """

    get: Callable[[Any], Any]
    put: Callable[[Any, Any], None]
    read: Callable[[Any], Tensor]
    pack: Callable[[Any, Tensor], Any]


def form(module: nn.Module) -> Form | None:
    """How a layer keeps its weight, None where that is no form known here (a plain weight is none)."""
    weight: Any = module._parameters.get("weight")
    bits, torchao = sys.modules.get("bitsandbytes.nn.modules"), sys.modules.get("torchao.utils")
    if bits is not None and isinstance(module, bits.Linear8bitLt):
        return _INT8 if weight.dtype == torch.int8 and _int8_get(module)[1] is not None else None
    if bits is not None and isinstance(module, bits.Linear4bit):
        return _FOUR_BIT if _state_of(module) is not None else None
    if torchao is not None and isinstance(weight, torchao.TorchAOBaseTensor):
        plain = (
            getattr(weight, "act_pre_scale", None) is None
        )  # else inputs are scaled before they meet the weight
        return _TORCHAO if plain and type(weight).__name__ in _TORCHAO_OPTIONS else None
    return None


def is_coded(weight: Tensor) -> bool:
    """Whether a weight that has a floating-point dtype is made of codes by some library: it
    consists of other tensors, and not of pieces on several devices.
    """
    return hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "to_local")


def _int8_get(layer: Any) -> tuple[Tensor, Tensor]:
    """Codes `[out, in]` and scales `[out]`; the first forward moves the scales from the parameter
    to the layer's state.
    """
    scale = getattr(layer.weight, "SCB", None)
    return layer.weight.data, layer.state.SCB if scale is None else scale


def _int8_put(layer: Any, stored: tuple[Tensor, Tensor]) -> None:
    codes, scale = (tensor.to(layer.weight.device) for tensor in stored)
    layer.weight.data = layer.weight.CB = codes
    layer.weight.SCB = scale
    layer.state.reset_grads()


def _int8_read(layer: Any) -> Tensor:
    codes, scale = _int8_get(layer)
    return codes.float() * (scale.float() / 127).unsqueeze(1)


def _int8_pack(layer: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes import functional

    return functional.int8_vectorwise_quant(weight.to(torch.float16))[
        :2
    ]  # the precision the library quantises from


_INT8 = Form(_int8_get, _int8_put, _int8_read, _int8_pack)


def _state_of(layer: Any) -> Any:
    """What is needed to read the codes; sharding libraries strip it from the parameter, the layer
    has it too.
    """
    state = getattr(layer.weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state


def _four_bit_get(layer: Any) -> tuple[Tensor, Any]:
    return layer.weight.data, _state_of(layer)


def _four_bit_put(layer: Any, stored: tuple[Tensor, Any]) -> None:
    codes, state = stored
    device = layer.weight.device
    state.to(device)
    layer.weight.data = codes.to(device)
    layer.weight.quant_state = layer.quant_state = state


def _four_bit_read(layer: Any) -> Tensor:
    from bitsandbytes import functional

    return functional.dequantize_4bit(*_in_blocks(*_four_bit_get(layer))).float()


def _in_blocks(codes: Tensor, state: Any, nested: bool = False) -> tuple[Tensor, Any]:
    """Codes and state in the library's general form; evaluating on some CPUs repacks them, with
    scales in bfloat16.

    Args:
        nested: Quantise scales again that were before; to be read they need not be.
    """
    if not getattr(state, "packing_format_for_cpu", False):
        return codes, state
    from bitsandbytes import functional

    state = copy.copy(state)
    state.original_nested = state.original_nested and nested
    codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
    if not state.nested:
        state.absmax = state.absmax.T.float().flatten()
    return codes, state


def _four_bit_pack(layer: Any, weight: Tensor) -> tuple[Tensor, Any]:
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


_FOUR_BIT = Form(_four_bit_get, _four_bit_put, _four_bit_read, _four_bit_pack)


def stay_differentiable(model: nn.Module) -> None:
    """Keep 4-bit layers from repacking themselves when they evaluate on a CPU with bfloat16
    instructions: no gradient passes a repacked layer from then on, it computes with rounded scales,
    and taking its state dict may spoil it.
    """
    for layer in _four_bit_layers(model):
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu, layer._repacks_when_plain = False, True
            if getattr(_state_of(layer), "packing_format_for_cpu", False):
                _four_bit_put(layer, _in_blocks(*_four_bit_get(layer), nested=True))


def repack_again(model: nn.Module) -> None:
    """Undo `stay_differentiable`."""
    for layer in _four_bit_layers(model):
        if vars(layer).pop("_repacks_when_plain", False):
            layer.support_avx512bf16_for_cpu = True


def _four_bit_layers(model: nn.Module) -> Iterator[Any]:
    bits = sys.modules.get("bitsandbytes.nn.modules")
    return (
        (module for _, module in walk(model) if isinstance(module, bits.Linear4bit))
        if bits is not None
        else iter(())
    )


def _int8_tensor_options(weight: Any) -> dict[str, Any]:
    names = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "reduce_range")
    return {"granularity": _blocks(weight), **{name: getattr(weight, name) for name in names}}


def _float8_tensor_options(weight: Any) -> dict[str, Any]:
    names = ("mm_config", "kernel_preference", "act_quant_kwargs")
    return {
        "granularity": _blocks(weight),
        "float8_dtype": weight.qdata.dtype,
        **{name: getattr(weight, name) for name in names},
    }


def _intx_tensor_options(weight: Any) -> dict[str, Any]:
    from torchao.quantization import MappingType

    symmetric = not weight.zero_point.any()
    names = ("block_size", "target_dtype", "activation_quantization")
    return {
        "mapping_type": MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        **{name: getattr(weight, name) for name in names},
    }


def _blocks(weight: Any) -> Any:
    """How large the blocks are that share a scale: a row, a group, all."""
    from torchao.quantization import PerBlock

    return PerBlock(tuple(weight.block_size))


# By kind of tensor, the arguments with which its library made it.
_TORCHAO_OPTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Int8Tensor": _int8_tensor_options,
    "Float8Tensor": _float8_tensor_options,
    "IntxUnpackedToInt8Tensor": _intx_tensor_options,
}


def _torchao_get(layer: Any) -> nn.Parameter:
    return layer.weight


def _torchao_put(layer: Any, stored: nn.Parameter) -> None:
    device = layer.weight.device
    layer.weight = (
        stored if stored.device == device else nn.Parameter(stored.to(device), requires_grad=False)
    )


def _torchao_read(layer: Any) -> Tensor:
    return layer.weight.dequantize().float()


def _torchao_pack(layer: Any, weight: Tensor) -> nn.Parameter:
    like = layer.weight
    options = _TORCHAO_OPTIONS[type(like).__name__](like)
    return nn.Parameter(type(like).from_hp(weight.to(like.dtype), **options), requires_grad=False)


_TORCHAO = Form(_torchao_get, _torchao_put, _torchao_read, _torchao_pack)
