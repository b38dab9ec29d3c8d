# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA: low-rank factors composed from the vectors of a bank. Source: arXiv:2405.15179."""

import typing as _typing

from ...base.registry import register_peft_method
from .layer import Linear, VBLoRALayer
from .model import VBLoRAMethods, VBLoRAModel
from .shared_bank import VectorBank
from .usage import BankUsage, bank_usage

__all__ = [
    "BankUsage",
    "Linear",
    "VBLoRAConfig",
    "VBLoRALayer",
    "VBLoRAMethods",
    "VBLoRAModel",
    "VectorBank",
    "bank_usage",
]

if _typing.TYPE_CHECKING:
    # The class of models that `get_peft_model` makes of a config, as type checkers see it.
    from ...peft_model import PeftModel as _PeftModel
    from .config import VBLoRAConfig as _VBLoRAConfig

    class VBLoRAPeftModel(VBLoRAMethods, _PeftModel):
        """A model with VB-LoRA adapters."""

    class VBLoRAConfig(_VBLoRAConfig):
        """A config that shows type checkers the class of its models."""

        def adapts_as(self) -> VBLoRAPeftModel:
            """Return a model with an adapter of this config."""
            raise NotImplementedError

else:
    from .config import VBLoRAConfig

register_peft_method(
    name="vblora", config_cls=VBLoRAConfig, model_cls=VBLoRAModel, is_mixed_compatible=True
)
