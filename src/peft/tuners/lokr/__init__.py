# SPDX-License-Identifier: Apache-2.0
"""LoKr: low-rank Kronecker products, `ΔW = (alpha / r) · (W1 ⊗ W2)`.

Source: arXiv:2309.14859
"""

import typing as _typing

from ...base.registry import register_peft_method
from .files.loading import inspect_lokr_file, load_lokr_file
from .files.lycoris_settings import lokr_config_from_lycoris
from .files.writing import save_lokr_file
from .layer import Conv1d, Conv2d, Conv3d, Linear, LoKrLayer
from .model import LoKrMethods, LoKrModel

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Linear",
    "LoKrConfig",
    "LoKrLayer",
    "LoKrMethods",
    "LoKrModel",
    "inspect_lokr_file",
    "load_lokr_file",
    "lokr_config_from_lycoris",
    "save_lokr_file",
]

if _typing.TYPE_CHECKING:
    # The class of models that `get_peft_model` makes of a config, as type checkers see it.
    from ...peft_model import PeftModel as _PeftModel
    from .config import LoKrConfig as _LoKrConfig

    class LoKrPeftModel(LoKrMethods, _PeftModel):
        """A model with LoKr adapters."""

    class LoKrConfig(_LoKrConfig):
        """A config that shows type checkers the class of its models."""

        def adapts_as(self) -> LoKrPeftModel:
            """Return a model with an adapter of this config."""
            raise NotImplementedError

else:
    from .config import LoKrConfig

register_peft_method(
    name="lokr", config_cls=LoKrConfig, model_cls=LoKrModel, is_mixed_compatible=True
)
