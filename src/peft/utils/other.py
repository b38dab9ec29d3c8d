# SPDX-License-Identifier: Apache-2.0
"""Helpers that client libraries import, at their documented place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from ..base.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..base.modules import _get_submodules, infer_device, shift_tokens_right
from ..base.patterns import matches_path
from ..base.placeholders import placeholders
from ..base.tensors import cast_mixed_precision_params, id_tensor_storage, transpose
from ..core.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from ..core.trainable_tokens import TrainableTokensWrapper
from ..integrations.kbit import prepare_model_for_int8_training, prepare_model_for_kbit_training
from ..integrations.wrapping import fsdp_auto_wrap_policy
from ..integrations.wrapping import unsplit_classes as _get_no_split_modules

# Names of the interface that this package does not implement, as placeholders.
_get_batch_size: type
_get_module_names_tied_with_embedding: type
_set_adapter: type
_set_trainable: type
create_attention_mask: type
get_gptqmodel_quant_linear: type
is_gptqmodel_quant_linear: type
set_additional_trainable_modules: type

if not TYPE_CHECKING:
    __getattr__ = placeholders(__name__)


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """Return the first key of `rank_pattern` or `alpha_pattern` that matches a module's path, else
    the path.

    Example:
        >>> get_pattern_key(["q_proj", "mlp.*"], "layers.0.q_proj")
        'q_proj'
        >>> get_pattern_key(["mlp.*"], "layers.0.q_proj")
        'layers.0.q_proj'
    """
    return next((key for key in pattern_keys if matches_path(key, key_to_match)), key_to_match)


def get_quantization_config(model: nn.Module, method: str) -> object:
    """Return the quantization config of a transformers model that is quantized by a method ("gptq",
    "awq", …), else None.
    """
    if getattr(model, "quantization_method", None) != method:
        return None
    return getattr(getattr(model, "config", None), "quantization_config", None)


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freeze an adapter's parameters."""
    for name, parameter in model.named_parameters():
        if adapter_name in name.split("."):
            parameter.requires_grad_(False)


__all__ = [
    "CONFIG_NAME", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME", "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper", "TrainableTokensWrapper", "_freeze_adapter", "_get_no_split_modules",
    "_get_submodules", "cast_mixed_precision_params", "fsdp_auto_wrap_policy", "get_pattern_key",
    "get_quantization_config", "id_tensor_storage", "infer_device",
    "prepare_model_for_int8_training", "prepare_model_for_kbit_training", "shift_tokens_right",
    "transpose",
]  # fmt: skip
