# SPDX-License-Identifier: Apache-2.0
"""Write a LoKr adapter in the layout that another program reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ....base.calls.running import holds
from ....base.errors import PeftNotSupportedError, PeftTypeError, PeftValueError
from ....base.validation import check_flags, text
from ....checkpoint.files import write_tensors
from ....checkpoint.paths import as_file
from ....checkpoint.renamed_modules import names_in_files
from ....core.adapter_choice import adapter_of
from ....core.conversion import layers_with, root_of
from ..layer import LoKrLayer
from .file_module import FileModule, widened
from .fused_layers import Piece, join
from .keys import join_key
from .original_names import original_names as names_of_original


class Layout(NamedTuple):
    """A program's names for LoKr tensors.

    Attributes:
        component: Prefix of an image model's modules.
        flat: True if paths have `_` for dots.
        with_alpha: True if the program reads alpha; if not, the scale goes into a factor.
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


@holds
def save_lokr_file(
    model: nn.Module,
    path: str | os.PathLike[str],
    layout: str = "lycoris",
    adapter_name: str | None = None,
    component: str | None = None,
    *,
    original_names: bool = False,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Write a LoKr adapter to one file in the layout that another program reads.

    Values are written as they are, with one exception: a trained scalar, and a scale that the
    reader would not apply, are multiplied into `W1`.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        path: A `.safetensors` file, replaced if it exists; its folder is made if missing.
        layout: "kohya" (sd-scripts; ComfyUI, Forge and others read it), "lycoris" (LyCORIS itself;
            SimpleTuner, ai-toolkit and ComfyUI read it), "simpletuner", "onetrainer", "comfyui",
            "ai-toolkit" or "diffusers".
        adapter_name: The adapter; by default "default", else the only one that is active.
        component: Prefix of modules' names; by default the layout's prefix for image models:
            "lora_unet", "lycoris", "lora_transformer", "diffusion_model" or "transformer". Text
            encoders have "lora_te1", "text_encoder" and so on.
        original_names: Name modules as the original implementation of Stable Diffusion XL or Flux
            does. Layers that the original has fused are joined; their adapters must be exactly one
            Kronecker product.
        dtype: Dtype of the tensors, by default the adapter's.
        metadata: Entries for the file's header.

    Returns:
        The keys written.

    Raises:
        PeftValueError: There is no such layout or adapter, `path` is a folder, or `dtype` is not
            a floating-point dtype or too narrow for a value; nothing is written.
        PeftTypeError: `path` is not a path, `component` not a string, or `metadata` has others.
        PeftNotSupportedError: The adapter has something that such files can't hold. The message
            names it; nothing is written.

    Example:
        >>> import tempfile
        >>> from peft import LoKrConfig, get_peft_model
        >>> base, config = nn.Sequential(nn.Linear(16, 16)), LoKrConfig(r=1, target_modules=["0"])
        >>> model = get_peft_model(base, config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_lokr_file(model, f"{folder}/lokr.safetensors", "kohya")
        ['lora_unet_0.alpha', 'lora_unet_0.lokr_w1', 'lora_unet_0.lokr_w2_a',
        'lora_unet_0.lokr_w2_b']
    """
    if not isinstance(layout, str) or layout not in LAYOUTS:
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
    for problem in text("component", component):
        raise PeftTypeError(problem)
    header = metadata or {}
    if not isinstance(header, Mapping) or not all(
        isinstance(part, str) for entry in header.items() for part in entry
    ):
        raise PeftTypeError(f"`metadata`={metadata!r} must be a dictionary of strings.")
    chosen = LAYOUTS[layout]
    chosen = chosen if component is None else chosen._replace(component=component)
    adapter_name = adapter_of(model, adapter_name, LoKrLayer, " of LoKr")
    _refuse_companions(model, adapter_name)
    modules = _modules(model, adapter_name, original_names, chosen)
    tensors = {
        key: tensor
        for name, module in modules.items()
        for key, tensor in _tensors(name, module, chosen, dtype)
    }
    header = dict(header)
    if layout == "kohya":
        arguments = {"ss_network_args": json.dumps({"algo": "lokr"})}
        header = {"ss_network_module": "lycoris.kohya", **arguments, **header}
    write_tensors(file, tensors, header)
    return sorted(tensors)


def _refuse_companions(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter that trains modules or tokens beside its layers."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    for name in ("modules_to_save", "trainable_token_indices"):
        if config is not None and getattr(config, name):
            raise PeftNotSupportedError(
                f"The adapter has `{name}`, which LoKr files have no place for; use "
                "`save_pretrained`."
            )


def _modules(
    model: nn.Module, adapter_name: str, original_names: bool, layout: Layout
) -> dict[str, FileModule]:
    """Return the adapter as modules of a file, by name."""
    root = root_of(model)[0]
    layers = {
        path: layer
        for path, layer in layers_with(root, adapter_name)
        if isinstance(layer, LoKrLayer)
    }
    pieces = {path: _piece(path, layer, adapter_name, layout) for path, layer in layers.items()}
    result: dict[str, FileModule] = {}
    for name, paths in names_of_original(layers).items() if original_names else ():
        own = [pieces.pop(path) for path in paths]
        sizes = [layers[path].out_features for path in paths]
        kernel = layers[paths[0]].geometry.kernel_size
        module = own[0].module if len(own) == 1 else join(own, sizes, kernel)
        if module is None:
            raise PeftNotSupportedError(
                f"{', '.join(f'`{path}`' for path in paths)} are one layer, {name!r}, under "
                "original names, and no Kronecker product is exactly these together; write the "
                "file with the model's own names."
            )
        result[name] = module
    if parts := sorted(path for path, piece in pieces.items() if piece.row_offset is not None):
        more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        raise PeftNotSupportedError(
            f"`{parts[0]}`{more}: the adapter came from a fused layer, and this layer has some "
            "rows of its product; pass `original_names=True` to write it as it was."
        )
    others = names_in_files(root)  # where other programs do not use the path
    return {**result, **{others.get(path, path): piece.module for path, piece in pieces.items()}}


def _piece(path: str, layer: LoKrLayer, adapter_name: str, layout: Layout) -> Piece:
    """Return a layer's adapter with its scale in alpha, or in `W1` where alpha can't express it."""
    if layer.flat_layout[adapter_name]:
        raise PeftNotSupportedError(
            f"`{path}`: a one-dimensional convolution in the order of elements of Hugging Face "
            "PEFT (`kronecker_layout`='flat'), which no LoKr file has; use `save_pretrained`."
        )
    factors = {
        name: tensor.detach()
        for name, tensor in layer.factors(adapter_name)._asdict().items()
        if tensor is not None
    }
    module = FileModule(path, "", False, factors)
    kernel = layer.geometry.kernel_size
    # Other programs lack the second axis that Hugging Face PEFT adds to one-dimensional kernels.
    if "t2" in factors and layout.with_alpha:
        factors["t2"] = factors["t2"].view(*factors["t2"].shape[:2], *kernel)
    if adapter_name in layer.lokr_scalar:
        scalar = layer.lokr_scalar[adapter_name].detach()
        factors[module.left] = widened(factors[module.left]) * scalar
    r, alpha = layer.r[adapter_name], layer.alpha[adapter_name]
    scale = layer.base_scaling(adapter_name)
    if module.rank is not None:
        is_plain = module.rank == r and scale == alpha / r
        module.alpha = float(alpha) if is_plain else scale * module.rank
    elif scale == 1:
        module.alpha = float(alpha)
    else:
        module.alpha = float(r)
        factors[module.left] = widened(factors[module.left]) * scale
    if adapter_name in layer.lokr_magnitude:
        shape = [1] * (2 + len(kernel))
        shape[0 if layer.wd_on_output[adapter_name] else 1] = -1
        module.dora_scale = layer.lokr_magnitude[adapter_name].detach().view(shape)
    return Piece(module, layer.row_offset[adapter_name])


def _tensors(
    name: str, module: FileModule, layout: Layout, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's tensors by key; raise if a value is beyond the dtype."""
    factors = dict(module.factors)
    dtype = dtype or factors[module.right.name].dtype
    tensors: dict[str, Tensor] = {}
    if layout.with_alpha:
        # Readers do not scale by the alpha of full factors, so it may be rounded to the dtype.
        precision = dtype if module.rank is None else torch.float64
        tensors["alpha"] = torch.tensor(module.alpha, dtype=precision)
    elif module.scale != 1:
        factors[module.left] = widened(factors[module.left]) * module.scale
    tensors |= {f"lokr_{factor}": tensor for factor, tensor in factors.items()}
    if module.dora_scale is not None:
        tensors["dora_scale"] = module.dora_scale
    for end, tensor in tensors.items():
        cast = tensor.to(dtype)
        if cast.dtype != tensor.dtype and not _is_finite(cast) and _is_finite(tensor):
            raise PeftValueError(
                f"`{name}`: the values of `{end}` go up to {float(tensor.abs().max()):.4g}, those "
                f"of {dtype} to {torch.finfo(dtype).max:.4g}; nothing was written. Pass a wider "
                "`dtype`, such as torch.bfloat16 or torch.float32."
            )
        yield join_key(layout.component, name, layout.flat, end), cast


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(widened(tensor)).all())
