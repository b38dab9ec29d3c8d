# SPDX-License-Identifier: Apache-2.0
"""An adapter on disk: `adapter_config.json` and `adapter_model.safetensors`, written so that no
reader sees half of one.

Two files cannot be replaced in one step, so the weights file is the commit point. A save writes

1. the new config beside the old one, under a name made from its digest,
2. the new weights, which carry that digest, in place of the old ones (one atomic rename: from here
on the adapter is new), 3. the new config in place of the old one.

A reader takes the waiting config whose digest the weights carry, if there is one, and else
`adapter_config.json`. Killed at any moment, a save therefore leaves the old adapter or the new one.
A config edited by hand afterwards is read as edited.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..base.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..base.errors import CheckpointError, CheckpointNotFoundError, PeftTypeError, PeftValueError

_DIGEST = "adapter_config_sha256"


def as_path(path: Any, name: str, other: str = "") -> Path:
    """Return an argument as a path.

    Args:
        path: The argument.
        name: Its name, for the message.
        other: What else it may be, likewise.

    Raises:
        PeftTypeError: It is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise PeftTypeError(f"`{name}`={path!r} must be a path{other}, not {type(path).__name__}.")
    return Path(path)


def as_file(path: Any) -> Path:
    """Return the argument `path` as that of a file that can be written; nothing is made yet.

    Raises:
        PeftTypeError: It is no path.
        PeftValueError: It is a folder, or would be in a file.
    """
    file = as_path(path, "path")
    if file.is_dir():
        raise PeftValueError(f"`path`='{file}' is a folder; give the path of a file in it.")
    if above := next((str(parent) for parent in file.parents if parent.is_file()), None):
        raise PeftValueError(
            f"`path`='{file}' can't be written, since '{above}' is a file; give the path of "
            "another file."
        )
    return file


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """A context in which no other process writes an adapter to a folder: all processes of a
    training run may save at once.

    Where the file system knows no locks, or one is held for a minute, it goes on without.
    """
    handle = None
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        for _ in range(600):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
    except (ImportError, OSError):
        pass
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def write_report(path: Any, content: Any) -> None:
    """Write JSON to a file in one step; its folder is made if missing.

    Raises:
        As `as_file`; nothing is written.
    """
    file = as_file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_config(folder: Path, text: str) -> None:
    """Write a config by itself; it is what is read then, whatever a killed save left waiting."""
    with alone_in(folder):
        write_text(folder / CONFIG_NAME, text)
        for leftover in folder.glob(".adapter_config.*.json"):
            leftover.unlink(missing_ok=True)


def write_adapter(
    folder: Path, state: Mapping[str, Tensor], config_text: str, safe_serialization: bool = True
) -> None:
    """Write an adapter's weights and config; a reader sees the old adapter or the new one, never a
    mixture.

    Args:
        folder: Made if missing. Other files in it are left alone.
        state: Tensors by checkpoint key, on any device.
        config_text: JSON.
        safe_serialization: False writes the legacy pickle format, whose two files are replaced one
            after the other.
    """
    empty = [key for key, tensor in state.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"`{empty[0]}` is on the meta device and has no values to save; nothing was written."
        )
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.detach().to("cpu").contiguous() for key, tensor in state.items()}
    state = _unshared(state)
    with alone_in(folder):
        _write_adapter(folder, state, config_text, safe_serialization)


def write_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replace a safetensors file in one step.

    Raises:
        CheckpointError: A tensor is on the meta device; nothing is written.
    """
    empty = [key for key, tensor in state.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"`{empty[0]}` is on the meta device and has no values to save; nothing was written."
        )
    own = _unshared({key: tensor.detach().to("cpu").contiguous() for key, tensor in state.items()})
    _replace(
        path, lambda temporary: save_file(own, temporary, metadata={"format": "pt", **metadata})
    )


def _write_adapter(
    folder: Path, state: dict[str, Tensor], config_text: str, safe_serialization: bool
) -> None:
    if not safe_serialization:
        _replace(folder / WEIGHTS_NAME, lambda temporary: torch.save(state, temporary))
        (folder / SAFETENSORS_WEIGHTS_NAME).unlink(missing_ok=True)
        write_text(folder / CONFIG_NAME, config_text)
        return
    digest = hashlib.sha256(config_text.encode()).hexdigest()
    waiting = _waiting_config(folder, digest)
    write_text(waiting, config_text)
    metadata = {"format": "pt", _DIGEST: digest}
    _replace(
        folder / SAFETENSORS_WEIGHTS_NAME,
        lambda temporary: save_file(state, temporary, metadata=metadata),
    )
    os.replace(waiting, folder / CONFIG_NAME)
    for leftover in folder.glob(".adapter_*"):  # of saves that were killed
        leftover.unlink(missing_ok=True)
    (folder / WEIGHTS_NAME).unlink(missing_ok=True)
    _sync_folder(folder)


def read_config_text(path: Path) -> str:
    """The text of the config that belongs to the weights beside `path`, an `adapter_config.json`."""
    weights = path.parent / SAFETENSORS_WEIGHTS_NAME
    if weights.is_file():
        digest = read_metadata(weights).get(_DIGEST)
        if digest:
            try:
                return _waiting_config(path.parent, digest).read_text(encoding="utf-8")
            except FileNotFoundError:
                pass  # the usual case: the save that wrote the weights came to its end
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CheckpointError: It is not JSON, or not an object.
    """
    try:
        content = json.loads(
            read_config_text(path) if path.name == CONFIG_NAME else path.read_text(encoding="utf-8")
        )
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"Can't find '{path}'.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"'{path}' is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' must hold a JSON object, not a {type(content).__name__}.")
    return content


def read_weights(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a weights file; a legacy `.bin` is read with `weights_only=True`, so that
    nothing in it can run.

    Raises:
        CheckpointError: The file is truncated, of another format, or holds anything but named
            tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device=str(device)) as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"Can't find '{path}'.") from None
    except (
        Exception
    ) as error:  # each format has its own, of many types; whichever, the file can't be read
        raise CheckpointError(f"'{path}' is not a readable weights file: {error}") from error
    if not isinstance(state, dict) or not all(
        isinstance(v, Tensor) and isinstance(k, str) for k, v in state.items()
    ):
        raise CheckpointError(f"'{path}' does not hold a dictionary of named tensors.")
    return state


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a weights file.

    Raises:
        CheckpointError: The file can't be read.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is not a readable weights file: {error}") from error
    return {key: tuple(tensor.shape) for key, tensor in read_weights(path).items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty where it can't be read, which reading the weights
    will report.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _waiting_config(folder: Path, digest: str) -> Path:
    return folder / f".adapter_config.{digest[:32]}.json"


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies where tensors share or exceed their storage, which the safetensors format can't
    express.
    """
    seen: set[int] = set()
    result = {}
    for key, tensor in state.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        result[key] = tensor
    return result


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` fill a temporary file beside `path`, make it durable, and put it in `path`'s
    place.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".adapter_", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp's mode is for secrets
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the renames in a folder durable, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
