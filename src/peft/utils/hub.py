# SPDX-License-Identifier: Apache-2.0
"""Finding a checkpoint's files, in a local folder or on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .error import CheckpointNotFoundError
from .warning import warn

HUB_OPTIONS = frozenset(
    {"cache_dir", "force_download", "local_files_only", "repo_type", "revision", "subfolder", "token", "user_agent"}
)
# Options that once steered downloads and no longer have an effect in huggingface_hub; callers still pass them.
_OBSOLETE = frozenset({"proxies", "resume_download", "use_auth_token", "etag_timeout", "_commit_hash", "adapter_kwargs"})
# Options for loading the base model, which callers pass on to the adapter, where they have no effect.
_FOR_THE_BASE = frozenset(
    [
        "attn_implementation",
        "config",
        "device_map",
        "dtype",
        "ignore_mismatched_sizes",
        "load_in_4bit",
        "load_in_8bit",
        "low_cpu_mem_usage",
        "max_memory",
        "offload_buffers",
        "offload_dir",
        "offload_folder",
        "offload_index",
        "offload_state_dict",
        "quantization_config",
        "torch_device",
        "torch_dtype",
        "trust_remote_code",
        "use_flash_attention_2",
        "use_safetensors",
        "variant",
        "weights_only",
    ]
)

# Options for saving a whole model, which callers pass on when they save its adapter.
_FOR_SAVING = frozenset(
    [
        "max_shard_size",
        "push_to_hub",
        "repo_id",
        "save_function",
        "save_peft_format",
        "tags",
        "token",
        "use_auth_token",
        "use_temp_dir",
        "variant",
    ]
)


def pass_over(options: dict[str, Any], caller: str) -> None:
    """Accept options for saving that have no effect on adapters; those that nobody knows are named in a warning."""
    if unknown := sorted(options.keys() - _FOR_SAVING):
        warn(f"{caller} got unexpected keyword arguments: {', '.join(unknown)}; they have no effect.")


def split_hub_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into (options for the Hub, the rest)."""
    hub = {key: value for key, value in options.items() if key in HUB_OPTIONS and value is not None}
    if options.get("use_auth_token") is not None:
        hub.setdefault("token", options["use_auth_token"])
    rest = {key: value for key, value in options.items() if key not in HUB_OPTIONS and key not in _OBSOLETE}
    return hub, rest


def only_hub_options(options: dict[str, Any], caller: str) -> dict[str, Any]:
    """The options for the Hub; those that nobody knows are named in a warning and passed over."""
    hub, rest = split_hub_options(options)
    if unknown := sorted(rest.keys() - _FOR_THE_BASE):
        warn(f"{caller} got unexpected keyword arguments: {', '.join(unknown)}; they have no effect.")
    return hub


def local_folder(source: str | os.PathLike, subfolder: str | None = None) -> Path | None:
    """The folder `source` (and its `subfolder`) if it exists on this machine, else None."""
    folder = Path(source)
    if not folder.is_dir():
        return None
    return folder / subfolder if subfolder else folder


def find_file(source: str | os.PathLike, names: tuple[str, ...], hub_options: dict[str, Any]) -> Path:
    """The path of the first of `names` that `source` holds, downloaded if `source` is a Hub id.

    Raises:
        CheckpointNotFoundError: None of the files is there, or the Hub could not be reached.
    """
    options = dict(hub_options)
    folder = local_folder(source, options.get("subfolder"))
    if folder is not None:
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise CheckpointNotFoundError(f"Can't find {' or '.join(map(repr, names))} in the folder '{folder}'.")
    problem: Exception | None = None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    for name in names:
        try:
            return Path(hf_hub_download(str(source), name, **options))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            problem = error
    raise CheckpointNotFoundError(
        f"Can't find {' or '.join(map(repr, names))} at '{source}': it is neither a local folder that exists nor a model "
        f"repository that could be read ({type(problem).__name__}: {problem})."
    ) from problem
