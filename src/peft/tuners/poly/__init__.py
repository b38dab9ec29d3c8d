# SPDX-License-Identifier: Apache-2.0
"""Poly: a shared inventory of low-rank skills, mixed for each task or input. Source: arXiv:2202.13914, arXiv:2211.03831"""

from ...utils.peft_types import register_peft_method
from .collator import TaskCollator
from .config import PolyConfig
from .layer import Linear, PolyLayer
from .model import PolyModel
from .regimes import REGIMES

__all__ = ["REGIMES", "Linear", "PolyConfig", "PolyLayer", "PolyModel", "TaskCollator"]

register_peft_method(name="poly", config_cls=PolyConfig, model_cls=PolyModel, is_mixed_compatible=True)
