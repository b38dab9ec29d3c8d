# SPDX-License-Identifier: Apache-2.0
"""Saving and loading of adapters' state dicts, at its documented place."""

from typing import TYPE_CHECKING

from ..base.placeholders import placeholders
from ..checkpoint.hub import load_peft_weights
from ..checkpoint.state_dict import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)

__all__ = [
    "get_base_model_state_dict", "get_peft_model_state_dict", "load_peft_weights",
    "set_base_model_state_dict", "set_peft_model_state_dict",
]  # fmt: skip

if not TYPE_CHECKING:  # names of the interface that are elsewhere here, or not provided
    __getattr__ = placeholders(__name__)
