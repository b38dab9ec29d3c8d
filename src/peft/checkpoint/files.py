# SPDX-License-Identifier: Apache-2.0
"""The files of an adapter, `adapter_config.json` and `adapter_model.safetensors`, written and read
so that no reader sees a mixture of two versions.

Two files cannot be replaced in one step, so the weights file is the commit point. A save writes

1. the new config beside the old one, under a name made of the digests of both;
2. the new weights, with that digest in their metadata, in place of the old ones, by one rename;
3. the new config in place of the old one.

After each step the folder is synced, since a disk that loses power may keep renames in any order.

A reader takes the waiting config with the digest in the weights, if there is one and
`adapter_config.json` is still the config that it was to replace; else `adapter_config.json`. A save
that is killed at any moment therefore leaves the old adapter or the new one, and a config that is
edited by hand is read as edited. A save that raises leaves the folder as it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..base.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..base.errors import CheckpointError, CheckpointNotFoundError, CheckpointWriteError, PeftError
from ..base.plain_values import JsonObject, json_object
from .legacy_weights import load_pickle
from .paths import as_file, check_regular

_DIGEST = "adapter_config_sha256"
_NAP, _PATIENCE, _DAY = 0.1, 600.0, 86_400.0  # seconds
# What file systems say that can't sync, change modes, or replace a file by a rename.
_CANT_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EROFS, errno.ENOSYS)
_CANT_CHMOD = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
_CANT_RENAME = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV)


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Context that locks a folder, and is False where there are no locks.

    Raises:
        CheckpointWriteError: Another process has it for ten minutes.
    """
    handle = _lock(folder)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _lock(folder: Path) -> int | None:
    """Lock a folder, and return the handle to close; None where there are no locks."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    for _ in range(int(_PATIENCE / _NAP)):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            time.sleep(_NAP)
        except OSError:
            os.close(handle)
            return None
    os.close(handle)
    raise CheckpointWriteError(
        f"Another process has been writing to '{folder}' for ten minutes; nothing was changed. End "
        "it, or choose another folder."
    )


@contextmanager
def folder_for(folder: Path) -> Iterator[None]:
    """Context with a folder, made if missing; an error removes it again, unless it has files."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in made:
            sync_folder(path.parent)
        yield
    except BaseException as error:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError) and not isinstance(error, PeftError):
            raise write_error(f"'{folder}' can't be written to: {error}.", error) from error
        raise


def write_report(path: object, content: object) -> None:
    """Write JSON to a file in one step; its folder is made if missing."""
    file = as_file(path)
    with folder_for(file.parent), alone_in(file.parent) as is_alone:
        write_text(file, json.dumps(content, indent=1) + "\n")
        sweep(file.parent, ".adapter_*.tmp", is_alone)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    sync_folder(path.parent)


def write_config(folder: Path, text: str) -> None:
    """Write a config without weights, and delete configs that interrupted saves left."""
    with folder_for(folder), alone_in(folder) as is_alone:
        write_text(folder / CONFIG_NAME, text)
        sweep(folder, ".adapter_config.*.json", is_alone)


def write_adapter(
    folder: Path, state: Mapping[str, Tensor], config_text: str, safe_serialization: bool = True
) -> None:
    """Write an adapter's weights and config. Readers see the old adapter or the new one.

    Only the legacy pickle format (`safe_serialization=False`) replaces its files one by one.

    Raises:
        CheckpointError: A tensor is on the meta device; nothing is written.
    """
    tensors = writable(state)
    with folder_for(folder), alone_in(folder) as is_alone:
        _write_adapter(folder, tensors, config_text, safe_serialization)
        if safe_serialization:
            sweep(folder, ".adapter_*", is_alone)  # of saves that were killed


