# SPDX-License-Identifier: Apache-2.0
"""Helpers that client libraries import, at their documented place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..base.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..base.modules import (
    _get_submodules,
    check_model,
    get_submodules,
    infer_device,
    model_type,
    shift_tokens_right,
)
from ..base.placeholders import placeholder
from ..base.tensors import (
    cast_mixed_precision_params,
    id_tensor_storage,
    transpose,
)
from ..core.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from ..core.trainable_tokens import TrainableTokensWrapper
from ..integrations.distributed import fsdp_auto_wrap_policy
from ..integrations.kbit import prepare_model_for_kbit_training

# Names of the interface that this package does not implement, as placeholders.
_get_module_names_tied_with_embedding: type
_get_no_split_modules: type

if not TYPE_CHECKING:

    def __getattr__(name: str) -> type:
        return placeholder(name, __name__)


__all__ = [
    "CONFIG_NAME",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "_get_submodules",
    "cast_mixed_precision_params",
    "check_model",
    "fsdp_auto_wrap_policy",
    "get_submodules",
    "id_tensor_storage",
    "infer_device",
    "model_type",
    "prepare_model_for_kbit_training",
    "shift_tokens_right",
    "transpose",
]
