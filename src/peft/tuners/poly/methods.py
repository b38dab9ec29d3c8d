# SPDX-License-Identifier: Apache-2.0
"""Poly's methods on the model that `get_peft_model` returns.

The mixin makes them attributes of the model's class, with signature and docstring, so that type
checkers, completion and `help` know them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.model_methods import forwarded, methods_of
from .model import PolyModel


@methods_of(PolyModel)
class PolyMethods:
    """Methods that a model with Poly adapters has in addition to those of every `PeftModel`."""

    add_tasks = forwarded(PolyModel.add_tasks)
    remove_tasks = forwarded(PolyModel.remove_tasks)
    reorder_tasks = forwarded(PolyModel.reorder_tasks)
    add_skills = forwarded(PolyModel.add_skills)
    get_router_weights = forwarded(PolyModel.get_router_weights)
    set_router_weights = forwarded(PolyModel.set_router_weights)
    train_only = forwarded(PolyModel.train_only)
    begin_regime = forwarded(PolyModel.begin_regime)
    fit_task = forwarded(PolyModel.fit_task)
    average_skills = forwarded(PolyModel.average_skills)
    extract_tasks = forwarded(PolyModel.extract_tasks)

    if (
        not TYPE_CHECKING
    ):  # who see the options of `PeftModel.merge_adapter`, of which `task_id` is one
        merge_adapter = forwarded(PolyModel.merge_adapter)
