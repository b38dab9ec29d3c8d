# SPDX-License-Identifier: Apache-2.0
"""`peft merge`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from ..base_models import save_merged
from ..config import PeftConfig
from .common import (
    PLACE,
    Result,
    check_output,
    check_task,
    dtype_of,
    dtype_option,
    force_option,
    quiet_libraries,
    shared_options,
    show,
    task_of,
)


@click.command()
@click.argument("adapter", type=PLACE)
@click.argument("output", type=PLACE)
@click.option("--base", type=PLACE, help="The base model, by default the one the adapter names.")
@click.option("--task", "tasks", multiple=True, help="For an adapter with tasks: name or number.")
@click.option("--subfolder", help="Folder of the base model in a pipeline, as transformer.")
@dtype_option
@force_option
@shared_options
def merge(
    adapter: str,
    output: str,
    base: str | None,
    tasks: Sequence[str],
    subfolder: str | None,
    dtype: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write a model with an adapter merged into it.

    The folder OUTPUT has the weights as safetensors, and the other files of the base model, such as
    the tokenizer. It appears when it is complete. `--task a=0.3 --task b=0.7` merges a blend.
    """
    check_output(output, force, [adapter, base or ""], "config.json")
    config = PeftConfig.from_pretrained(adapter)
    check_task(config, tasks)
    if base is None and config.base_model_name_or_path is None:
        raise click.UsageError("Pass `--base`: the adapter does not name its base model.")
    task = task_of(tasks, [config])
    options = {} if task is None else {"task_id": task}
    with quiet_libraries(as_json):
        save_merged(
            output,
            adapter,
            base,
            dtype=dtype_of(dtype),
            replace_existing=force,
            subfolder=subfolder,
            **options,
        )
    show(Result({"output": output}, f"Wrote the merged model to {output}"), as_json)
