# SPDX-License-Identifier: Apache-2.0
"""`peft convert`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import click
import torch
from torch import nn

from ..base.errors import PeftNotSupportedError
from ..base.registry import PeftType
from ..core.low_rank_deltas import SavedAdapter
from ..peft_model import PeftModel
from ..standalone import load_standalone
from ..tuners.lokr.files import LAYOUTS, read_lokr_adapter, save_lokr_file
from ..tuners.lora import convert_to_lora
from ..tuners.poly import convert_to_poly
from .common import (
    PLACE,
    check_output,
    dtype_of,
    dtype_option,
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
from .results import Written


@click.command()
@click.argument("sources", type=PLACE, nargs=-1, required=True)
@click.argument("output", type=PLACE)
@click.option(
    "--to",
    "target",
    type=click.Choice(["lora", "poly", "folder", *LAYOUTS]),
    required=True,
    help="A method; `folder` for the folder that `save_pretrained` writes; "
    "or the program that is to read a LoKr file.",
)
@click.option("--rank", help="Rank, or share of the energy to keep as 0.95; exact by default.")
@click.option("--task", "tasks", multiple=True, help="For an adapter with tasks: name or number.")
@click.option(
    "--own-weight",
    type=float,
    default=1.0,
    show_default=True,
    help="For `--to poly`: each task's weight of its own skill.",
)
@click.option("--heads", help="For `--to poly`: how to combine modules trained in full.")
@model_options
@click.option("--component", help="Prefix of the modules in a LoKr file, as lora_unet.")
@click.option(
    "--original-names",
    is_flag=True,
    help="Name modules in a LoKr file as the original Stable Diffusion or Flux does.",
)
@dtype_option
@force_option
@shared_options
def convert(
    sources: Sequence[str],
    output: str,
    target: str,
    rank: str | None,
    tasks: Sequence[str],
    own_weight: float,
    heads: str | None,
    model: str | None,
    subfolder: str | None,
    component: str | None,
    original_names: bool,
    dtype: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Convert an adapter to another method or layout.

    \b
    peft convert adapter as-lora --to lora --rank 16      any method to LoRA
    peft convert a b c tasks --to poly                    adapters to one Poly adapter
    peft convert lokr style.safetensors --to kohya        a LoKr folder to a file
    peft convert style.safetensors lokr --to folder       a LoKr file to a folder

    No base model is needed, but for files whose names of modules are ambiguous, and for
    convolutions with flattened factors: pass its config as `--model`.
    """  # noqa: D301
    if len(sources) > 1 and target != "poly":
        raise click.UsageError(f"`--to {target}` takes one source.")
    check_output(output, force, sources)
    number = rank_of(rank)
    make_host = partial(host_of, model, subfolder, as_json)
    adapters = {
        name: _opened(source, make_host, component)
        for name, source in named_sources(sources).items()
    }
    if target == "folder":
        one = load_standalone(next(iter(adapters.values())), model=make_host())
        _save(one, output, dtype_of(dtype))
        return show(Written(output), as_json)
    loaded = load_standalone(adapters, model=make_host())
    names, task = list(loaded.peft_config), task_of(tasks, loaded.peft_config.values())
    result = Written(output)
    if target == "poly":
        made = convert_to_poly(
            loaded,
            names,
            cast("int | None", number),
            own_weight,
            task_id=cast("int | str | None", task),
            heads=heads,
        )
        result.errors, result.error = made.errors, max(made.errors.values())
        _save(load_standalone(made), output, dtype_of(dtype))
    elif target == "lora":
        with quiet_lora():
            converted = convert_to_lora(loaded, number, names[0], task_id=task)
        result.errors, result.error = converted.errors, converted.error
        _save(load_standalone(converted), output, dtype_of(dtype))
    else:
        _check_lokr(loaded, sources[0], target)
        save_lokr_file(
            loaded,
            output,
            target,
            names[0],
            component,
            original_names=original_names,
            dtype=dtype_of(dtype),
        )
    return show(result, as_json)


def _opened(
    source: str, make_host: Callable[[], nn.Module | None], component: str | None
) -> SavedAdapter:
    """Return an adapter's place, or the adapter in a file of another program."""
    if not os.path.isfile(source):
        return source
    return read_lokr_adapter(source, make_host(), component)


def _check_lokr(model: PeftModel, source: str, target: str) -> None:
    """Raise for an adapter of another method, of which there are no files for other programs."""
    method = PeftType(model.active_peft_config.peft_type)
    if method is not PeftType.LOKR:
        raise PeftNotSupportedError(
            f"'{source}' is a {method.value} adapter, and `--to {target}` writes files of LoKr "
            "only; `--to folder` and `--to lora` write folders."
        )


def _save(model: PeftModel, output: str, dtype: torch.dtype | None) -> None:
    """Write the adapter of a model without base model to a folder."""
    (model if dtype is None else model.to(dtype)).save_pretrained(output)
