# SPDX-License-Identifier: Apache-2.0
"""LoKr's methods on the model that `get_peft_model` returns.

The mixin makes them attributes of the model's class, with signature and docstring, so that type
checkers, completion and `help` know them.
"""

from __future__ import annotations

from ...core.model_methods import forwarded, methods_of
from .model import LoKrModel


@methods_of(LoKrModel)
class LoKrMethods:
    """Methods that a model with LoKr adapters has in addition to those of every `PeftModel`."""

    clip_weight_norms = forwarded(LoKrModel.clip_weight_norms)
