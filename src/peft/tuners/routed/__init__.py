# SPDX-License-Identifier: Apache-2.0
"""Routing over experts: many saved adapters in one model that chooses among them. Source:
arXiv:2405.11157, arXiv:2402.05859
"""

from ...base.registry import register_peft_method
from .arrow import ArrowConfig, create_arrow_model
from .composition import WeightFit
from .config import RoutedConfig
from .entrance import get_routed_model
from .layer import Linear, RoutedLayer
from .model import RoutedMethods, RoutedModel
from .report import ExpertReport, ExpertWatch

__all__ = [
    "ArrowConfig",
    "ExpertReport",
    "ExpertWatch",
    "Linear",
    "RoutedConfig",
    "RoutedLayer",
    "RoutedMethods",
    "RoutedModel",
    "WeightFit",
    "create_arrow_model",
    "get_routed_model",
]

register_peft_method(
    name="routed", config_cls=RoutedConfig, model_cls=RoutedModel, is_mixed_compatible=True
)
