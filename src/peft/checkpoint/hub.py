# SPDX-License-Identifier: Apache-2.0
"""Find and read the files of a checkpoint in a local folder or on the Hugging Face Hub."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..base.constants import MODEL_ROOT, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_FILES
from ..base.errors import CheckpointError, CheckpointNotFoundError, PeftValueError, warn
from .files import read_weights
from .paths import as_path, check_path

T = TypeVar("T")
# Keyword arguments of huggingface_hub by name.
HubOptions: TypeAlias = dict[str, Any]
HUB_OPTIONS = frozenset({
    "cache_dir", "force_download", "local_files_only", "repo_type", "revision", "subfolder",
    "token", "user_agent",
})  # fmt: skip
# Options of earlier versions of huggingface_hub, which callers still pass. They have no effect.
_OBSOLETE = frozenset({
    "_commit_hash", "adapter_kwargs", "etag_timeout", "proxies", "resume_download",
    "use_auth_token",
})  # fmt: skip
# Options for loading the base model, which callers pass on to the adapter. They have no effect.
_FOR_BASE_MODEL = frozenset({
    "attn_implementation", "config", "device_map", "dtype", "ignore_mismatched_sizes",
    "load_in_4bit", "load_in_8bit", "low_cpu_mem_usage", "max_memory", "offload_buffers",
    "offload_dir", "offload_folder", "offload_index", "offload_state_dict", "quantization_config",
    "torch_device", "torch_dtype", "trust_remote_code", "use_flash_attention_2", "use_safetensors",
    "variant", "weights_only",
})  # fmt: skip
# Options for saving a whole model, which callers pass on to the adapter. They have no effect.
_FOR_SAVING = frozenset({
    "max_shard_size", "push_to_hub", "repo_id", "save_function", "save_peft_format", "tags",
    "token", "use_auth_token", "use_temp_dir", "variant",
})  # fmt: skip


def pass_over(options: Mapping[str, object], caller: str) -> None:
    """Ignore options for saving a whole model; a warning names unknown ones."""
    _warn_of_unknown(options.keys() - _FOR_SAVING, caller)


def split_hub_options(options: Mapping[str, T]) -> tuple[HubOptions, dict[str, T]]:
    """Split keyword arguments into options for the Hub and others; obsolete ones are dropped."""
    hub: HubOptions = {
        key: value for key, value in options.items() if key in HUB_OPTIONS and value is not None
    }
    if options.get("use_auth_token") is not None:
        hub.setdefault("token", options["use_auth_token"])
    as_path(hub.get("subfolder", ""), "subfolder")
    dropped = HUB_OPTIONS | _OBSOLETE
    return hub, {key: value for key, value in options.items() if key not in dropped}


def only_hub_options(options: Mapping[str, object], caller: str) -> HubOptions:
    """Return the options for the Hub without those for the base model; warn of unknown ones."""
    hub, rest = split_hub_options(options)
    _warn_of_unknown(rest.keys() - _FOR_BASE_MODEL, caller)
    return hub


def _warn_of_unknown(options: set[str], caller: str) -> None:
    if options:
        listed = ", ".join(sorted(options))
        warn(f"{caller} got unexpected keyword arguments: {listed}; they have no effect.")


def load_peft_weights(
    model_id: str | os.PathLike,
    device: str | int | torch.device | None = None,
    key_mapping: dict[str, str] | None = None,
    **hub_options: object,
) -> dict[str, Tensor]:
    """Return the tensors of a saved adapter.

    Args:
        model_id: A local folder, or an id on the Hub.
        device: Device of the tensors, by default the CPU.
        key_mapping: Replacement by regular expression, for the module paths in keys. The first that
            matches is applied.
        **hub_options: `subfolder`, `revision`, `token`, `cache_dir`, …

    Raises:
        CheckpointNotFoundError: There is no weights file.
        CheckpointError: It can't be read.
        PeftValueError: `device` is not a device that can hold the tensors.
    """
    options = only_hub_options(hub_options, "load_peft_weights")
    there = torch.device("meta")
    try:
        there = torch.empty(0, device="cpu" if device is None else device).device
    except (RuntimeError, TypeError, ValueError, AssertionError):
        pass  # the last where torch has no CUDA
    if there.type == "meta":
        raise PeftValueError(
            f"{device!r} is not a device with tensors here: pass 'cpu', 'cuda', 'cuda:1', …"
        )
    path = find_file(model_id, WEIGHTS_FILES, options)
    return with_mapped_keys(read_weights(path, there), key_mapping or {})


def with_mapped_keys(
    state: Mapping[str, Tensor], key_mapping: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return tensors under their keys after the first replacement that matches each."""
    return {_mapped(key, key_mapping): tensor for key, tensor in state.items()}


