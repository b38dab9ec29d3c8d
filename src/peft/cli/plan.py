# SPDX-License-Identifier: Apache-2.0
"""`peft plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..base_models import meta_model
from ..planning import plan as plan_adapter
from .common import (
    PLACE,
    AdapterOptions,
    adapter_options,
    config_of_options,
    quiet_libraries,
    shared_options,
    show,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


@click.command()
@click.argument("model", type=PLACE)
@adapter_options
@click.option("--task", "task_type", help="Plan for the model of this task, as CAUSAL_LM.")
@click.option("--subfolder", help="Folder of the model in a pipeline, as transformer.")
@shared_options
def plan(
    model: str,
    task_type: str | None,
    subfolder: str | None,
    as_json: bool,
    **adapter: Unpack[AdapterOptions],
) -> None:
    """Show an adapter before it is made.

    MODEL is a folder with a config.json, that file, or an id on the Hub. No weights are read. The
    table has modules, parameters, FLOPs and ranks.
    """
    config = config_of_options(adapter)
    with quiet_libraries(as_json):
        show(plan_adapter(meta_model(model, task_type, subfolder=subfolder), config), as_json)
