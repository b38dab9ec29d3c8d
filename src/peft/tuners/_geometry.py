# SPDX-License-Identifier: Apache-2.0
"""The only file that knows kinds of layers: how large they are, where their weight lives, how it is stored, who bypasses them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..utils.error import PeftNotSupportedError
from ..utils.offload import execution_device
from ..utils.sharding import cut_like, is_elsewhere, is_managed, whole
from ..utils.walk import walk
from ..utils.warning import warn
from . import _quantised
from ._computed import is_computed
from ._computed import read as read_computed
from ._computed import refuse as refuse_computed
from ._ties import can_tell, is_tied


@dataclass(frozen=True)
class Geometry:
    """Size and storage of a linear map `[in] → [out]`, over channels where the layer is a convolution.

    Args:
        out_features: Rows of the weight.
        in_features: Columns of the weight: for a convolution, input channels of one group.
        kernel_size: Empty for a plain linear map.
        transposed: Whether the weight is stored `[in, out]` (transformers' `Conv1D`).
    """

    out_features: int
    in_features: int
    kernel_size: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def is_conv(self) -> bool:
        """Whether the map slides over one or more spatial dimensions."""
        return bool(self.kernel_size)

    def as_stored(self, weight: Tensor) -> Tensor:
        """A weight `[out, in, *kernel]` in the layout of the layer's own."""
        return weight.transpose(0, 1) if self.transposed else weight


class Placement(NamedTuple):
    """Where and in which precision an adapter's parameters are made."""

    device: torch.device
    dtype: torch.dtype


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def geometry(module: nn.Module) -> Geometry | None:
    """The size of a supported layer, None for any other module.

    Supported are `nn.Linear` and everything with its `in_features` and `out_features` (quantised linears), transformers'
    `Conv1D`, and `nn.Conv1d/2d/3d`. An adapted layer has the size of the layer it adapts.
    """
    module = innermost(module)
    if isinstance(module, _CONVOLUTIONS):
        return Geometry(module.out_channels, module.in_channels // module.groups, tuple(module.kernel_size))
    if is_conv1d(module):
        weight: Any = module.weight
        rows, columns = getattr(weight, "ds_shape", weight.shape)  # DeepSpeed ZeRO-3 empties the weight and keeps its shape
        return Geometry(columns, rows, transposed=True)
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    # A module with others inside is a block that notes its sizes; one of size zero has not seen its input yet.
    is_layer = isinstance(module, nn.Linear) or not module._modules
    if is_layer and all(isinstance(size, int) and size > 0 for size in sizes):
        return Geometry(*sizes)  # type: ignore[arg-type]
    return None


def table(module: nn.Module) -> Geometry | None:
    """The size of an `nn.Embedding`, a linear map of one-hot vectors with its weight stored `[in, out]`; None for any other module.

    It is apart from `geometry` since a layer around an embedding has to look rows up in place of multiplying.
    """
    module = innermost(module)
    return Geometry(module.embedding_dim, module.num_embeddings, transposed=True) if isinstance(module, nn.Embedding) else None


def expected_layout(modules: Iterable[nn.Module], fan_in_fan_out: bool) -> bool:
    """What a config's `fan_in_fan_out` should be: whether layers to be adapted store their weight `[in, out]`. A warning tells if
    it says otherwise. Embeddings do not count, which all store it one way.
    """
    stored = {size.transposed for size in map(geometry, modules) if size is not None}
    if True in stored and not fan_in_fan_out:
        message = "fan_in_fan_out is set to False but the target module is `Conv1D`. Setting fan_in_fan_out to True."
        warn(message)
    elif stored == {False} and fan_in_fan_out:
        message = "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. Setting fan_in_fan_out to False."
        warn(message)
    return True in stored if stored else fan_in_fan_out


def embedding_scale(module: nn.Module) -> float | Tensor:
    """What an embedding multiplies the rows it looks up by (in transformers' scaled word embeddings)."""
    return getattr(innermost(module), "embed_scale", 1.0)


def place_for_shared(root: nn.Module, name: str) -> nn.Module:
    """The module that parameters shared by a model's layers are registered on as `name`: the one that has them already, else the
    root, or inside it where the root is a container that takes all its children for steps or items.
    """
    modules = [module for _, module in walk(root)]
    owners = (module for module in modules if name in module._modules)
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return next(owners, next((module for module in modules if not isinstance(module, containers)), root))


def innermost(module: nn.Module) -> nn.Module:
    """The layer itself, below any adapters around it."""
    while "base_layer" in module._modules:
        module = module._modules["base_layer"]  # type: ignore[assignment]
    return module


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`; it can't be one before transformers is imported."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear map without a kernel."""
    size = geometry(module)
    return size is not None and not size.is_conv


def describe(module: nn.Module) -> str:
    """A module's kind and size, for messages."""
    text = repr(innermost(module)).splitlines()
    return text[0] if len(text) == 1 else type(module).__name__


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a layer in numbers, in the layer's layout: the parameter itself where it can be computed with, else (quantised
    or float8) a copy in float32.

    Raises:
        PeftNotSupportedError: The layer keeps it in a form that is not known here.
    """
    layer = innermost(module)
    if is_computed(layer) and not is_elsewhere(layer.weight) and not is_quantised(layer):
        weight = read_computed(layer)
        return weight.float() if weight.dtype.itemsize == 1 else weight
    form = quantised_form(module)
    if form is not None:
        return form.read(innermost(module))
    weight = whole(stored_weight(module))
    return weight.float() if weight.dtype.itemsize == 1 else weight


def stored_weight(module: nn.Module) -> Tensor:
    """The parameter that is a layer's weight, which is not quantised.

    Raises:
        PeftNotSupportedError: It is, or it is not all here.
    """
    module = innermost(module)
    weight = getattr(module, "weight", None)
    if is_elsewhere(weight):
        raise PeftNotSupportedError(
            f"The weight of a {type(module).__name__} is spread over several processes, so that nothing can be merged into it; "
            "merge inside `FullyShardedDataParallel.summon_full_params(...)` or `deepspeed.zero.GatheredParameters(...)`, or in "
            "one process."
        )
    if not isinstance(weight, Tensor) or is_quantised(module):
        raise PeftNotSupportedError(
            f"{type(module).__name__} keeps its weight in a quantised form that an adapter can't be merged into; "
            "load the base model without quantisation to merge."
        )
    refuse_computed(module)
    return weight


def put_weight(module: nn.Module, weight: Tensor) -> None:
    """Give a layer another weight, whole: in place where its memory belongs to an engine that shards it."""
    own: Any = stored_weight(module)
    if is_managed(own):
        own.detach().copy_(cut_like(own, weight))
    else:
        own.data = weight


@contextmanager
def untied(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """A context for merging: adapted layers whose weight a model uses elsewhere too have one of their own from then on, which the
    model's config is told. An error ties them again.

    Args:
        model: The model.
        layers: Its adapted layers.
    """
    users = Counter(id(p) for _, module in walk(model) for p in module._parameters.values() if p is not None)
    shared: list[tuple[nn.Module, nn.Parameter]] = []
    for base in map(innermost, layers):
        weight = base._parameters.get("weight")
        if weight is None or users[id(weight)] < 2 or is_quantised(base) or is_managed(weight) or is_elsewhere(weight):
            continue
        base.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        users[id(weight)] -= 1
        shared.append((base, weight))
    config: Any = getattr(model, "config", None)
    is_told = bool(shared) and is_tied(model) and can_tell(model)
    if is_told:
        warn("Setting `tie_word_embeddings` to False in the model's config: merging makes two weights of one.")
        config.tie_word_embeddings = False
    try:
        yield
    except BaseException:
        for base, weight in shared:
            base.weight = weight
        if is_told:
            config.tie_word_embeddings = True
        raise


def quantised_form(module: nn.Module) -> _quantised.Form | None:
    """How a layer's quantised weight is read and written; None where it is not quantised.

    Raises:
        PeftNotSupportedError: It is, in a form that is not known here.
    """
    module = innermost(module)
    form = _quantised.form(module)
    if form is None:
        stored_weight(module)
    return form


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer keeps its weight in anything but plain floating-point numbers; in float8 these are plain if nothing scales
    them.
    """
    module = innermost(module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or _is_packed(weight, module):
        return True
    scaled = weight.dtype.itemsize == 1 and any("scale" in name for name in (*module._parameters, *module._buffers))
    return scaled or _quantised.is_coded(weight)


def _is_packed(weight: Tensor, module: nn.Module) -> bool:
    """Whether a weight's shape is not the layer's (packed 4-bit formats)."""
    size = geometry(module) or table(module)
    return size is None or weight.numel() != size.out_features * size.in_features * _prod(size.kernel_size)


def placement(module: nn.Module, autocast: bool, device: torch.device | None = None) -> Placement:
    """Where to make adapter parameters for a layer.

    The device is the layer's own (where it runs, if its weights are offloaded meanwhile) unless given. The precision is the
    layer's own, or float32 where that has less than 32 bits and `autocast` is set, or where it is no precision to compute in
    (float8, quantised).
    """
    for tensor in (*innermost(module).parameters(), *innermost(module).buffers()):
        dtype = tensor.dtype
        narrow = dtype in (torch.float16, torch.bfloat16)
        usable = dtype.is_floating_point and dtype.itemsize > 1 and not (autocast and narrow)
        own = execution_device(innermost(module)) or tensor.device
        return Placement(device or own, dtype if usable else torch.float32)
    return Placement(device or torch.device("cpu"), torch.float32)


def conv_options(module: nn.Module) -> dict[str, Any]:
    """`stride`, `padding`, `dilation` and `groups` of a convolution whose input went through `pad_input`."""
    conv: Any = innermost(module)
    padding = conv.padding if conv.padding_mode == "zeros" else (0,) * len(conv.kernel_size)
    return {"stride": conv.stride, "padding": padding, "dilation": conv.dilation, "groups": conv.groups}


def pad_input(module: nn.Module, x: Tensor) -> Tensor:
    """`x` with the padding that a convolution function can't do itself (reflect, replicate, circular)."""
    conv: Any = innermost(module)
    if conv.padding_mode == "zeros":
        return x
    return nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)


def unfit_reason(parent: nn.Module, name: str, model_type: str | None) -> str | None:
    """Return why no adapter can be at `parent.name`, or None: it would lose the imaginary part of complex numbers, or never
    run, since some parents read a child's weight and skip its forward.
    """
    layer = innermost(parent._modules[name])  # type: ignore[arg-type]
    dtype = next((parameter.dtype for parameter in layer.parameters() if parameter.is_complex()), None)
    if dtype is not None:
        return f"its weights are complex numbers ({dtype}), and adapters are real; adapt other layers"
    if isinstance(parent, nn.MultiheadAttention) and name == "out_proj":
        return "nn.MultiheadAttention reads this layer's weight and never calls it; adapt other layers"
    if model_type in ("mamba", "falcon_h1", "falcon_mamba", "mamba2", "nemotron_h") and name in ("out_proj", "conv1d"):
        return (
            f"{name} is incompatible with Mamba-based models: the fused kernels of {model_type} read this layer's weight and never "
            "call it; adapt `in_proj` or `x_proj`"
        )
    return None


def avoid_fused_paths(model: nn.Module) -> None:
    """Have torch's transformer encoder call the adapted layers in it: its fused inference path reads their weights instead, and
    back where any module has a hook; the encoder's packing of padded batches is of use to that path alone. Have 4-bit layers stay
    in the form that gradients pass.
    """
    _quantised.stay_differentiable(model)
    for _, module in walk(model):
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and _has_adapters(module):
            if _no_operation not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_no_operation)
            if getattr(module, "use_nested_tensor", False):
                module.use_nested_tensor, module._packs_when_plain = False, True  # type: ignore[assignment]


def restore_fused_paths(model: nn.Module) -> None:
    """Undo `avoid_fused_paths`."""
    _quantised.repack_again(model)
    for _, module in walk(model):
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _no_operation:
                del module._forward_pre_hooks[key]
        if "_packs_when_plain" in vars(module):
            del module._packs_when_plain
            module.use_nested_tensor = True  # type: ignore[assignment]


def _has_adapters(module: nn.Module) -> bool:
    return any("base_layer" in inner._modules for _, inner in walk(module))


def _no_operation(module: nn.Module, args: Any) -> None:
    return None


def _prod(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
