# SPDX-License-Identifier: Apache-2.0
"""The methods of a `PeftModel` that save its adapters, to a folder or to the Hub."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from ..base.calls.running import changing
from ..base.errors import PeftTypeError, PeftValueError
from ..base.progress import track
from ..base.suggestions import did_you_mean
from ..base.validation import check_adapter, check_flags
from ..checkpoint.files import folder_for, write_adapter
from ..checkpoint.hub import pass_over
from ..checkpoint.model_card import update_model_card
from ..checkpoint.paths import as_folder
from ..checkpoint.state_dict import get_peft_model_state_dict
from ..config import PeftConfig
from ..integrations.distributed import (
    check_alike,
    gathered_tensor,
    is_distributed,
    needs_all_processes,
)
from .adapted_model import AdaptedModel
from .skeleton import base_class_of, saved_targets

State = dict[str, Tensor]


def save_pretrained(
    self: Any,
    save_directory: str | os.PathLike[str],
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: str | bool = "auto",
    is_main_process: bool = True,
    path_initial_model_for_weight_conversion: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    **kwargs: object,
) -> None:
    """Write adapters to a folder: "default" into it, each other into a sub-folder of its name.

    If the process is killed, a reader sees each adapter complete, as it was before or as it is
    now.

    Args:
        save_directory: The folder, made if missing.
        safe_serialization: False writes the legacy pickle format.
        selected_adapters: Which adapters, by default all.
        save_embedding_layers: True writes the token embeddings too; "auto" if an adapter
            targets one.
        is_main_process: False writes nothing. Where tensors are DTensors (FSDP2), every process
            has to call, to gather them.
        path_initial_model_for_weight_conversion: Anything but None writes adapters that start
            from the base weight (LoRA's "pissa" and "olora") as plain ones of twice the rank,
            for the original weight. Nothing is read from the path.
        state_dict: Take the tensors from this state dict of the model (for example a gathered one).
        **kwargs: Options for saving whole models (`save_function`, `max_shard_size`, …), which
            have no effect.

    Raises:
        CheckpointError: `state_dict` has no tensors of an adapter.
        PeftRuntimeError: FSDP1 or ZeRO-3 hold the parameters elsewhere, and `state_dict` is not
            given.
        PeftTypeError: A switch is neither True nor False.
        PeftValueError: The path is a file, or an adapter is unknown.
    """
    check_flags(safe_serialization=safe_serialization, is_main_process=is_main_process)
    folder = as_folder(save_directory)
    pass_over(kwargs, "save_pretrained")
    plain = path_initial_model_for_weight_conversion is not None
    with changing(self):  # by no other thread meanwhile
        names = _adapters_to_save(selected_adapters, self.peft_config)
        # Where tensors are spread over processes, all have to call to gather them.
        if not is_main_process and not (
            needs_all_processes(self)
            if state_dict is None
            else any(is_distributed(tensor) for tensor in state_dict.values())
        ):
            return
        states = _gathered_states(
            self, self.base_model, names, state_dict, plain, save_embedding_layers
        )
        if is_main_process:
            _write_adapters(folder, self.base_model, states, safe_serialization)


def push_to_hub(
    self: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_description: str | None = None,
    **save_options: object,
) -> object:
    """Save the adapters to a repository on the Hub, made if missing.

    Args:
        repo_id: "user/name".
        commit_message: By default "Upload adapter".
        private: True makes a new repository private.
        token: Access token, by default the one stored by huggingface_hub.
        revision: Branch to write to.
        create_pr: Open a pull request in place of writing.
        commit_description: Further text for it.
        **save_options: As for `save_pretrained`.

    Returns:
        huggingface_hub's description of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        self.save_pretrained(folder, **save_options)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        message = commit_message or "Upload adapter"
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _adapters_to_save(selected: Sequence[str] | None, adapters: Collection[str]) -> list[str]:
    """Return the names of the adapters to save, by default all; raise for an unknown one."""
    if isinstance(selected, str):
        raise PeftTypeError(
            f"`selected_adapters`={selected!r} must be a list of names: [{selected!r}]."
        )
    names = list(adapters) if selected is None else list(selected)
    for name in names:
        check_adapter(name)
    if unknown := [name for name in names if name not in adapters]:
        raise PeftValueError(
            "You passed an invalid `selected_adapters` arguments, current supported adapter names "
            f"are {list(adapters)} - got {names}.{did_you_mean(str(unknown[0]), adapters)}"
        )
    if adapters and not names:
        raise PeftValueError(
            f"`selected_adapters`=[] names no adapter; leave it out for all: {list(adapters)}."
        )
    if not adapters:
        raise PeftValueError(
            "The model has no adapters to save: they were deleted, or removed by `unload` or "
            "`merge_and_unload`. Save the model that those return."
        )
    return names


def _gathered_states(
    model: nn.Module,
    tuner: AdaptedModel,
    names: Sequence[str],
    state_dict: Mapping[str, Tensor] | None,
    without_start: bool,
    save_embedding_layers: str | bool,
) -> dict[str, tuple[PeftConfig, State]]:
    """Return configs and gathered tensors of adapters; every process has to call.

    `without_start` turns adapters that start from the base weight into plain ones.
    """
    result = {}
    for name in names:
        method = tuner.method_of(tuner.peft_config[name])
        if without_start:
            result[name] = method.without_start(model, name)
        else:
            state = get_peft_model_state_dict(
                model, state_dict, name, save_embedding_layers=save_embedding_layers
            )
            result[name] = method.config_to_save(name), state
    tensors = [(f"{n} {key}", t) for n, (_, own) in result.items() for key, t in own.items()]
    if any(is_distributed(tensor) for _, tensor in tensors):
        check_alike([*tensors, *model.named_parameters()])
    return {
        name: (config, {key: gathered_tensor(tensor) for key, tensor in state.items()})
        for name, (config, state) in result.items()
    }


def _write_adapters(
    folder: Path,
    tuner: AdaptedModel,
    states: Mapping[str, tuple[PeftConfig, State]],
    safe_serialization: bool,
) -> None:
    """Write adapters: "default" into the folder, each other into a sub-folder of its name."""
    with folder_for(folder):
        for name, (config, state) in track(states.items(), "Saving", unit="adapter"):
            config, state = tuner.method_of(config).file_contents(name, config, state)
            text = _config_text(config, tuner.model)
            place = folder if name == "default" else folder / name
            write_adapter(place, state, text, safe_serialization)
        write_model_card(folder, tuner)


def write_model_card(folder: Path, tuner: AdaptedModel) -> None:
    """Write README.md, or update its metadata."""
    if tuner.peft_config:
        update_model_card(folder, next(iter(tuner.peft_config.values())), tuner.model)


def _config_text(config: PeftConfig, base: nn.Module) -> str:
    """Return the text of a config file: frozen, and with the class of the base model."""
    if own := saved_targets(base, config):
        config = replace(config, **own)
    inference_mode, config.inference_mode = config.inference_mode, True
    try:
        return config.to_json(base_class_of(base, config))
    finally:
        config.inference_mode = inference_mode
