# SPDX-License-Identifier: Apache-2.0
"""Weights in the legacy format, `adapter_model.bin`: a pickle, read without running what is in it.

A pickle can also claim more than it holds: compressed data, a value that is many by its strides, a
tensor without values. Such files are refused, so that reading takes memory of the file's size.
"""

from __future__ import annotations

import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base.errors import CheckpointError

# Names that one tensor of a file may have on average; tied weights have two or three.
_SHARED = 8


def load_pickle(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    """Return the tensors of a file in the legacy format.

    Raises:
        CheckpointError: It does not hold a dictionary of named, dense tensors, or it is smaller
            than these say.
        Exception: Errors of torch, of many types, if it can't be read.
    """
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        if any(part.compress_type for part in parts) or sum(p.file_size for p in parts) > size:
            raise CheckpointError(
                f"'{path}' is not a readable weights file: its data is compressed, as torch never "
                "writes it."
            )
    elif tarfile.is_tarfile(path):  # torch would unpack it into a folder
        raise CheckpointError(
            f"'{path}' is not a readable weights file: it is an archive as torch wrote before 2017."
        )
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, EOFError, LookupError) as error:
        # torch's own text advises to run what is in it.
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"holds `{named[1]}`" if named else "is damaged, or holds other objects"
        raise CheckpointError(
            f"'{path}' is not a readable weights file: it {found}. Only tensors are read, because "
            "making other objects can run code."
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(v, Tensor) and isinstance(k, str) for k, v in state.items()
    ):
        raise CheckpointError(f"'{path}' does not hold a dictionary of named tensors.")
    if sum(tensor.numel() * tensor.itemsize for tensor in state.values()) > _SHARED * size:
        raise CheckpointError(
            f"'{path}' is not a readable weights file: its tensors take more bytes than it has."
        )
    is_meta = torch.device(device).type == "meta"
    for key, tensor in state.items():
        if (problem := _problem(tensor, size, is_meta)) is not None:
            raise CheckpointError(
                f"'{path}' is not a readable weights file: `{key}` {problem}. Save the adapter in "
                "the safetensors format."
            )
    return state


def _problem(tensor: Tensor, size: int, is_meta: bool) -> str | None:
    """Return the fault of a tensor in a file of some size, None if it has none."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return "is not a dense tensor"
    if tensor.is_quantized or (tensor.is_meta and not is_meta):
        return "is quantized, or has no values"
    if not tensor.nbytes <= tensor.untyped_storage().nbytes() <= size:
        return f"takes {tensor.nbytes:,} bytes, which the file does not have"
    return None
