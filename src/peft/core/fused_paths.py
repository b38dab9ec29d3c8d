# SPDX-License-Identifier: Apache-2.0
"""Modules that read a child's weight without calling the child: refused, or made to call it."""

from __future__ import annotations

from torch import nn

from ..base.child_uses import child_uses
from ..base.containers import walk
from ..integrations import quantization
from .base_layer import geometry, innermost
from .forward_probe import has_other_output


def unfit_reason(parent: nn.Module, name: str) -> str | None:
    """Return the reason why `parent.name` can't have an adapter, None if it can: its weights are
    complex numbers, and a delta would lose their imaginary part.
    """
    layer = innermost(parent.get_submodule(name))
    dtype = next(
        (parameter.dtype for parameter in layer.parameters() if parameter.is_complex()), None
    )
    if dtype is not None:
        return (
            f"its weights are complex numbers ({dtype}), and adapters are real; adapt other layers"
        )
    return None


def lost_reason(parent: nn.Module, name: str, model_type: str | None) -> str | None:
    """Return the reason why an adapter of the output of `parent.name` would be lost, at least in
    some calls: the parent, torch or a kernel computes with the layer's weight; or can't be added to
    it, since the layer returns something else than its product. None if the adapter acts.

    A linear layer that is called too is adapted, since one of the two branches is for special
    hardware. A convolution is called once, and read in each step of decoding after that.
    """
    layer, parent = innermost(parent.get_submodule(name)), innermost(parent)
    if has_other_output(layer):
        return (
            f"{type(layer).__name__} has a `forward` of its own, whose output is not one tensor of "
            "the size that its settings give (it pads the input, or returns a tuple, for example), "
            "so an adapter's output can't be added to it; adapt other layers"
        )
    if isinstance(parent, nn.MultiheadAttention) and name == "out_proj":
        return (
            "nn.MultiheadAttention reads this layer's weight and never calls it, so an adapter of "
            "its output acts only when merged; target the whole MultiheadAttention in place of it"
        )
    if model_type in ("mamba", "falcon_h1", "falcon_mamba", "mamba2", "nemotron_h") and name in (
        "out_proj",
        "conv1d",
    ):
        return (
            f"{name} is incompatible with Mamba-based models: the fused kernels of {model_type} "
            "read this layer's weight and never call it; adapt `in_proj` or `x_proj`"
        )
    kind: type = type(parent)
    uses, size = child_uses(kind), geometry(layer)
    if name not in uses.read:
        return None
    is_conv = size is not None and size.is_conv
    is_called = name in uses.called
    if name == "dt_proj":  # Jamba and Falcon Mamba call it where the model is quantized
        is_called = hasattr(getattr(parent, "config", None), "_is_quantized") and is_called
    if is_called and not is_conv:
        return None
    remedy = "adapt other layers" if is_conv else f"name `{name}.weight` in `target_parameters`"
    return (
        f"{kind.__name__} computes with this layer's weight "
        f"{'as well as calling' if is_called else 'and never calls'} it, so an adapter of its "
        f"output would be lost; {remedy}"
    )


def avoid_fused_paths(model: nn.Module) -> None:
    """Make torch's transformer encoder call its adapted layers, and keep 4-bit layers
    differentiable.

    The encoder's fused inference path reads weights in place of calling layers, unless a module has
    a hook. Its packing of padded batches only serves that path.
    """
    quantization.keep_differentiable(model)
    for _, module in walk(model):
        is_encoder = isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
        if is_encoder and any("base_layer" in inner._modules for _, inner in walk(module)):
            if _no_operation not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_no_operation)
            if getattr(module, "use_nested_tensor", False):
                vars(module).update(use_nested_tensor=False, _packs_when_plain=True)


def restore_fused_paths(model: nn.Module) -> None:
    """Undo `avoid_fused_paths`."""
    quantization.allow_repacking(model)
    for _, module in walk(model):
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _no_operation:
                del module._forward_pre_hooks[key]
        if vars(module).pop("_packs_when_plain", False):
            vars(module)["use_nested_tensor"] = True


def _no_operation(module: nn.Module, args: object) -> None:
    return None
