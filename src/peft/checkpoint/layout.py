# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file, read without the tensors: names, dtypes, shapes and positions.

A file is the header's length (8 bytes, little-endian), the header (JSON), and the tensors' bytes
side by side. Adapters of one kind have the same header, so thousands of them in memory share one
`TensorLayout`, and each is no more than its bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..base.errors import CheckpointError
from .headers import DTYPES

# Longest header that readers of the format accept.
MAX_HEADER = 100_000_000
_LENGTH_BYTES = 8
# Numbers that a tensor can have at most, one of no numbers too if its empty axis had one.
_LARGEST = 2**63 - 1


class TensorSpan(NamedTuple):
    """Dtype and shape of a tensor, and the bytes that it takes of a file's data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class TensorLayout:
    """The tensors of a safetensors file.

    Args:
        header: The header's bytes, without its length.
        spans: Each tensor's place, by key.
        metadata: The text that the writer put beside the tensors.
        nbytes: Size of all tensors.
    """

    header: bytes = field(repr=False)
    spans: Mapping[str, TensorSpan]
    metadata: Mapping[str, str]
    nbytes: int

    @property
    def prefix(self) -> bytes:
        """The bytes of a file before its tensors."""
        return len(self.header).to_bytes(_LENGTH_BYTES, "little") + self.header

    @property
    def file_size(self) -> int:
        """Size of a file with this header."""
        return _LENGTH_BYTES + len(self.header) + self.nbytes

    def tensors(self, data: bytearray) -> dict[str, Tensor]:
        """Return the tensors in a file's data. They are views of it, without a copy."""
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()
        result = {}
        for key, (dtype, shape, begin, end) in self.spans.items():
            part = flat[begin:end]
            # Only odd writers leave tensors at positions that their dtype can't be read from.
            is_aligned = begin % dtype.itemsize == 0
            part = part if is_aligned else part.clone()
            result[key] = (part.view(dtype) if end > begin else part.to(dtype)).view(shape)
        return result


def read_layout(file: BinaryIO, size: int, source: object) -> TensorLayout:
    """Read the header of a safetensors file; afterwards the file stands at its data.

    Args:
        file: The file, at its beginning.
        size: Its size in bytes.
        source: Its path, for messages.

    Raises:
        CheckpointError: The header is damaged, or the file is shorter or longer than it says.
    """
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    problem = None
    if size < _LENGTH_BYTES:
        problem = f"it has {size} bytes, less than the length of a header takes"
    elif length > MAX_HEADER or length > size - _LENGTH_BYTES:
        problem = f"its header would take {length:,} bytes of {size:,}; the file is damaged or cut"
    if problem:
        raise CheckpointError(f"'{source}' is not a readable safetensors file: {problem}.")
    try:
        layout = parse_header(file.read(length))
    except ValueError as error:
        raise CheckpointError(f"'{source}' is not a readable safetensors file: {error}.") from None
    if layout.file_size != size:
        raise CheckpointError(
            f"'{source}' is not a readable safetensors file: it has {size:,} bytes, and its header "
            f"says {layout.file_size:,}; the file is damaged or cut."
        )
    return layout


@lru_cache(maxsize=64)
def parse_header(header: bytes) -> TensorLayout:
    """Return the layout in a header; equal headers give the same object.

    Raises:
        ValueError: It is damaged; the message says where.

    Example:
        >>> text = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
        >>> parse_header(text).spans["a"].shape
        (2,)
    """
    try:
        content = json.loads(header.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError("its header is not a JSON object")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is not text by name")
    spans = {key: _span(key, entry) for key, entry in content.items()}
    at = 0
    for key, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.begin != at:
            raise ValueError(f"there is a gap or an overlap before `{key}`")
        at = span.end
    return TensorLayout(header, spans, metadata, at)


def _span(key: str, entry: object) -> TensorSpan:
    """Return a tensor's place from its entry in a header, or raise ValueError."""
    try:
        if not isinstance(entry, dict):
            raise TypeError
        name, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        dtype = DTYPES.get(name)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the entry of `{key}` is not that of a tensor") from None
    if dtype is None:
        raise ValueError(f"`{key}` has the unknown dtype {name!r}")
    numbers = (*shape, begin, end)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"the entry of `{key}` has numbers that are no sizes")
    if math.prod(max(size, 1) for size in shape) > _LARGEST:
        raise ValueError(f"`{key}` has a shape that no tensor can have")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"`{key}` takes {end - begin} bytes, which do not fit its shape")
    return TensorSpan(dtype, shape, begin, end)
