# SPDX-License-Identifier: Apache-2.0
"""Steps of loading a saved adapter: read, check against the finished but not yet placed adapter,
fill.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ..base.containers import named_tensors, walk
from ..base.errors import PeftNotSupportedError, PeftTypeError, PeftValueError, warn
from ..base.modules import check_model
from ..base.patterns import format_patterns
from ..base.registry import PEFT_TYPE_TO_TUNER_MAPPING, lookup
from ..checkpoint.checks import LoadResult, check_complete, check_state
from ..checkpoint.files import CONFIG_NAME
from ..checkpoint.hub import local_folder
from ..checkpoint.keys import (
    MODEL_ROOT,
    ROOT,
    adapter_tensors,
    checkpoint_key,
    container_names,
    in_view,
)
from ..checkpoint.paths import check_path
from ..checkpoint.values import some, warn_of_values
from ..checkpoint.writing import import_state, write_state
from ..config import PeftConfig
from ..integrations.distributed import unwrapped_name
from .injection import Build


def refuse_offload(ephemeral_gpu_offload: bool) -> None:
    """Raise if loading is asked to pass through a GPU."""
    if ephemeral_gpu_offload:
        raise PeftNotSupportedError(
            "`ephemeral_gpu_offload` is not supported; leave the default, False."
        )


def check_arguments(model: Any, model_id: Any) -> None:
    """Insist on a model, and on a path that comes after it.

    Raises:
        PeftTypeError: They are something else, or the other way round.
        PeftValueError: The path is empty.
    """
    if isinstance(model_id, nn.Module) and not isinstance(model, nn.Module):
        raise PeftTypeError(
            "The model comes first, then the adapter's folder: `from_pretrained(model, folder)`."
        )
    check_model(model)
    check_path(model_id)


def read_config(
    model_id: str | os.PathLike, config: PeftConfig | None, kwargs: dict[str, Any]
) -> PeftConfig:
    """Return the config that a caller gave, or the one in an adapter's folder."""
    if config is None:
        return PeftConfig.from_pretrained(model_id, **kwargs)
    if not isinstance(config, PeftConfig):
        raise PeftValueError(
            f"The input config must be a PeftConfig, got {type(config)}; "
            "`PeftConfig.from_pretrained` reads one."
        )
    return config


def own_place(
    model_id: str | os.PathLike, adapter_name: str, hub_options: dict[str, Any]
) -> dict[str, Any]:
    """Options that find the values of an adapter the model has: in the sub-folder of its name,
    where `save_pretrained` puts them, rather than beside it. Trainers name the whole folder.
    """
    folder = local_folder(model_id, adapter_name)
    if (
        folder is None
        or adapter_name == "default"
        or "subfolder" in hub_options
        or not (folder / CONFIG_NAME).is_file()
    ):
        return hub_options
    return {**hub_options, "subfolder": adapter_name}


def check_same_function(known: PeftConfig, saved: PeftConfig) -> None:
    """Insist that a checkpoint's tensors mean in an adapter what they meant to their writer.

    Raises:
        PeftValueError: The configs differ in a field that is part of what is computed; it is named.
    """
    # What a config says besides: whom it is for, which modules, how training starts and goes, how
    # it is saved.
    besides = {f.name for f in fields(PeftConfig)} | {"bias", "fan_in_fan_out", "task_names"}
    besides |= {f.name for f in fields(known) if f.metadata.get("besides")}
    words = ["dropout", "modules", "layers_", "save_"]
    if not any(getattr(config, "starts_from_weight", False) for config in (known, saved)):
        words.append("init_")  # else the start is part of what is computed
    names = [
        f.name
        for f in fields(known)
        if f.name not in besides and not any(word in f.name for word in words)
    ]
    pairs = {n: (getattr(saved, n), getattr(known, n)) for n in names}
    pairs |= {
        n: (format_patterns(pair[0]), format_patterns(pair[1]))
        for n, pair in pairs.items()
        if n in known.patterns
    }
    differing = [
        f"`{n}`={theirs!r}, the adapter has {own!r}"
        for n, (theirs, own) in pairs.items()
        if theirs != own
    ]
    if differing:
        raise PeftValueError(
            f"The checkpoint has {'; '.join(differing)}; load it under a new name."
        )


def renamings(model: nn.Module) -> dict[str, str]:
    """How transformers renamed the modules of a model between versions, for checkpoints written
    before.
    """
    return dict(getattr(model, "_checkpoint_conversion_mapping", None) or {})


