# SPDX-License-Identifier: Apache-2.0
"""Poly: a shared inventory of low-rank skills, mixed for each task or input. Source:
arXiv:2202.13914, arXiv:2211.03831
"""

import typing as _typing

from ...base.registry import register_peft_method
from ...core.model_methods import forwarded as _forwarded
from ...core.model_methods import methods_of as _methods_of
from .analysis.losses import recorded_routing, routing_loss
from .analysis.report import RoutingReport, routing_report
from .analysis.watching import RoutingWatch, routing_callback
from .conversion import PolyConversion, convert_to_poly, save_as_poly
from .data.collator import TaskCollator
from .data.labels import TaskLabels
from .data.metrics import metrics_by_task
from .data.sampler import TaskSampler
from .layer import Linear, PolyLayer
from .model import PolyModel
from .regimes import REGIMES

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


@_methods_of(PolyModel)
class PolyMethods:
    """Methods that a model with Poly adapters has in addition to those of every `PeftModel`."""

    add_tasks = _forwarded(PolyModel.add_tasks)
    remove_tasks = _forwarded(PolyModel.remove_tasks)
    reorder_tasks = _forwarded(PolyModel.reorder_tasks)
    add_skills = _forwarded(PolyModel.add_skills)
    get_router_weights = _forwarded(PolyModel.get_router_weights)
    set_router_weights = _forwarded(PolyModel.set_router_weights)
    train_only = _forwarded(PolyModel.train_only)
    begin_regime = _forwarded(PolyModel.begin_regime)
    fit_task = _forwarded(PolyModel.fit_task)
    average_skills = _forwarded(PolyModel.average_skills)
    extract_tasks = _forwarded(PolyModel.extract_tasks)

    # Type checkers see `PeftModel.merge_adapter`, whose options include `task_id`.
    if not _typing.TYPE_CHECKING:
        merge_adapter = _forwarded(PolyModel.merge_adapter)


if _typing.TYPE_CHECKING:
    # The class of models that `get_peft_model` makes of a config, as type checkers see it.
    from ...peft_model import PeftModel as _PeftModel
    from .config import PolyConfig as _PolyConfig

    class PolyPeftModel(PolyMethods, _PeftModel):
        """A model with Poly adapters."""

    class PolyConfig(_PolyConfig):
        """A config that shows type checkers the class of its models."""

        def adapts_as(self) -> PolyPeftModel:
            """Return a model with an adapter of this config."""
            raise NotImplementedError

else:
    from .config import PolyConfig

register_peft_method(
    name="poly", config_cls=PolyConfig, model_cls=PolyModel, is_mixed_compatible=True
)
