# SPDX-License-Identifier: Apache-2.0
"""The weight of a base layer: read it as floating-point numbers, replace it, untie it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..base.containers import WeightFollower, walk
from ..base.errors import PeftNotSupportedError, warn
from ..base.geometry import Placement
from ..base.tracing import numel
from ..integrations import quantization
from ..integrations.accelerate import execution_device
from ..integrations.distributed import gathered_tensor, is_managed, is_unreadable, shard_like
from .base_layer import AdaptedLayer, embedding_geometry, geometry, innermost
from .computed_weights import is_computed
from .computed_weights import read as read_computed
from .computed_weights import refuse as refuse_computed
from .replication import shared_parameters
from .tied_weights import can_tell, is_tied


def base_weight(layer: AdaptedLayer) -> Tensor:
    """Return the base weight as stored, in floating-point numbers, without merges."""
    if layer.has_merges:
        return layer.unmerged_weight()
    base, size = layer.get_base_layer(), layer.geometry
    weight = base._parameters.get("weight")
    if (
        weight is not None
        and weight.is_floating_point()
        and weight.dtype.itemsize > 1
        and numel(weight) == size.out_features * size.columns  # else packed, or gathered later
        and not quantization.is_quantized_tensor(weight)
    ):
        return gathered_tensor(weight)
    return dense_weight(base)


def dense_weight(module: nn.Module) -> Tensor:
    """Return a layer's weight in its layout: the parameter, or (quantized, float8) a float32 copy.

    Raises:
        PeftNotSupportedError: Its storage format is unknown.
    """
    layer = innermost(module)
    if is_computed(layer) and not is_unreadable(layer.weight) and not is_quantized(layer):
        weight = read_computed(layer)
        return weight.float() if weight.dtype.itemsize == 1 else weight
    form = quantized_format(module)
    if form is not None:
        return form.read(innermost(module))
    weight = gathered_tensor(stored_weight(module))
    return weight.float() if weight.dtype.itemsize == 1 else weight


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """Return a layer's weight as numbers: the parameter itself, or a copy of a quantized one in the
    precision that it was quantized from.

    Raises:
        PeftNotSupportedError: Its storage format is unknown.
    """
    layer = innermost(module)
    if quantization.quantizer(layer) is not None:
        return dense_weight(layer).to(quantization.numbers_dtype(layer))
    weight = cast(Tensor, layer.weight)
    is_plain = weight.is_floating_point() and not quantization.is_quantized_tensor(weight)
    return weight if is_plain else dense_weight(layer)


def stored_weight(module: nn.Module) -> Tensor:
    """Return a layer's weight parameter; raise if quantized, computed, or not all here."""
    module = innermost(module)
    weight = getattr(module, "weight", None)
    if is_unreadable(weight):
        raise PeftNotSupportedError(
            f"The weight of a {type(module).__name__} is spread over several processes, so that "
            "nothing can be merged into it; merge inside "
            "`FullyShardedDataParallel.summon_full_params(...)` or "
            "`deepspeed.zero.GatheredParameters(...)`, or in one process."
        )
    if not isinstance(weight, Tensor) or is_quantized(module):
        raise PeftNotSupportedError(
            f"{type(module).__name__} keeps its weight in a quantized storage format that an "
            "adapter can't be merged into; load the base model without quantization to merge."
        )
    refuse_computed(module)
    return weight


def put_weight(module: nn.Module, weight: Tensor) -> None:
    """Replace a layer's full weight, in place if a sharding engine owns the memory."""
    own = stored_weight(module)
    if is_managed(own):
        own.detach().copy_(shard_like(own, weight))
    else:
        own.data = weight


@contextmanager
def untied(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Context for merging: copy weights used elsewhere, and note it in the model's config.

    An error ties them again.
    """
    users = Counter(
        id(p)
        for _, module in walk(model, closed=(WeightFollower,))
        for p in module._parameters.values()
        if p is not None
    )
    replicated = shared_parameters(model)
    shared: list[tuple[nn.Module, nn.Parameter]] = []
    for base in map(innermost, layers):
        weight = base._parameters.get("weight")
        if (
            weight is None
            or users[id(weight)] < 2
            or is_quantized(base)
            or is_managed(weight)
            or is_unreadable(weight)
        ):
            continue
        base.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        users[id(weight)] -= 1
        shared.append((base, weight))
    config: Any = getattr(model, "config", None)
    is_apart = any(id(weight) not in replicated for _, weight in shared)
    is_told = is_apart and is_tied(model) and can_tell(model)
    if is_told:
        warn(
            "Setting `tie_word_embeddings` to False in the model's config: merging makes two "
            "weights of one."
        )
        config.tie_word_embeddings = False
    try:
        yield
    except BaseException:
        for base, weight in shared:
            base.weight = weight
        if is_told:
            config.tie_word_embeddings = True
        raise


def quantized_format(module: nn.Module) -> quantization.StorageFormat | None:
    """Return the storage format of a quantized weight, None for others; raise if unknown."""
    module = innermost(module)
    form = quantization.storage_format(module)
    if form is None:
        stored_weight(module)
    return form


def is_quantized(module: nn.Module) -> bool:
    """Return whether a weight is stored as other than plain floats; unscaled float8 is plain."""
    module = innermost(module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return True
    size = geometry(module) or embedding_geometry(module)
    is_whole = not is_unreadable(weight)
    if size is None or (is_whole and numel(weight) != size.out_features * size.columns):
        return True  # its shape is not the layer's: a packed 4-bit format
    scaled = weight.dtype.itemsize == 1 and any(
        "scale" in name for name in (*module._parameters, *module._buffers)
    )
    return scaled or quantization.is_quantized_tensor(weight)


def placement(module: nn.Module, autocast: bool, device: torch.device | None = None) -> Placement:
    """Return device and dtype of the adapter parameters for a layer.

    The device is where the layer runs unless given; the precision the layer's own, or float32 for a
    storage format (float8, quantized) and, with `autocast`, below 32 bits.
    """
    for tensor in (*innermost(module).parameters(), *innermost(module).buffers()):
        dtype = tensor.dtype
        narrow = dtype in (torch.float16, torch.bfloat16)
        usable = dtype.is_floating_point and dtype.itemsize > 1 and not (autocast and narrow)
        own = execution_device(innermost(module)) or tensor.device
        return Placement(device or own, dtype if usable else torch.float32)
    return Placement(device or torch.device("cpu"), torch.float32)
