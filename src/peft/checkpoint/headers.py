# SPDX-License-Identifier: Apache-2.0
"""The names, shapes and dtypes of a weights file's tensors, without the tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from ..base.errors import CheckpointError, CheckpointNotFoundError
from .files import open_tensors, read_weights

# Dtypes by their codes in a safetensors file.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}


class TensorInfo(NamedTuple):
    """A tensor of a file: its shape, its dtype without "torch.", its bytes."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class FileHeader:
    """The contents of a weights file.

    Args:
        path: The file.
        tensors: Its tensors by key.
        metadata: The text in a safetensors file's header.
        file_bytes: Its size.
        header_bytes: The part of it before the tensors; 0 for other formats.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    file_bytes: int
    header_bytes: int


def read_header(path: Path) -> FileHeader:
    """Read the header of a safetensors file, or the tensors of another weights file.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CheckpointError: It is not a readable weights file.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(f"Can't find '{path}'.")
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        tensors = {
            key: TensorInfo(tuple(tensor.shape), _name(tensor.dtype), tensor.nbytes)
            for key, tensor in read_weights(path, "meta").items()
        }
        return FileHeader(path, tensors, {}, size, 0)
    try:
        with open_tensors(path) as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            tensors = {
                key: _info(tuple(part.get_shape()), part.get_dtype())
                for key, part in slices.items()
            }
            metadata = file.metadata() or {}
        with open(path, "rb") as raw:
            header = 8 + int.from_bytes(raw.read(8), "little")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is not a readable weights file: {error}") from error
    return FileHeader(path, tensors, metadata, size, header)


def _info(shape: tuple[int, ...], code: str) -> TensorInfo:
    dtype = DTYPES.get(code)
    if dtype is None:
        return TensorInfo(shape, code, 0)
    return TensorInfo(shape, _name(dtype), math.prod(shape) * dtype.itemsize)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
