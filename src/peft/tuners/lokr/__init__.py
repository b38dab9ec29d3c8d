# SPDX-License-Identifier: Apache-2.0
"""LoKr: low-rank Kronecker products, `ΔW = (alpha / r) · (W1 ⊗ W2)`. Source: arXiv:2309.14859"""

from ...base.registry import register_peft_method
from .config import LoKrConfig
from .files import inspect_lokr_file, load_lokr_file, lokr_config_from_lycoris, save_lokr_file
from .layer import Conv1d, Conv2d, Conv3d, Linear, LoKrLayer
from .methods import LoKrMethods
from .model import LoKrModel

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

register_peft_method(
    name="lokr", config_cls=LoKrConfig, model_cls=LoKrModel, is_mixed_compatible=True
)
