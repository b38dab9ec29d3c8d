# SPDX-License-Identifier: Apache-2.0
"""Writing a LoKr adapter in the layout that another program reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....base.containers import walk
from ....base.errors import PeftNotSupportedError, PeftValueError
from ....base.validation import check_flags
from ....checkpoint.files import as_file, write_tensors
from ....checkpoint.renamed_modules import names_in_files
from ....core.adapted_model import AdaptedModel
from ....core.adapter_choice import adapter_of
from ....core.combining import outer_path
from ..layer import LoKrLayer
from .keys import join_key
from .names import Names
from .parts import FileModule, Piece, join


class Layout(NamedTuple):
    """How a program wants LoKr tensors named.

    Attributes:
        component: What it puts before modules of an image model.
        flat: Whether paths have `_` for dots.
        with_alpha: Whether it reads alpha; else the scale goes into the tensors.
    """

    component: str
    flat: bool
    with_alpha: bool = True


LAYOUTS = {
    "kohya": Layout("lora_unet", True),
    "lycoris": Layout("lycoris", True),
    "simpletuner": Layout("lycoris", True),
    "onetrainer": Layout("lora_transformer", True),
    "comfyui": Layout("diffusion_model", False),
    "ai-toolkit": Layout("diffusion_model", False),
    "diffusers": Layout("transformer", False, with_alpha=False),
}


def save_lokr_file(
    model: nn.Module,
    path: str | os.PathLike,
    layout: str = "lycoris",
    adapter_name: str | None = None,
    component: str | None = None,
    *,
    original_names: bool = False,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Write a LoKr adapter to one file in the layout that another program reads.

    Values are written as they are. Only where the layout has no room for it a trained scalar, or a
    scale that the reader would not apply, is multiplied into `W1`.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        path: A `.safetensors` file, replaced if there; its folder is made if missing.
        layout: "kohya" (sd-scripts, also read by ComfyUI, Forge and others), "lycoris" (LyCORIS
            itself; SimpleTuner, ai-toolkit and ComfyUI read it), "simpletuner", "onetrainer",
            "comfyui", "ai-toolkit" or "diffusers".
        adapter_name: The adapter; by default the one called "default", else the only one that is
            active.
        component: What to put before modules' names, by default what the layout has for image
            models: "lora_unet", "lycoris", "lora_transformer", "diffusion_model" or "transformer".
            For text encoders "lora_te1", "text_encoder" and so on.
        original_names: Name modules as the original implementation of the model does (Stable
            Diffusion XL, Flux) where diffusers has other names; layers that it has in one are
            joined, if they are exactly one Kronecker product.
        dtype: Of the tensors, by default that of the adapter.
        metadata: For the file's header.

    Returns:
        The keys written.

    Raises:
        PeftValueError: There is no such layout or adapter, `path` is a folder, or `dtype` is not a
            floating-point one or has no room for a value; nothing is written.
        PeftTypeError: `path` is no path.
        PeftNotSupportedError: Something of the adapter has no place in such a file; it is named and
            nothing is written.

    Example:
        >>> import tempfile
        >>> from peft import LoKrConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), LoKrConfig(r=1, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_lokr_file(model, f"{folder}/lokr.safetensors", "kohya")
        ['lora_unet_0.alpha', 'lora_unet_0.lokr_w1', 'lora_unet_0.lokr_w2_a',
        'lora_unet_0.lokr_w2_b']
    """
    if layout not in LAYOUTS:
        raise PeftValueError(
            f"`layout`={layout!r} must be one of {', '.join(map(repr, LAYOUTS))}; "
            "`save_pretrained` writes Hugging Face PEFT's."
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise PeftValueError(
            f"`dtype`={dtype!r} must be a floating-point dtype of torch, or None for the adapter's."
        )
    file = as_file(path)
    check_flags(original_names=original_names)
    form = LAYOUTS[layout]
    form = form if component is None else form._replace(component=component)
    adapter_name = adapter_of(model, adapter_name, LoKrLayer, " of LoKr")
    layers = _layers(model, adapter_name)
    modules = _modules(layers, adapter_name, original_names, form, names_in_files(_root(model)))
    tensors = {
        key: tensor
        for name, module in modules.items()
        for key, tensor in _tensors(name, module, form, dtype)
    }
    own = (
        {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": "lokr"})}
        if layout == "kohya"
        else {}
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, tensors, {**own, **(metadata or {})})
    return sorted(tensors)


def _layers(model: nn.Module, adapter_name: str) -> dict[str, LoKrLayer]:
    """The layers that have the adapter, by the path of the module they stand for.

    Raises:
        PeftNotSupportedError: It has more than layers.
    """
    walked = (
        (path, module) for path, module in walk(_root(model)) if isinstance(module, LoKrLayer)
    )
    layers = {outer_path(path): module for path, module in walked if adapter_name in module.scaling}
    config = getattr(model, "peft_config", {}).get(adapter_name)
    for name in ("modules_to_save", "trainable_token_indices"):
        if config is not None and getattr(config, name):
            raise PeftNotSupportedError(
                f"The adapter has `{name}`, which LoKr files have no place for; use "
                "`save_pretrained`."
            )
    return layers


def _root(model: nn.Module) -> nn.Module:
    """The model in which modules have the paths that files know them by."""
    tuner: Any = model._modules.get("base_model")
    return tuner.model if isinstance(tuner, AdaptedModel) else model


def _modules(
    layers: Mapping[str, LoKrLayer],
    adapter_name: str,
    original_names: bool,
    form: Layout,
    known: Mapping[str, str],
) -> dict[str, FileModule]:
    """The adapter as modules of a file, by name; `known` says what other programs call a module,
    where that is not its path.
    """
    pieces = {path: _piece(path, layer, adapter_name, form) for path, layer in layers.items()}
    result: dict[str, FileModule] = {}
    if original_names:
        for name, paths in Names(layers).originals():
            own = [pieces[path] for path in paths]
            sizes, kernel = (
                [layers[path].out_features for path in paths],
                layers[paths[0]].geometry.kernel_size,
            )
            whole = own[0].module if len(own) == 1 else join(own, sizes, kernel)
            if whole is None:
                raise PeftNotSupportedError(
                    f"{', '.join(f'`{path}`' for path in paths)} are one layer, {name!r}, under "
                    "original names, and no "
                    "Kronecker product is exactly what they are; write the file with the model's "
                    "own names."
                )
            result[name] = whole
            for path in paths:
                del pieces[path]
    parts = sorted(path for path, piece in pieces.items() if piece.row_offset is not None)
    if parts:
        raise PeftNotSupportedError(
            f"`{parts[0]}`{f' and {len(parts) - 1} more' if len(parts) > 1 else ''}: the adapter "
            "came from a layer that was "
            "several in one, of whose product this layer has some rows; pass `original_names=True` "
            "to write it as it was."
        )
    return {**result, **{known.get(path, path): piece.module for path, piece in pieces.items()}}


def _piece(path: str, layer: LoKrLayer, adapter_name: str, form: Layout) -> Piece:
    """A layer's adapter as other programs understand it: the scale in alpha, or in the tensors
    where it has no place there.
    """
    if layer.flat_layout[adapter_name]:
        raise PeftNotSupportedError(
            f"`{path}`: a one-dimensional convolution in the order of elements of Hugging Face "
            "PEFT (`kronecker_layout`='flat'), "
            "which no LoKr file has; use `save_pretrained`."
        )
    factors = {
        n: t.detach() for n, t in layer.factors(adapter_name)._asdict().items() if t is not None
    }
    scale, r = layer.base_scaling(adapter_name), layer.r[adapter_name]
    module = FileModule(path, "", False, factors)
    left = "w1" if "w1" in factors else "w1_a"
    if (
        "t2" in factors and form.with_alpha
    ):  # of a one-dimensional kernel without the second axis that Hugging Face PEFT adds
        factors["t2"] = factors["t2"].view(*factors["t2"].shape[:2], *layer.geometry.kernel_size)
    if adapter_name in layer.lokr_scalar:
        factors[left] = _wide(factors[left]) * layer.lokr_scalar[adapter_name].detach()
    if module.rank is None:
        module.alpha = float(layer.alpha[adapter_name] if scale == 1 else r)
        factors[left] = factors[left] if scale == 1 else _wide(factors[left]) * scale
    else:
        plain = module.rank == r and scale == layer.alpha[adapter_name] / r
        module.alpha = float(layer.alpha[adapter_name]) if plain else scale * module.rank
    if adapter_name in layer.lokr_magnitude:
        shape = [1] * (2 + len(layer.geometry.kernel_size))
        shape[0 if layer.wd_on_output[adapter_name] else 1] = -1
        module.dora_scale = layer.lokr_magnitude[adapter_name].detach().view(shape)
    return Piece(module, layer.row_offset[adapter_name])


def _tensors(
    name: str, module: FileModule, form: Layout, dtype: torch.dtype | None
) -> Iterable[tuple[str, Tensor]]:
    """A module's tensors by key.

    Raises:
        PeftValueError: One has values beyond the dtype's.
    """
    factors = dict(module.factors)
    kind = dtype or factors["w2" if "w2" in factors else "w2_a"].dtype
    tensors: dict[str, Tensor] = {}
    if form.with_alpha and module.rank is None:  # which no reader multiplies by
        tensors["alpha"] = torch.tensor(module.alpha, dtype=kind)
    elif form.with_alpha:
        tensors["alpha"] = torch.tensor(module.alpha, dtype=torch.float64)
    elif module.scale != 1:
        left = "w1" if "w1" in factors else "w1_a"
        factors[left] = _wide(factors[left]) * module.scale
    tensors |= {f"lokr_{factor}": tensor for factor, tensor in factors.items()}
    if module.dora_scale is not None:
        tensors["dora_scale"] = module.dora_scale
    for end, tensor in tensors.items():
        cast = tensor.to(kind)
        if (
            cast.dtype != tensor.dtype
            and not cast.is_meta
            and not _is_finite(cast)
            and _is_finite(tensor)
        ):
            raise PeftValueError(
                f"`{name}`: the values of `{end}` go up to {float(tensor.abs().max()):.4g}, those "
                f"of {kind} to "
                f"{torch.finfo(kind).max:.4g}; nothing was written. Pass a wider `dtype`, such as "
                "torch.bfloat16 or torch.float32."
            )
        yield join_key(form.component, name, form.flat, end), cast


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least, so that what is multiplied into it is rounded once."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(_wide(tensor)).all())
