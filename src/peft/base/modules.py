# SPDX-License-Identifier: Apache-2.0
"""Helpers for modules: their place in a model, the model's architecture, the accelerator."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass

import torch
from torch import Tensor, nn

from .errors import PeftTypeError, PeftValueError
from .plain_values import JsonObject


def check_model(model: object) -> None:
    """Check that `model` is an `nn.Module`; the error says what to pass instead."""
    if isinstance(model, nn.Module):
        return
    inside = [
        name
        for name, value in getattr(model, "__dict__", {}).items()
        if isinstance(value, nn.Module)
    ]
    if isinstance(model, type):
        remedy = f"Make or load an object of the class {model.__name__} first."
    elif inside:
        remedy = f"Pass one of the networks in it: {', '.join(f'`.{name}`' for name in inside)}."
    else:
        remedy = "Load the model first, and pass it as the first argument."
    raise PeftTypeError(f"The model must be an nn.Module, got {type(model)}. {remedy}")


def get_submodules(model: nn.Module, path: str) -> tuple[nn.Module, nn.Module, str]:
    """Return the parent of the module at a path, the module, and its name in the parent."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(path), name


_get_submodules = get_submodules  # the name that clients import


def infer_device() -> str:
    """Return the name of the available accelerator, "cpu" if there is none."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "xpu" if torch.xpu.is_available() else "cpu"


def on_accelerator(tensor: Tensor) -> Tensor:
    """Return a copy of a CPU tensor on the accelerator; others, and without one, as they are."""
    return tensor.to(infer_device()) if tensor.device.type == "cpu" else tensor


def model_type(model: nn.Module) -> str | None:
    """Return the architecture in a transformers config (object or dict), None for other models."""
    config = getattr(model, "config", None)
    if isinstance(config, dict):
        return config.get("model_type")
    return getattr(config, "model_type", None)


def model_config(model: nn.Module, default: JsonObject) -> JsonObject:
    """Return a model's config as a dictionary, a default for a model without one."""
    config = getattr(model, "config", default)
    if isinstance(config, dict):
        return config
    is_plain = is_dataclass(config) and not isinstance(config, type)
    return asdict(config) if is_plain else config.to_dict()


def shift_tokens_right(
    input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int
) -> Tensor:
    """Return a decoder's input for its labels: shifted one place to the right, after the start
    token, with padding in place of -100.

    Args:
        input_ids: `[batch, tokens]`.
        pad_token_id: The padding token.
        decoder_start_token_id: The start token.

    Raises:
        PeftValueError: `pad_token_id` is None.

    Example:
        >>> shift_tokens_right(torch.tensor([[5, -100, 7]]), 0, 9)
        tensor([[9, 5, 0]])
    """
    if pad_token_id is None:
        raise PeftValueError(
            "`pad_token_id` has to be defined to shift tokens: labels of -100 become padding."
        )
    shifted = torch.cat(
        [torch.full_like(input_ids[:, :1], decoder_start_token_id), input_ids[:, :-1]], dim=1
    )
    return shifted.masked_fill(shifted == -100, pad_token_id)
