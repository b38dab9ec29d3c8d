# SPDX-License-Identifier: Apache-2.0
"""Poly: a shared inventory of low-rank skills, mixed for each task or input. Source: arXiv:2202.13914, arXiv:2211.03831"""

from ...utils.peft_types import register_peft_method
from .collator import TaskCollator
from .config import PolyConfig
from .conversion import PolyConversion, convert_to_poly, save_as_poly
from .labels import TaskLabels
from .layer import Linear, PolyLayer
from .losses import recorded_routing, routing_loss
from .methods import PolyMethods
from .model import PolyModel
from .regimes import REGIMES
from .report import RoutingReport, routing_report
from .sampling import TaskSampler, metrics_by_task
from .watching import RoutingWatch, routing_callback

__all__ = [
    "REGIMES",
    "Linear",
    "PolyConfig",
    "PolyConversion",
    "PolyLayer",
    "PolyMethods",
    "PolyModel",
    "RoutingReport",
    "RoutingWatch",
    "TaskCollator",
    "TaskLabels",
    "TaskSampler",
    "convert_to_poly",
    "metrics_by_task",
    "recorded_routing",
    "routing_callback",
    "routing_loss",
    "routing_report",
    "save_as_poly",
]

register_peft_method(name="poly", config_cls=PolyConfig, model_cls=PolyModel, is_mixed_compatible=True)
