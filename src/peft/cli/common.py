# SPDX-License-Identifier: Apache-2.0
"""Options, checks and output that commands share."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import wraps
from pathlib import Path, PurePath
from typing import Protocol, TypedDict, TypeVar, cast

import click
import torch
from torch import nn

from ..base.errors import PeftValueError
from ..base.plain_values import JsonObject
from ..base.registry import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType, lookup, registered_methods
from ..base_models import meta_model
from ..checkpoint.files import CONFIG_NAME, read_json
from ..config import PeftConfig

F = TypeVar("F", bound=Callable[..., object])

# A path of the file system or an id on the Hub: completed as a file, checked by the functions.
PLACE = click.Path(path_type=str)


class Report(Protocol):
    """A result that prints as a table and has values for JSON."""

    def to_dict(self) -> JsonObject:
        """Return the result as values of JSON."""


def shared_options(command: F) -> F:
    """Add the options that every command has; what libraries print goes to the standard error."""

    @wraps(command)
    def run(*args: object, **options: object) -> object:
        click.get_current_context().obj = sys.stdout
        with redirect_stdout(sys.stderr):
            return command(*args, **options)

    result = click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        help="Show where in the code an error comes from.",
    )(cast("F", run))
    return click.option(
        "--json", "as_json", is_flag=True, help="Print JSON, and nothing else, to standard output."
    )(result)


def force_option(command: F) -> F:
    """Add the option that allows to replace the output."""
    text = "Replace the output if it exists."
    return click.option("--force", is_flag=True, help=text)(command)


def adapter_options(command: F) -> F:
    """Add the options that describe an adapter to be made."""
    options = (
        click.option(
            "--config",
            "config_place",
            type=PLACE,
            help="Take the config of this adapter (a folder, a file or an id on the Hub).",
        ),
        click.option(
            "--method",
            type=click.Choice([name.lower() for name in registered_methods()]),
            help="Or make a config of this method.",
        ),
        click.option("--rank", "-r", type=int, help="Rank of the adapter."),
        click.option(
            "--target",
            "targets",
            multiple=True,
            help="Name of modules to adapt, or all-linear; may be repeated. "
            "By default those that are usual for the model.",
        ),
        click.option(
            "--set",
            "fields",
            multiple=True,
            metavar="FIELD=VALUE",
            help="Another field of the config, its value as in JSON; may be repeated.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


class AdapterOptions(TypedDict):
    """The values of `adapter_options`."""

    config_place: str | None
    method: str | None
    rank: int | None
    targets: tuple[str, ...]
    fields: tuple[str, ...]


def config_of_options(options: AdapterOptions) -> PeftConfig:
    """Return the config that `adapter_options` describe."""
    config_place, method = options["config_place"], options["method"]
    if (config_place is None) == (method is None):
        raise click.UsageError("Pass `--config` or `--method`, one of them.")
    changes: JsonObject = dict(map(_field, options["fields"]))
    names = [name for target in options["targets"] for name in target.split(",") if name]
    if options["rank"] is not None:
        changes["r"] = options["rank"]
    if names:
        changes["target_modules"] = "all-linear" if names == ["all-linear"] else names
    if method is not None:
        return lookup(PEFT_TYPE_TO_CONFIG_MAPPING, method.upper())(**changes)
    assert config_place is not None
    if os.path.isfile(config_place):
        config = PeftConfig.from_file_fields(read_json(Path(config_place)), changes)
    else:
        config = PeftConfig.from_pretrained(config_place, **changes)
    config.inference_mode = False
    return config


def _field(text: str) -> tuple[str, object]:
    """Return a field of a config and its value from an argument."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise click.UsageError(f"`--set {text}`: write it as FIELD=VALUE.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def model_options(command: F) -> F:
    """Add the options that name a base model, whose weights are not read."""
    text = "The base model's folder or config.json, for adapters that do not tell all of its sizes."
    for option in (
        click.option("--subfolder", help="Folder of `--model` in a pipeline, as transformer."),
        click.option("--model", type=PLACE, help=text),
    ):
        command = option(command)
    return command


def host_of(model: str | None, subfolder: str | None, as_json: bool) -> nn.Module | None:
    """Return the base model of `model_options` without weights, None if none was named."""
    if model is None:
        return None
    with quiet_libraries(as_json):
        return meta_model(model, subfolder=subfolder)