def write_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replace a safetensors file in one step; its folder is made if missing."""
    tensors, metadata = writable(state), {"format": "pt", **metadata}
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file in one step by what `write` puts into the temporary file that it is given."""
    # A save of an adapter into this folder deletes the temporary files it finds there.
    with folder_for(path.parent), alone_in(path.parent) as is_alone:
        replace_file(path, write)
        sync_folder(path.parent)
        sweep(path.parent, ".adapter_*.tmp", is_alone)


def _write_adapter(
    folder: Path, state: dict[str, Tensor], config_text: str, safe_serialization: bool
) -> None:
    if not safe_serialization:
        replace_file(folder / WEIGHTS_NAME, lambda temporary: torch.save(state, temporary))
        (folder / SAFETENSORS_WEIGHTS_NAME).unlink(missing_ok=True)
        write_text(folder / CONFIG_NAME, config_text)
        return
    digest = _digest(config_text.encode())
    waiting = _waiting_config(folder, digest)
    was_waiting = waiting.exists()  # for the present weights, if a save was killed
    metadata = {"format": "pt", _DIGEST: digest}
    try:
        write_text(waiting, config_text)
        replace_file(
            folder / SAFETENSORS_WEIGHTS_NAME,
            lambda temporary: save_file(state, temporary, metadata=metadata),
        )
    except BaseException:
        if not was_waiting:
            waiting.unlink(missing_ok=True)
        raise
    sync_folder(folder)
    _rename(waiting, folder / CONFIG_NAME)
    sync_folder(folder)
    (folder / WEIGHTS_NAME).unlink(missing_ok=True)


def read_config_text(path: Path) -> str:
    """Return the text of the config for the weights beside `path`, an `adapter_config.json`."""
    weights = path.parent / SAFETENSORS_WEIGHTS_NAME
    digest = read_metadata(weights).get(_DIGEST, "") if weights.is_file() else ""
    if not re.fullmatch("[0-9a-f]{64}", digest):
        return _content(path).decode()
    try:
        return _content(_waiting_config(path.parent, digest)).decode()
    except FileNotFoundError:
        pass  # the usual case: the save of the weights was completed
    content = _content(path)
    return content.decode() if _is_whole(content) else _torn(path.parent, digest, content).decode()


def _is_whole(content: bytes) -> bool:
    """Return whether a config ends as it should: a file system without a true rename copies."""
    return content.rstrip().endswith(b"}")


def _torn(folder: Path, digest: str, content: bytes) -> bytes:
    """Return the config that a copy in place of a rename has not finished, else what there is."""
    for waiting in folder.glob(f".adapter_config.{digest[:32]}.*.json"):
        if waiting.is_file() and _digest(found := _content(waiting)) == digest:
            return found
    return content


def read_json(path: Path) -> JsonObject:
    """Return the object in a JSON file."""
    is_config = path.name == CONFIG_NAME
    try:
        text = read_config_text(path) if is_config else _content(path).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"'{path}' is not valid JSON: {error}") from None
    return json_object(text, path)


def _content(path: Path) -> bytes:
    """Return the bytes of a config."""
    check_regular(path)
    return path.read_bytes()


@contextmanager
def open_tensors(path: Path, device: str | torch.device = "cpu") -> Iterator[safe_open]:
    """Context with a safetensors file, opened by its library."""
    check_regular(path)
    with safe_open(path, framework="pt", device=str(device)) as file:
        yield file


