# SPDX-License-Identifier: Apache-2.0
"""LoKr's methods on the model that `get_peft_model` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.model_methods import forwarded, methods_of
from .model import LoKrModel

if TYPE_CHECKING:
    from ...peft_model import PeftModel


@methods_of(LoKrModel)
class LoKrMethods:
    """Methods that a model with LoKr adapters has beside those of every `PeftModel`."""

    clip_weight_norms = forwarded(LoKrModel.clip_weight_norms)


if TYPE_CHECKING:

    class LoKrPeftModel(LoKrMethods, PeftModel):
        """A model with LoKr adapters, as type checkers see it."""
