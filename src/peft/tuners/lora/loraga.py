# SPDX-License-Identifier: Apache-2.0
"""LoRA-GA: run steps of training, and keep the gradients of the weights to adapt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ...base.errors import CheckpointError, PeftValueError, warn
from ...base.suggestions import listed
from ...base.validation import check_functions
from ...checkpoint.paths import as_path
from ...core.measuring import in_mode
from ...core.weights import is_quantized
from .config import LoraConfig
from .start_data import check_config, linear_targets, read_cache, write_cache
from .starts.gradient import GRADIENT

__all__ = ["preprocess_loraga"]


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], object],
    cache_file: str | os.PathLike[str] | None = None,
) -> None:
    """Compute the gradients of a model's weights that a LoRA-GA adapter starts from.

    Each targeted linear layer gets an attribute with the mean gradient of its weight, which
    `get_peft_model` uses up. Call it before `get_peft_model`, with the same config. `train_step`
    runs some batches forward and backward, without an optimizer. The model is in training mode,
    and only the targeted weights get gradients; afterwards it is as it was.

    Args:
        model: The base model, in full precision.
        lora_config: With `init_lora_weights="lora_ga"`.
        train_step: Runs forward and backward, any number of times.
        cache_file: A file of the gradients: read if it exists, else written.

    Raises:
        PeftTypeError: An argument is of another type.
        PeftValueError: The config is not for LoRA-GA or targets no linear layer, a weight is
            quantized, or no weight got a gradient; nothing is changed.
        CheckpointError: The file can't be read, or lacks a layer.

    Example:
        >>> from peft import LoraGAConfig, get_peft_model
        >>> base, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(32, 8)
        >>> before = base(x)
        >>> config = LoraConfig(
        ...     r=2,
        ...     target_modules=["0"],
        ...     init_lora_weights="lora_ga",
        ...     lora_ga_config=LoraGAConfig(),
        ... )
        >>> preprocess_loraga(base, config, lambda: base(x).square().mean().backward())
        >>> model = get_peft_model(base, config)
        >>> torch.allclose(model(x), before, atol=1e-4)
        True

    Source: arXiv:2407.05000, section 3
    """
    check_config(lora_config)
    check_functions(train_step=train_step)
    if cache_file is not None:
        as_path(cache_file, "cache_file")
    if lora_config.init_lora_weights != "lora_ga" or lora_config.lora_ga_config is None:
        raise PeftValueError(
            "If you want to use LoRA-GA, make the config with `init_lora_weights='lora_ga'` and a "
            f"`LoraGAConfig`; found {lora_config.init_lora_weights!r}."
        )
    layers = linear_targets(model, lora_config)
    if packed := [path for path, layer in layers.items() if is_quantized(layer)]:
        raise PeftValueError(
            f"LoRA-GA needs gradients of full precision, and {listed(packed)} are "
            "quantized; use another `init_lora_weights`."
        )
    gradients = read_cache(cache_file)
    if gradients is None:
        gradients = {
            f"{path}.{GRADIENT}": gradient
            for path, gradient in _mean_gradients(model, layers, train_step).items()
        }
        if cache_file is not None:
            write_cache(cache_file, gradients)
    elif missing := [path for path in layers if f"{path}.{GRADIENT}" not in gradients]:
        raise CheckpointError(
            f"'{cache_file}' has no gradient of {listed(missing)}; it was made for another "
            "model or other targets."
        )
    for path, layer in layers.items():
        if f"{path}.{GRADIENT}" in gradients:
            setattr(layer, GRADIENT, gradients[f"{path}.{GRADIENT}"])


def _mean_gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], train_step: Callable[[], object]
) -> dict[str, Tensor]:
    """Return the gradient of each weight, divided by the number of backward passes through it."""
    weights = {path: layer.get_parameter("weight") for path, layer in layers.items()}
    counts = dict.fromkeys(weights, 0)

    def count(path: str, weight: Tensor) -> None:
        counts[path] += 1

    with in_mode(model, training=True), _only_trainable(model, list(weights.values())):
        handles = [
            weight.register_post_accumulate_grad_hook(partial(count, path))
            for path, weight in weights.items()
        ]
        try:
            with torch.enable_grad():
                train_step()
        finally:
            for handle in handles:
                handle.remove()
        gradients = {
            path: weight.grad.detach() / counts[path]
            for path, weight in weights.items()
            if counts[path] and weight.grad is not None
        }
    if not gradients:
        raise PeftValueError(
            "`train_step` computed no gradient of a targeted weight; it has to call `backward` on "
            "a loss of this model, and must not set the gradients to None at its end."
        )
    if missing := [path for path in weights if path not in gradients]:
        warn(f"No gradient reached {listed(missing)}; they start as usual.")
    return gradients


@contextmanager
def _only_trainable(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Context in which only some parameters get gradients; afterwards all have their own again."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    chosen = {id(weight) for weight in weights}
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in chosen)
            parameter.grad = None
        yield
    finally:
        for parameter, trained, gradient in before:
            parameter.requires_grad_(trained)
            parameter.grad = gradient
