# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA's methods on the model that `get_peft_model` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.model_methods import forwarded, methods_of
from .model import VBLoRAModel

if TYPE_CHECKING:
    from ...peft_model import PeftModel


@methods_of(VBLoRAModel)
class VBLoRAMethods:
    """Methods that a model with VB-LoRA adapters has beside those of every `PeftModel`."""

    get_nb_savable_parameters = forwarded(VBLoRAModel.get_nb_savable_parameters)
    print_savable_parameters = forwarded(VBLoRAModel.print_savable_parameters)


if TYPE_CHECKING:

    class VBLoRAPeftModel(VBLoRAMethods, PeftModel):
        """A model with VB-LoRA adapters, as type checkers see it."""
