# SPDX-License-Identifier: Apache-2.0
"""Preparation of quantized models for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..base.errors import PeftTypeError, warn
from ..base.modules import check_model, infer_device
from ..base.tensors import ordinary_tensors
from .checkpointing import require_input_gradients

# Quantization methods whose kernels take the other parameters in 16 bits.
_IN_16_BITS = ("aqlm", "eetq", "gptq", "hqq", "torchao")


@ordinary_tensors()
def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, object] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a quantized model and cast its unquantized parameters to float32, for stable training
    of adapters. Models of AQLM, EETQ, GPTQ, HQQ and torchao keep their dtypes.

    Args:
        model: A transformers model, changed in place.
        use_gradient_checkpointing: Also turn on gradient checkpointing of a quantized model, and
            let gradients flow through the frozen embeddings.
        gradient_checkpointing_kwargs: Arguments of `gradient_checkpointing_enable`.
        auto_clear_cache: Free the cached memory of the accelerator after the cast.

    Raises:
        PeftTypeError: `model` is not a model, or has no gradient checkpointing; nothing is changed.
    """
    check_model(model)
    method = getattr(model, "quantization_method", None)
    flags = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized")
    is_quantized = method is not None or any(getattr(model, flag, False) for flag in flags)
    use_gradient_checkpointing = use_gradient_checkpointing and is_quantized
    needed = ("enable_input_require_grads", "gradient_checkpointing_enable")
    if use_gradient_checkpointing and (
        absent := [name for name in needed if not hasattr(model, name)]
    ):
        raise PeftTypeError(
            f"{type(model).__name__} has no {', '.join(map('`{}`'.format, absent))}; pass "
            "`use_gradient_checkpointing=False`."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if (
            method not in _IN_16_BITS
            and parameter.dtype in (torch.float16, torch.bfloat16)
            and type(parameter).__name__ != "Params4bit"
        ):
            parameter.data = parameter.data.to(torch.float32)
    if auto_clear_cache and infer_device() != "cpu":
        getattr(torch, infer_device()).empty_cache()
    if use_gradient_checkpointing:
        given = gradient_checkpointing_kwargs
        checkpoint = getattr(model, needed[1])
        checkpoint(**({} if given is None else {"gradient_checkpointing_kwargs": given}))
        require_input_gradients(model)
    return model


def prepare_model_for_int8_training(
    model: nn.Module,
    output_embedding_layer_name: str = "lm_head",
    use_gradient_checkpointing: bool = True,
    layer_norm_names: Sequence[str] = ("layer_norm",),
) -> nn.Module:
    """Call `prepare_model_for_kbit_training`, the present name of this function.

    Args:
        output_embedding_layer_name, layer_norm_names: Accepted, without effect: parameters of all
            layers that are not quantized become float32.
    """
    warn(
        "`prepare_model_for_int8_training` is an old name; use `prepare_model_for_kbit_training`.",
        FutureWarning,
    )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing)