def read_weights(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a weights file. No code in a legacy `.bin` runs."""
    try:
        if path.suffix == ".safetensors":
            with open_tensors(path, device) as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        check_regular(path)
        return load_pickle(path, device)
    except PeftError:
        raise
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"Can't find '{path}'.") from None
    except Exception as error:  # the libraries raise errors of many types
        raise CheckpointError(f"'{path}' is not a readable weights file: {error}") from error


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a weights file."""
    if path.suffix == ".safetensors":
        with (
            suppress(SafetensorError, OSError, RuntimeError),  # `read_weights` names the problem
            open_tensors(path) as file,
        ):
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    return {key: tuple(tensor.shape) for key, tensor in read_weights(path).items()}


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, empty if it is damaged.

    Raises:
        CheckpointError: The file can't be read now.
    """
    try:
        with open_tensors(path) as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}
    except PeftError:
        raise
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"'{path}' can't be read: {error}") from error


def _waiting_config(folder: Path, digest: str) -> Path:
    """Return the name of a config that a save will rename to the present one."""
    try:
        present = _digest(_content(folder / CONFIG_NAME))
    except FileNotFoundError:
        present = "none"
    return folder / f".adapter_config.{digest[:32]}.{present[:32]}.json"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def writable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU, each with a storage of its own, as safetensors needs them."""
    seen: set[int] = set()
    result = {}
    for key, tensor in state.items():
        if tensor.is_meta:
            raise CheckpointError(
                f"`{key}` is on the meta device and has no values to save; nothing was written."
            )
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        result[key] = tensor
    return result


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file beside `path`, sync it to disk, and rename it to `path`.

    Args:
        path: The file, in a folder that exists; hold its lock, `alone_in`.
        write: Writes the content to the temporary path that it is given.

    Raises:
        CheckpointWriteError: It can't be written, and is as it was.
    """
    try:
        _replace_in_folder(path, write)
    except PeftError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise write_error(f"'{path}' can't be written, and is as it was: {error}", error) from error


def write_error(text: str, error: BaseException) -> CheckpointWriteError:
    """Return the error for something that can't be written, with the number of its cause."""
    failure = CheckpointWriteError(text)
    failure.errno = getattr(error, "errno", None)
    return failure


def _replace_in_folder(path: Path, write: Callable[[Path], object]) -> None:
    # A folder of our own also takes the temporary files of the libraries that write.
    place = Path(tempfile.mkdtemp(dir=path.parent, prefix=".adapter_", suffix=".tmp"))
    try:
        temporary = place / path.name
        temporary.touch()
        mode = temporary.stat().st_mode  # some writers make files that only their owner can read
        write(temporary)
        set_mode(temporary, mode)
        with open(temporary, "rb+") as file:
            sync(file.fileno())
        _rename(temporary, path)
    finally:
        _delete(place)


def sync(handle: int) -> None:
    """Sync a file or folder to disk, if its system can do that."""
    _tolerant(_CANT_SYNC, os.fsync, handle)


def set_mode(path: Path, mode: int) -> None:
    """Set the mode of a file or folder, if its system has modes."""
    if path.stat().st_mode != mode:
        _tolerant(_CANT_CHMOD, path.chmod, mode)


def _tolerant(numbers: tuple[int, ...], call: Callable[[int], object], argument: int) -> None:
    """Make a call, and pass over errors of these numbers: a file system that can't do it."""
    try:
        call(argument)
    except OSError as error:
        if error.errno not in numbers:
            raise


def _rename(source: Path, target: Path) -> None:
    """Put a file in place of another in one step."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno in _CANT_RENAME:
            text = (
                f"{os.strerror(error.errno)}: this file system does not replace a file in one "
                "step. Save to a local disk, and copy the folder when it is complete"
            )
            raise OSError(error.errno, text) from error
        raise


def _delete(place: Path) -> None:
    """Delete a folder of temporary files. If that fails, the next save deletes it."""
    with suppress(OSError):
        shutil.rmtree(place)


def sweep(folder: Path, pattern: str, is_alone: bool = True) -> None:
    """Delete the files of interrupted saves in a folder; without its lock, only those a day old."""
    for leftover in folder.glob(pattern):
        if not is_alone and time.time() - leftover.lstat().st_mtime < _DAY:
            continue
        if leftover.is_dir():
            _delete(leftover)
        else:
            leftover.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, if the system can do that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):  # Windows can't open folders
        return
    try:
        sync(handle)
    finally:
        os.close(handle)
