# SPDX-License-Identifier: Apache-2.0
"""Steps of loading a saved adapter: read, check against the finished but not yet placed adapter, fill."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from .config import PeftConfig
from .tuners._build import Build
from .utils.adapter_files import CONFIG_NAME
from .utils.error import PeftNotSupportedError, PeftValueError
from .utils.hub import local_folder
from .utils.patterns import written
from .utils.save_and_load import (
    MODEL_ROOT,
    ROOT,
    LoadResult,
    adapter_tensors,
    check_complete,
    check_state,
    import_state,
    in_view,
    write_state,
)
from .utils.walk import named_tensors, walk


def refuse_offload(ephemeral_gpu_offload: bool) -> None:
    if ephemeral_gpu_offload:
        raise PeftNotSupportedError("`ephemeral_gpu_offload` is not supported; leave the default, False.")


def read_config(model_id: str | os.PathLike, config: PeftConfig | None, kwargs: dict[str, Any]) -> PeftConfig:
    if config is None:
        return PeftConfig.from_pretrained(model_id, **kwargs)
    if not isinstance(config, PeftConfig):
        raise PeftValueError(f"The input config must be a PeftConfig, got {type(config)}; `PeftConfig.from_pretrained` reads one.")
    return config


def own_place(model_id: str | os.PathLike, adapter_name: str, hub_options: dict[str, Any]) -> dict[str, Any]:
    """Options that find the values of an adapter the model has: in the sub-folder of its name, where `save_pretrained` puts them,
    rather than beside it. Trainers name the whole folder.
    """
    folder = local_folder(model_id, adapter_name)
    if folder is None or adapter_name == "default" or "subfolder" in hub_options or not (folder / CONFIG_NAME).is_file():
        return hub_options
    return {**hub_options, "subfolder": adapter_name}


def check_same_function(known: PeftConfig, saved: PeftConfig) -> None:
    """Insist that a checkpoint's tensors mean in an adapter what they meant to their writer.

    Raises:
        PeftValueError: The configs differ in a field that is part of what is computed; it is named.
    """
    # What a config says besides: whom it is for, which modules, how training starts and goes, how it is saved.
    besides = {field.name for field in fields(PeftConfig)} | {"bias", "fan_in_fan_out", "task_names"}
    besides |= {field.name for field in fields(known) if field.metadata.get("besides")}
    words = ["dropout", "modules", "layers_", "save_"]
    if not any(getattr(config, "starts_from_weight", False) for config in (known, saved)):
        words.append("init_")  # else the start is part of what is computed
    names = [f.name for f in fields(known) if f.name not in besides and not any(word in f.name for word in words)]
    pairs = {n: (getattr(saved, n), getattr(known, n)) for n in names}
    pairs |= {n: (written(pair[0]), written(pair[1])) for n, pair in pairs.items() if n in known.patterns}
    differing = [f"`{n}`={theirs!r}, the adapter has {own!r}" for n, (theirs, own) in pairs.items() if theirs != own]
    if differing:
        raise PeftValueError(f"The checkpoint has {'; '.join(differing)}; load it under a new name.")


def renamings(model: nn.Module) -> dict[str, str]:
    """How transformers renamed the modules of a model between versions, for checkpoints written before."""
    return dict(getattr(model, "_checkpoint_conversion_mapping", None) or {})


def filler(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    state: Mapping[str, Tensor],
    source: str,
    ignore_mismatched_sizes: bool = False,
) -> Callable[[Build], None]:
    """A function that checks a checkpoint against a finished adapter and fills it, before the adapter is put in. With
    `ignore_mismatched_sizes` tensors of other shapes than the checkpoint's keep the values they have.
    """

    def fill(build: Build) -> None:
        named = {}
        for name, tensor in build.named_tensors():
            named[(ROOT if name.partition(".")[0] in build.shared else MODEL_ROOT) + name] = tensor
        incoming = import_state(state, config)
        expected = adapter_tensors(named.items(), config, adapter_name)
        if config.trained_biases != "none" or not incoming.keys() <= expected.keys():  # trained biases and saved embeddings
            view = in_view(config)
            inside = {**dict.fromkeys(build.layers, ".base_layer"), **dict.fromkeys(build.tokens, ".token_adapter.base_layer")}
            for name, tensor in named_tensors(walk(model, view), view):
                path, _, end = name.rpartition(".")
                named[MODEL_ROOT + (f"{path}{inside[path]}.{end}" if path in inside else name)] = tensor
            expected = adapter_tensors(named.items(), config, adapter_name, incoming)
        result = check_state(expected, incoming, ignore_mismatched_sizes)
        mismatched = set(result.missing_keys) & incoming.keys()
        check_complete(LoadResult([k for k in result.missing_keys if k not in mismatched], result.unexpected_keys), source)
        write_state(None, expected, {key: tensor for key, tensor in incoming.items() if key not in mismatched})

    return fill
