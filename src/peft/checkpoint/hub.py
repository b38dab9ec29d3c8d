# SPDX-License-Identifier: Apache-2.0
"""Finding a checkpoint's files, in a local folder or on the Hugging Face Hub."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from ..base.errors import CheckpointNotFoundError, warn
from .paths import check_path

HUB_OPTIONS = frozenset(
    {
        "cache_dir",
        "force_download",
        "local_files_only",
        "repo_type",
        "revision",
        "subfolder",
        "token",
        "user_agent",
    }
)
# Options that once steered downloads and no longer have an effect in huggingface_hub; callers still
# pass them.
_OBSOLETE = frozenset(
    {
        "proxies",
        "resume_download",
        "use_auth_token",
        "etag_timeout",
        "_commit_hash",
        "adapter_kwargs",
    }
)
# Options for loading the base model, which callers pass on to the adapter, where they have no
# effect.
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
    """Accept options for saving that have no effect on adapters; those that nobody knows are named
    in a warning.
    """
    if unknown := sorted(options.keys() - _FOR_SAVING):
        warn(
            f"{caller} got unexpected keyword arguments: {', '.join(unknown)}; they have no effect."
        )


def split_hub_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into (options for the Hub, the rest)."""
    hub = {key: value for key, value in options.items() if key in HUB_OPTIONS and value is not None}
    if options.get("use_auth_token") is not None:
        hub.setdefault("token", options["use_auth_token"])
    rest = {
        key: value
        for key, value in options.items()
        if key not in HUB_OPTIONS and key not in _OBSOLETE
    }
    return hub, rest


def only_hub_options(options: dict[str, Any], caller: str) -> dict[str, Any]:
    """The options for the Hub; those that nobody knows are named in a warning and passed over."""
    hub, rest = split_hub_options(options)
    if unknown := sorted(rest.keys() - _FOR_THE_BASE):
        warn(
            f"{caller} got unexpected keyword arguments: {', '.join(unknown)}; they have no effect."
        )
    return hub


def local_folder(source: str | os.PathLike, subfolder: str | None = None) -> Path | None:
    """The folder `source` (and its `subfolder`) if it exists on this machine, else None.

    Raises:
        PeftTypeError, PeftValueError: As `check_path`.
    """
    check_path(source)
    folder = Path(source)
    if not folder.is_dir():
        return None
    return folder / subfolder if subfolder else folder


def find_file(
    source: str | os.PathLike, names: tuple[str, ...], hub_options: dict[str, Any]
) -> Path:
    """The path of the first of `names` that `source` holds, downloaded if `source` is a Hub id.

    The Hub is asked only for what can be the name of a repository and does not look like a folder's
    path; a misspelt folder is an error at once.

    Raises:
        CheckpointNotFoundError: None of the files is there, or the Hub could not be reached.
        PeftTypeError, PeftValueError: As `check_path`.
    """
    options = dict(hub_options)
    wanted = f"Can't find {' or '.join(map(repr, names))}"
    folder = local_folder(source, options.get("subfolder"))
    if folder is not None:
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise CheckpointNotFoundError(f"{wanted} in the folder '{folder}'{_hint(folder, names)}.")
    if Path(source).is_file():
        raise CheckpointNotFoundError(
            f"{wanted} in '{source}', which is a file; give the path of the folder that it is in."
        )
    text = os.fspath(source)
    if isinstance(source, os.PathLike) or _is_path(text):
        raise CheckpointNotFoundError(
            f"{wanted}: there is no folder '{text}'{_near(Path(source))}."
        )
    meant = options.keys() & {"revision", "repo_type", "token", "cache_dir", "force_download"}
    on_disk = (
        Path(text).parent.is_dir() and not meant
    )  # "a/b" where there is a folder "a", and single names
    try:
        return _download(text, names, {**options, "local_files_only": True} if on_disk else options)
    except OSError as error:
        if on_disk:
            raise CheckpointNotFoundError(
                f"{wanted}: there is no folder '{text}'{_near(Path(text))}. The Hub was not asked, "
                "since this looks like a path; "
                "its repositories are named 'owner/name'. If it is one, pass `revision='main'`."
            ) from None
        raise CheckpointNotFoundError(
            f"{wanted} at '{text}': it is neither a local folder that exists nor a model "
            "repository that could be read "
            f"({type(error).__name__}: {error})."
        ) from error


def _download(repository: str, names: tuple[str, ...], options: dict[str, Any]) -> Path:
    """The first of some files of a repository on the Hub, or in its local cache.

    Raises:
        OSError: There is none, or the Hub could not be reached; it is asked once then, whatever the
            number of names.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    problem: Exception = FileNotFoundError(repository)
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, **options))
        except (
            LocalEntryNotFoundError
        ) as error:  # the Hub is away: what is in the cache is all there is
            problem, options = error, {**options, "local_files_only": True}
        except EntryNotFoundError as error:
            problem = error
        except (HFValidationError, OSError, ValueError) as error:
            problem = error
            break
    if isinstance(problem, OSError):
        raise problem
    raise FileNotFoundError(str(problem)) from problem


def _is_path(text: str) -> bool:
    """Whether a string can be nothing but a folder's path: no repository has such a name."""
    return (
        os.path.isabs(text)
        or text.startswith((".", "~"))
        or "\\" in text
        or text.count("/") > 1
        or text.endswith("/")
    )


def _near(path: Path) -> str:
    """What there is in place of a folder that is missing, as a continuation of a sentence."""
    if path.parts[:1] == ("~",):
        return f" (`~` is not replaced; did you mean '{path.expanduser()}'?)"
    missing = path
    while not missing.parent.is_dir() and missing != missing.parent:
        missing = missing.parent
    try:
        there = sorted(
            entry.name
            for entry in missing.parent.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
    except OSError:
        return ""
    near = [
        str(missing.parent / name)
        for name in difflib.get_close_matches(missing.name, there, n=3, cutoff=0.6)
    ]
    if near:
        return f" (did you mean {' or '.join(map(repr, near))}?)"
    return f" ('{missing.parent}' has no '{missing.name}')" if missing != path else ""


def _hint(folder: Path, names: tuple[str, ...]) -> str:
    """Where else wanted files are, as a continuation of a sentence."""
    if not folder.is_dir():
        return f", which does not exist{_near(folder)}"
    within = sorted({path.parent.name for name in names for path in folder.glob(f"*/{name}")})
    return (
        f"; its sub-folders {', '.join(map(repr, within[:4]))} have one (`subfolder=…`)"
        if within
        else ""
    )
