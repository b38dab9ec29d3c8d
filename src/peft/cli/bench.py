# SPDX-License-Identifier: Apache-2.0
"""`peft bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..base_models import load_base_model
from ..timing import example_inputs, time_adapter
from .common import (
    PLACE,
    AdapterOptions,
    adapter_options,
    config_of_options,
    dtype_of,
    dtype_option,
    quiet_libraries,
    shared_options,
    show,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


@click.command()
@click.argument("model", type=PLACE)
@adapter_options
@click.option("--task", "task_type", help="Measure the model for this task, as CAUSAL_LM.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Samples.")
@click.option(
    "--length", type=click.IntRange(1), default=128, show_default=True, help="Tokens of a sample."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=10, show_default=True, help="Steps of each kind."
)
@click.option("--train", is_flag=True, help="Measure forward and backward too.")
@click.option("--random", is_flag=True, help="Draw weights at random; only the config is read.")
@click.option("--device", default="cpu", show_default=True, help="As cuda.")
@dtype_option
@shared_options
def bench(
    model: str,
    task_type: str | None,
    batch: int,
    length: int,
    rounds: int,
    train: bool,
    random: bool,
    device: str,
    dtype: str | None,
    as_json: bool,
    **adapter: Unpack[AdapterOptions],
) -> None:
    """Measure a step with and without an adapter.

    MODEL is a folder, or an id on the Hub; with `--random` its config.json is enough.
    """
    config = config_of_options(adapter)
    with quiet_libraries(as_json):
        base = load_base_model(model, task_type, dtype=dtype_of(dtype), random=random).to(device)
        inputs = example_inputs(base, batch, length)
        tasks = getattr(config, "n_tasks", 1)
        more = {"task_ids": [i % tasks for i in range(batch)]} if tasks > 1 else None
        times = time_adapter(
            base, config, inputs, rounds=rounds, training=train, adapter_inputs=more
        )
    show(times, as_json)