def dtype_option(command: F) -> F:
    """Add the option for a dtype."""
    names = ["float32", "float16", "bfloat16"]
    text = "Dtype of the output, by default that of the source."
    return click.option("--dtype", type=click.Choice(names), help=text)(command)


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the dtype that `dtype_option` names."""
    return None if name is None else getattr(torch, name)


def rank_of(text: str | None) -> int | float | None:
    """Return a rank, or a share of the energy, from an argument."""
    if text is None:
        return None
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise click.UsageError(
            f"`--rank {text}`: write a whole number, or the share of the energy to keep, as 0.95."
        ) from None


def check_task(config: PeftConfig, tasks: Sequence[str]) -> None:
    """Check that `--task` is given for an adapter with several tasks, and for no other."""
    number = getattr(config, "n_tasks", 1)
    if not tasks and number > 1:
        names = getattr(config, "task_names", None) or [f"0 to {number - 1}"]
        raise click.UsageError(f"Pass `--task`: the adapter has {number}: {', '.join(names)}.")
    if tasks and not hasattr(config, "n_tasks") and not hasattr(config, "experts"):
        method = PeftType(config.peft_type).value
        raise click.UsageError(f"`--task` is for adapters with tasks; this one is {method}.")


def task_of(
    tasks: Iterable[str], configs: Iterable[PeftConfig]
) -> int | str | dict[int | str, float] | None:
    """Return `task_id` from arguments: a name or number, or several with their shares.

    An argument that is the name of a task in one of the `configs` is that task, whatever it looks
    like: a number, or a name with a share.
    """
    names = {name for own in configs for name in getattr(own, "task_names", None) or ()}
    given = [(task, "", "") if task in names else _with_share(task) for task in tasks]
    if not given:
        return None
    if len(given) == 1 and not given[0][1]:
        return _task(given[0][0], names)
    shares: dict[int | str, float] = {}
    for name, sign, share in given:
        try:
            shares[_task(name, names)] = float(share) if sign else 1 / len(given)
        except ValueError:
            raise click.UsageError(
                f"`--task {name}={share}`: write the share of a task as a number."
            ) from None
    return shares


def _with_share(text: str) -> tuple[str, str, str]:
    """Return the name, the sign and the share in TASK=SHARE; the last two are empty without one."""
    name, sign, share = text.rpartition("=")
    return (name, sign, share) if sign else (text, "", "")


def _task(name: str, names: Collection[str]) -> int | str:
    return int(name) if name.isdigit() and name not in names else name


def check_output(
    output: str, force: bool, sources: Iterable[str], sign: str | None = CONFIG_NAME
) -> None:
    """Raise if something is in the place of the output and may not be replaced.

    A folder may be replaced if it has the file `sign`; without a sign its files stay.
    """
    path = Path(output)
    taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if any(os.path.exists(source) and _is_same(path, Path(source)) for source in sources):
        raise PeftValueError(f"'{output}' is also a source; choose another name for the output.")
    if taken and not force:
        raise PeftValueError(f"'{output}' exists already; `--force` replaces it.")
    if path.is_dir() and taken and sign is not None and not (path / sign).is_file():
        raise PeftValueError(f"'{output}' is a folder without '{sign}', and is not replaced.")


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)


def named_sources(sources: Sequence[str]) -> dict[str, str]:
    """Return adapters by the name of their folder, or by all of the path where names are alike.

    Names of adapters on a model have no dots.
    """
    ends = [PurePath(source).name or source for source in sources]
    names = [
        end if ends.count(end) == 1 else source for end, source in zip(ends, sources, strict=True)
    ]
    names = [name.replace(".", "_") for name in names]
    if len(set(names)) < len(names):
        raise PeftValueError(f"The sources {', '.join(sources)} have one name; rename a folder.")
    return dict(zip(names, sources, strict=True))


@contextmanager
def quiet_lora() -> Iterator[None]:
    """Context without the warning that an adapter is of the wanted method already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a PEFT adapter", UserWarning)
        yield


def show(report: Report, as_json: bool) -> None:
    """Print a report, as a table or as JSON, to the standard output of the command."""
    text = json.dumps(report.to_dict(), indent=1) if as_json else str(report)
    click.echo(text, file=click.get_current_context().obj)


@dataclass
class Result:
    """A result in both forms."""

    content: JsonObject
    text: str

    def to_dict(self) -> JsonObject:
        """Return the values for JSON."""
        return self.content

    def __str__(self) -> str:
        return self.text


@contextmanager
def quiet_libraries(as_json: bool) -> Iterator[None]:
    """Context in which transformers logs errors alone, and shows bars only to someone watching."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if as_json or not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
