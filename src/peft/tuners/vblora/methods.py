# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA's methods on the model that `get_peft_model` returns.

The mixin makes them attributes of the model's class, with signature and docstring, so that type
checkers, completion and `help` know them.
"""

from __future__ import annotations

from ...core.model_methods import forwarded, methods_of
from .model import VBLoRAModel


@methods_of(VBLoRAModel)
class VBLoRAMethods:
    """Methods that a model with VB-LoRA adapters has in addition to those of every `PeftModel`."""

    get_nb_savable_parameters = forwarded(VBLoRAModel.get_nb_savable_parameters)
    print_savable_parameters = forwarded(VBLoRAModel.print_savable_parameters)
