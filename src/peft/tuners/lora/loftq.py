# SPDX-License-Identifier: Apache-2.0
"""LoftQ for a model that is quantized already: start from what its weights lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...base.errors import CheckpointError, CheckpointNotFoundError, PeftValueError
from ...base.progress import track
from ...base.validation import check_adapter
from ...checkpoint.files import read_json
from ...core.adapters import check_unsharded
from ...core.weights import dense_weight, quantized_format
from ...integrations.distributed import take_back
from ...peft_model import PeftModel
from .layer import Linear
from .starts.loftq import loftq
from .starts.weight import pissa

__all__ = ["loftq_init", "replace_lora_weights_loftq"]

Callback: TypeAlias = Callable[[Any, str], bool]

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def loftq_init(
    weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight after quantization, and factors `A [r, in]`, `B [out, r]` of its loss.

    Args:
        weight: `[out, in]`.
        num_bits: 4 or 8.
        reduced_rank: `r`.
        num_iter: Turns of quantizing and factorizing.

    Returns:
        `Q`, `A` and `B` with `W ≈ Q + B·A`; `Q` in the dtype of the weight.

    Raises:
        PeftValueError: A number is not allowed.

    Source: arXiv:2310.08659, algorithm 1
    """
    if num_bits not in (4, 8) or num_iter < 1:
        raise PeftValueError(
            f"`num_bits`={num_bits!r} must be 4 or 8, and `num_iter`={num_iter!r} at least 1."
        )
    Q, factors = loftq(weight.detach(), reduced_rank, 1.0, num_bits, num_iter)
    return Q.dense().to(weight.dtype), factors.A, factors.B


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callback | None = None,
) -> None:
    """Start an adapter of a quantized model from what the quantization lost: `s·B·A` is the best
    approximation of `W - Q`.

    `W` is read from the base model's safetensors files, one weight at a time. The adapter should be
    new, with `B` zero: its factors are replaced.

    Args:
        peft_model: A model whose base has quantized layers with LoRA.
        model_path: The base model's folder or its safetensors file; by default the folder or the
            local copy of the Hub repository that it was loaded from.
        adapter_name: The adapter.
        callback: Called with the model and a layer's path after each layer; if it returns False,
            that layer's factors are put back. So it can check that outputs came closer to those of
            the full model. Calling this function again may replace more of them.

    Raises:
        PeftValueError: No layer of the adapter is quantized, or the place of the weights is not
            known.
        PeftRuntimeError: An engine has sharded the model.
        CheckpointNotFoundError: There is no safetensors file.
        CheckpointError: The file lacks a weight, or it has another shape; nothing is changed.

    Source: arXiv:2310.08659, eq. 6 with one step
    """
    if not isinstance(peft_model, PeftModel):
        raise PeftValueError("The model must be a PeftModel; `get_peft_model` makes one.")
    check_adapter(adapter_name, peft_model.peft_config)
    layers = {
        path: layer
        for path, layer in peft_model.base_model.adapter_layers(adapter_name, Linear).items()
        if quantized_format(layer) is not None
    }
    if not layers:
        raise PeftValueError(
            f"No quantized layer has adapter {adapter_name}: load the base model in 4 or 8 bits, "
            "or use `init_lora_weights='loftq'` for a model in full precision."
        )
    take_back(peft_model)
    check_unsharded(layers, adapter_name, "start it by LoftQ")
    weights = _Weights(peft_model.get_base_model(), model_path)
    sizes = {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}
    weights.check({f"{path}.weight": size for path, size in sizes.items()})
    for path in track(list(layers), "LoftQ"):
        layer = layers[path]
        W, (A, B) = weights.read(f"{path}.weight"), layer.factors(adapter_name)
        lost = W.to(A.device).float() - dense_weight(layer.base_layer)
        new = pissa(lost, layer.r[adapter_name], layer.base_scaling(adapter_name))
        decomposition = layer.decomposition(adapter_name)
        # The adapter's values, and DoRA's norms of the weight that they make.
        values = [A, B] if decomposition is None else [A, B, decomposition.magnitude()]
        old = [value.detach().clone() for value in values]
        A.copy_(new.A)
        B.copy_(new.B)
        if decomposition is not None:
            values[2].copy_(decomposition.norms(layer.scaling[adapter_name]))
        if callback is not None and not callback(peft_model, path):
            for value, before in zip(values, old, strict=True):
                value.copy_(before)


class _Weights:
    """The weights of a base model in its safetensors files."""

    def __init__(self, model: Any, place: str | os.PathLike[str] | None) -> None:
        path = _default_place(model) if place is None else Path(place)
        prefix = getattr(model, "base_model_prefix", "")
        self.prefix = f"{prefix}." if prefix else ""
        self.files: dict[str, Path] = {}
        for file in _files(path):
            with safe_open(file, framework="pt") as opened:
                self.files |= dict.fromkeys(opened.keys(), file)

    def key(self, name: str) -> str | None:
        """Return the key of a parameter of the model, None if there is none."""
        names = (name, name.removeprefix(self.prefix), self.prefix + name)
        return next((key for key in names if key in self.files), None)

    def check(self, sizes: dict[str, tuple[int, int]]) -> None:
        """Check that there is a weight of each name and size."""
        for name, size in sizes.items():
            key = self.key(name)
            if key is None:
                raise CheckpointError(
                    f"The model's files have no `{name}`; pass the `model_path` of the model that "
                    "was quantized."
                )
            with safe_open(self.files[key], framework="pt") as file:
                found = tuple(file.get_slice(key).get_shape())
            if found != size:
                raise CheckpointError(f"`{name}` has shape {found}, the model's layer {size}.")

    def read(self, name: str) -> Tensor:
        """Return a weight."""
        key = self.key(name)
        assert key is not None
        with safe_open(self.files[key], framework="pt") as file:
            return file.get_tensor(key)


def _default_place(model: nn.Module) -> Path:
    """Return the folder that a model was loaded from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if name and Path(name).is_dir():
        return Path(name)
    if not name:
        raise PeftValueError(
            "The model does not tell where it was loaded from; pass `model_path`, the folder of "
            "its safetensors files."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointNotFoundError(
            f"The safetensors files of '{name}' are not on this disk; pass their `model_path`."
        ) from error


def _files(path: Path) -> Iterator[Path]:
    """Yield the safetensors files of a model: one, or those that an index lists."""
    if path.is_file():
        yield path
    elif (path / _FILE).is_file():
        yield path / _FILE
    elif (path / _INDEX).is_file():
        names = read_json(path / _INDEX)["weight_map"].values()
        yield from (path / name for name in dict.fromkeys(names))
    else:
        raise CheckpointNotFoundError(f"Could not find file '{path / _FILE}', nor '{_INDEX}'.")
