# SPDX-License-Identifier: Apache-2.0
"""Saving and loading of adapters' state dicts, at its documented place."""

from typing import TYPE_CHECKING

from ..base.constants import MODEL_ROOT, ROOT
from ..base.placeholders import placeholders
from ..checkpoint.checks import LoadResult, check_complete, check_state
from ..checkpoint.hub import load_peft_weights
from ..checkpoint.keys import (
    adapter_config,
    adapter_tensors,
    checkpoint_key,
    companion_tensors,
    in_view,
    is_embedding,
)
from ..checkpoint.keys import container_names as holders
from ..checkpoint.state_dict import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    import_state,
    set_base_model_state_dict,
    set_peft_model_state_dict,
    unmerged,
    write_state,
)

__all__ = [
    "MODEL_ROOT", "ROOT", "LoadResult", "adapter_config", "adapter_tensors", "check_complete",
    "check_state", "checkpoint_key", "companion_tensors", "get_base_model_state_dict",
    "get_peft_model_state_dict", "holders", "import_state", "in_view", "is_embedding",
    "load_peft_weights", "set_base_model_state_dict", "set_peft_model_state_dict", "unmerged",
    "write_state",
]  # fmt: skip

if not TYPE_CHECKING:  # names of the interface that are elsewhere here, or not provided
    __getattr__ = placeholders(__name__)