def _mapped(key: str, key_mapping: Mapping[str, str]) -> str:
    """Return a key after the first replacement that matches its module path."""
    prefix = MODEL_ROOT if key.startswith(MODEL_ROOT) else ""
    path = key.removeprefix(prefix)
    for pattern, replacement in key_mapping.items():
        renamed, count = re.subn(pattern, replacement, path)
        if count:
            return prefix + renamed
    return key


def local_folder(source: str | os.PathLike, subfolder: str | None = None) -> Path | None:
    """Return the folder `source` or its `subfolder` if `source` is a local folder, else None."""
    check_path(source)
    folder = Path(source)
    if not folder.is_dir():
        return None
    return folder / subfolder if subfolder else folder


def of_one_save(source: str | os.PathLike, subfolder: str | None, read: Callable[[], T]) -> T:
    """Return what `read` returns for the files in `source`; read again if another process has
    replaced them meanwhile, since config and weights are two files.

    Raises:
        CheckpointError: The files are replaced again and again.
    """
    folder = local_folder(source, subfolder)
    if folder is None:  # the Hub's files are those of one commit
        return read()
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    for _ in range(100):
        before, failure = _identity(weights), None
        try:
            result = read()
        except Exception as error:
            failure = error
        if _identity(weights) != before:
            continue
        if failure is not None:
            raise failure
        return result
    raise CheckpointError(f"'{folder}' is written again and again; try it again later.")


def _identity(path: Path) -> tuple[int, ...]:
    """Return a file's inode, time and size, which change when it is replaced; () without a file."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def find_file(source: str | os.PathLike, names: tuple[str, ...], hub_options: HubOptions) -> Path:
    """Return the path of the first of `names` in `source`, downloaded if `source` is a Hub id.

    The Hub is not asked for what looks like a path, so a misspelt folder is an error at once.
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
    for_hub = options.keys() & {"revision", "repo_type", "token", "cache_dir", "force_download"}
    # A single name, or "a/b" beside an existing folder "a".
    is_likely_path = Path(text).parent.is_dir() and not for_hub
    if is_likely_path:
        options["local_files_only"] = True
    try:
        return _download(text, names, options)
    except OSError as error:
        if is_likely_path:
            raise CheckpointNotFoundError(
                f"{wanted}: there is no folder '{text}'{_near(Path(text))}. The Hub was not asked, "
                "since this looks like a path; its repositories are named 'owner/name'. If it is "
                "one, pass `revision='main'`."
            ) from None
        raise CheckpointNotFoundError(
            f"{wanted} at '{text}': it is neither a local folder that exists nor a model "
            f"repository that could be read ({type(error).__name__}: {error})."
        ) from error


def _download(repository: str, names: tuple[str, ...], options: HubOptions) -> Path:
    """Return the path of the first of `names` in a repository on the Hub or its local cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    problem: Exception = FileNotFoundError(repository)
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, **options))
        except LocalEntryNotFoundError as error:  # the Hub can't be reached
            problem, options = error, {**options, "local_files_only": True}
        except EntryNotFoundError as error:
            problem = error
        except ValueError as error:  # it is no name of a repository
            problem = error
            break
    if isinstance(problem, OSError):
        raise problem
    raise FileNotFoundError(str(problem)) from problem


def _is_path(text: str) -> bool:
    """Return True for a path that can't be the name of a repository."""
    return (
        os.path.isabs(text)
        or text.startswith((".", "~"))
        or "\\" in text
        or text.count("/") > 1
        or text.endswith("/")
    )


def _near(path: Path) -> str:
    """Return folders with names similar to that of a missing one, as the end of a sentence."""
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
    """Return other places of wanted files, as the end of a sentence."""
    if not folder.is_dir():
        return f", which does not exist{_near(folder)}"
    within = sorted({path.parent.name for name in names for path in folder.glob(f"*/{name}")})
    if not within:
        return ""
    return f"; its sub-folders {', '.join(map(repr, within[:4]))} have one (`subfolder=…`)"