@dataclass
class Filler:
    """Checks a checkpoint against a finished adapter and fills it, before the adapter is put in.

    Args:
        model: The base model.
        config: The adapter's config.
        adapter_name: Its name.
        state: The checkpoint's tensors.
        source: Where they are from, for messages.
        ignore_mismatched_sizes: Leave tensors of other shapes than the checkpoint's as they are.
        strict: Insist on all of the adapter's tensors and no other.

    Attributes:
        result: Afterwards, what the checkpoint lacked, by name in the model, and what of it had no
            place.
    """

    model: nn.Module
    config: PeftConfig
    adapter_name: str
    state: Mapping[str, Tensor]
    source: str
    ignore_mismatched_sizes: bool = False
    strict: bool = True
    result: LoadResult = field(default_factory=lambda: LoadResult([], []))

    def __call__(self, build: Build) -> None:
        """Fill an adapter.

        Raises:
            CheckpointError: The checkpoint does not fit.
        """
        config, adapter_name = self.config, self.adapter_name
        named = {}
        for name, tensor in build.named_tensors():
            named[(ROOT if name.partition(".")[0] in build.shared else MODEL_ROOT) + name] = tensor
        expected = adapter_tensors(named.items(), config, adapter_name)
        incoming = import_state(
            self.state if self.strict else understood(self.state, expected, config, adapter_name),
            config,
        )
        if (
            config.trained_biases != "none" or not incoming.keys() <= expected.keys()
        ):  # trained biases and saved embeddings
            view = in_view(config)
            inside = {
                **dict.fromkeys(build.layers, ".base_layer"),
                **dict.fromkeys(build.tokens, ".token_adapter.base_layer"),
            }
            for name, tensor in named_tensors(walk(self.model, view), view):
                path, _, end = name.rpartition(".")
                named[MODEL_ROOT + (f"{path}{inside[path]}.{end}" if path in inside else name)] = (
                    tensor
                )
            expected = adapter_tensors(named.items(), config, adapter_name, incoming)
        found = fitting(expected, incoming, self.source, self.ignore_mismatched_sizes, self.strict)
        names = adapter_tensors(((name, name) for name in named), config, adapter_name, incoming)
        self.result = LoadResult(
            [names.get(key, key) for key in found.missing_keys], found.unexpected_keys
        )
        fits = expected.keys() & incoming.keys() - set(found.missing_keys)
        values = {key: tensor for key, tensor in incoming.items() if key in fits}
        warn_of_values(
            f"'{self.source}'",
            values,
            expected,
            lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type).masked_names,
        )
        write_state(None, expected, values)


def fitting(
    expected: Mapping[str, Tensor],
    incoming: Mapping[str, Tensor],
    source: str,
    ignore_mismatched_sizes: bool,
    strict: bool,
) -> LoadResult:
    """What of an adapter is not in a checkpoint, or has another shape there and that is to be
    ignored; and what else is in it.

    Raises:
        CheckpointError: A shape or kind differs, or with `strict` a key, or no key fits.
    """
    result = check_state(expected, incoming, ignore_mismatched_sizes)
    missing = [key for key in result.missing_keys if key not in incoming]
    fits = bool(expected.keys() & incoming.keys())
    if strict or not fits:
        remedy = "Pass `strict=False` to load the rest." if fits else ""
        remedy = (
            remedy
            if strict
            else "No key fits, so `strict=False` has nothing to load; `key_mapping` renames modules in keys."
        )
        check_complete(LoadResult(missing, result.unexpected_keys), source, remedy)
    elif missing or result.unexpected_keys:
        left = [f"Missing, and left as they were: {some(missing)}."] * bool(missing)
        left += [
            f"In the file, and without a place in the adapter: {some(result.unexpected_keys)}."
        ] * bool(result.unexpected_keys)
        warn(f"'{source}' was loaded with `strict=False`. {' '.join(left)}")
    return result


def understood(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    config: PeftConfig,
    adapter_name: str,
) -> dict[str, Tensor]:
    """A checkpoint with the names of a model's own tensors, in which an adapter's name stands, put
    as keys of a checkpoint: of the adapter `adapter_name`, else of "default", else of the only one
    there.
    """
    named: dict[str, dict[str, str]] = {}
    containers = {*container_names(config), "modules_to_save"}
    shared = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type).shared_parameter_names
    for key in state:
        name = unwrapped_name(key)
        parts = name.split(".")
        for part, after in pairwise(parts):
            if (
                part in containers
                and (plain := checkpoint_key(name, after, containers, shared)) in expected
            ):
                named.setdefault(after, {})[key] = plain  # type: ignore[assignment]
    chosen = next((name for name in (adapter_name, "default") if name in named), None)
    if chosen is None and len(named) == 1:
        chosen = next(iter(named))
    keys = named.get(chosen or "", {})
    return {keys.get(key, key): tensor for key, tensor in state.items()}
