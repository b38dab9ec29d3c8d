# SPDX-License-Identifier: Apache-2.0
"""`peft extract`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from ..standalone import load_standalone
from ..tuners.lora import save_as_lora, save_tasks_as_lora
from .common import (
    PLACE,
    check_output,
    check_task,
    force_option,
    host_of,
    model_options,
    named_sources,
    quiet_lora,
    rank_of,
    shared_options,
    show,
    task_of,
)
from .results import Written, WrittenTasks


@click.command()
@click.argument("sources", type=PLACE, nargs=-1, required=True)
@click.argument("output", type=PLACE)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="TASK[=SHARE]",
    help="A task by name or number, or several with their shares; may be repeated. All of it is "
    "the name if there is a task of that name.",
)
@click.option(
    "--all-tasks", is_flag=True, help="Write each task to a folder of its name in OUTPUT."
)
@click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    help="Weight of each source, in their order; by default equal ones with the sum 1.",
)
@click.option("--rank", help="Rank, or share of the energy to keep as 0.95; exact by default.")
@click.option(
    "--heads", help="Modules that several sources train in full: mean, or a source's name."
)
@model_options
@force_option
@shared_options
def extract(
    sources: Sequence[str],
    output: str,
    tasks: Sequence[str],
    all_tasks: bool,
    weights: Sequence[float],
    rank: str | None,
    heads: str | None,
    model: str | None,
    subfolder: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write a task or a blend as one LoRA adapter.

    SOURCES are adapters of any methods; no base model is needed.

    \b
    peft extract poly rte-lora --task rte
    peft extract poly blend --task rte=0.3 --task cola=0.7
    peft extract style sketch both --weight 1 --weight 0.5 --rank 16
    """  # noqa: D301
    if len(sources) == 1:
        _check_one(weights, tasks, all_tasks)
    elif all_tasks or (weights and len(weights) != len(sources)):
        raise click.UsageError("Pass one `--weight` for each source, and `--all-tasks` for one.")
    check_output(output, force, sources, *([None] if all_tasks else []))
    number = rank_of(rank)
    loaded = load_standalone(named_sources(sources), model=host_of(model, subfolder, as_json))
    names = list(loaded.peft_config)
    if all_tasks:
        show(WrittenTasks(output, save_tasks_as_lora(loaded, output, rank=number)), as_json)
        return
    if len(names) == 1:
        check_task(loaded.peft_config[names[0]], tasks)
    own = list(weights) or [1 / len(names)] * len(names)
    chosen = names[0] if len(names) == 1 else dict(zip(names, own, strict=True))
    with quiet_lora():
        task = task_of(tasks, loaded.peft_config.values())
        converted = save_as_lora(output, loaded, number, chosen, task_id=task, heads=heads)
    show(Written(output, converted.errors, converted.error), as_json)


def _check_one(weights: Sequence[float], tasks: Sequence[str], all_tasks: bool) -> None:
    """Check the options for a single source."""
    if weights:
        raise click.UsageError("`--weight` is for several sources; `--task` has shares of its own.")
    if all_tasks and tasks:
        raise click.UsageError("Pass `--task` or `--all-tasks`, one of them.")
