# SPDX-License-Identifier: Apache-2.0
"""Kinds and sizes of the layers that adapters support. No other file knows them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from numbers import Integral
from typing import Any, Protocol, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from ..base.containers import walk
from ..base.errors import UnsupportedModuleError, warn
from ..base.geometry import Geometry

L = TypeVar("L", bound=nn.Module)

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


class AdaptedLayer(Protocol):
    """The members of a layer with adapters that functions of its base weight use."""

    geometry: Geometry

    @property
    def has_merges(self) -> bool:
        """True if anything is merged into the base weight, by any layer around it."""

    def get_base_layer(self) -> nn.Module:
        """Return the layer below all adapters."""

    def unmerged_weight(self) -> Tensor:
        """Return the base weight without merged adapters."""


def geometry(module: nn.Module) -> Geometry | None:
    """Return the size of a supported layer, None for any other module.

    Supported are `nn.Linear` and everything with its `in_features` and `out_features` (quantized
    linears), transformers' `Conv1D`, and `nn.Conv1d/2d/3d`. An adapted layer has the size of the
    layer it adapts. Models may compute sizes with numpy; a `Geometry` has Python's integers.
    """
    module = innermost(module)
    if isinstance(module, Convolution):
        if not module.in_channels:  # it has not seen its input yet
            return None
        return Geometry(
            int(module.out_channels),
            int(module.in_channels // module.groups),
            tuple(map(int, module.kernel_size)),
            groups=int(module.groups),
        )
    if is_conv1d(module):
        weight = cast(Tensor, module.weight)
        # DeepSpeed ZeRO-3 empties the weight and keeps its shape.
        shape = getattr(weight, "ds_shape", weight.shape)
        return Geometry(shape[1], shape[0], transposed=True)
    rows: Any = getattr(module, "out_features", None)
    columns: Any = getattr(module, "in_features", None)
    # A module with others inside is a block that notes its sizes; a lazy one is of size zero.
    is_layer = isinstance(module, nn.Linear) or not module._modules
    if is_layer and all(isinstance(size, Integral) and int(size) > 0 for size in (rows, columns)):
        return Geometry(int(rows), int(columns))
    return None


def embedding_geometry(module: nn.Module) -> Geometry | None:
    """Return the size of an `nn.Embedding`, None for any other module.

    An embedding is a linear map of one-hot vectors with its weight stored `[in, out]`. It is apart
    from `geometry` since an adapter looks up rows there in place of multiplying.
    """
    module = innermost(module)
    if not isinstance(module, nn.Embedding):
        return None
    return Geometry(int(module.embedding_dim), int(module.num_embeddings), transposed=True)


def expected_layout(modules: Iterable[nn.Module], fan_in_fan_out: bool) -> bool:
    """Return the `fan_in_fan_out` that layers need: True if they store their weight `[in, out]`.

    Warn if the config has another value. Embeddings do not count: all store it one way.
    """
    stored = {size.transposed for size in map(geometry, modules) if size is not None}
    if True in stored and not fan_in_fan_out:
        warn(
            "fan_in_fan_out is set to False but the target module is `Conv1D`. Setting "
            "fan_in_fan_out to True."
        )
    elif stored == {False} and fan_in_fan_out:
        warn(
            "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. Setting "
            "fan_in_fan_out to False."
        )
    return True in stored if stored else fan_in_fan_out


def embedding_scale(module: nn.Module) -> float | Tensor:
    """Return the number that a scaled word embedding of transformers multiplies its rows by."""
    return getattr(innermost(module), "embed_scale", 1.0)


def place_for_shared(root: nn.Module, name: str) -> nn.Module:
    """Return the module to register the layers' shared parameters `name` on, or that has them.

    A new place is the root, or the first module inside it that is not a container.
    """
    modules = [module for _, module in walk(root)]
    owners = (module for module in modules if name in module._modules)
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return next(
        owners, next((module for module in modules if not isinstance(module, containers)), root)
    )


def innermost(module: nn.Module) -> nn.Module:
    """Return the layer itself, below any adapters around it."""
    while (inner := _below(module)) is not None:
        module = inner
    return module


def _below(module: nn.Module) -> nn.Module | None:
    """Return the module that a layer with adapters is around; None for any other module, which may
    have a child of that name.
    """
    if not hasattr(type(module), "adapter_layer_names"):
        return None
    return module._modules.get("base_layer")


def layer_of(module: nn.Module, layer_cls: type[L]) -> L | None:
    """Return the outermost layer of a class around one base layer, or None."""
    inner: nn.Module | None = module
    while inner is not None:
        if isinstance(inner, layer_cls):
            return inner
        inner = _below(inner)
    return None


def adapted_module(module: nn.Module, layer_cls: type[nn.Module]) -> nn.Module:
    """Return the module that a layer of a class adapts here, or would adapt."""
    layer = layer_of(module, layer_cls)
    return module if layer is None else layer.get_submodule("base_layer")


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' `Conv1D`, without importing transformers."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear map without a kernel."""
    size = geometry(module)
    return size is not None and not size.is_conv


def describe(module: nn.Module) -> str:
    """Return a module's kind and size, for messages."""
    text = repr(innermost(module)).splitlines()
    return text[0] if len(text) == 1 else type(module).__name__


def output_dtype(module: Any, output: Any) -> torch.dtype:
    """Return the dtype of a layer's output; raise for one that an adapter's can't be added to."""
    try:
        return output.dtype
    except AttributeError:
        raise UnsupportedModuleError(
            f"{type(innermost(module)).__name__} returned a {type(output).__name__}, not one "
            "tensor, so an adapter's output can't be added to it; leave the layer out "
            "(`exclude_modules`)."
        ) from None


def conv_options(module: nn.Module) -> dict[str, Any]:
    """Return `stride`, `padding`, `dilation` and `groups` of a convolution after `pad_input`."""
    conv = cast(Convolution, innermost(module))
    padding = conv.padding if conv.padding_mode == "zeros" else (0,) * len(conv.kernel_size)
    sizes = {"stride": conv.stride, "padding": padding, "dilation": conv.dilation}
    return {**sizes, "groups": conv.groups}


def pad_input(module: nn.Module, x: Tensor) -> Tensor:
    """Return `x` with the padding that torch's functions lack (reflect, replicate, circular)."""
    conv = cast(Convolution, innermost(module))
    if conv.padding_mode == "zeros":
        return x
    return nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)


def convolve(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Return the output of a convolution with another weight and without its bias."""
    functional = nn.functional
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[weight.dim() - 3]
    return function(pad_input(module, x), weight, **conv_options(module))
