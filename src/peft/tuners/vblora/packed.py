# SPDX-License-Identifier: Apache-2.0
"""`PackedTensors`: small frozen tensors of thousands of adapters as rows of a few large buffers.

A tensor object costs a few hundred bytes beside its data, and a batch of adapters would have to
stack its tensors in every call. Here all tensors of one shape and dtype are rows of one buffer, so
a batch reads them with one index operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...base.containers import AdapterContainer


class Location(NamedTuple):
    """Buffer and row of a packed tensor."""

    buffer: str
    row: int


class PackedTensors(AdapterContainer, nn.Module):
    """Tensors by adapter name, read by a call like those of `AdapterParameterDict`. In a state dict
    each has a key of its own.

    `packed[name]` is a view of its buffer: it can be written to until the buffer grows because
    another tensor is added.

    Example:
        >>> packed = PackedTensors()
        >>> packed["a"], packed["b"] = torch.tensor([1, 2]), torch.tensor([3, 4])
        >>> packed("b"), packed.location("a").row, packed.location("b").row
        (tensor([3, 4]), 0, 1)
        >>> list(packed.state_dict())
        ['a', 'b']
    """

    def __init__(self) -> None:
        super().__init__()
        self._locations: dict[str, Location] = {}
        self._free_rows: dict[str, list[int]] = {}

    def forward(self, name: str) -> Tensor:
        """Return an adapter's tensor."""
        return self[name]

    def extra_repr(self) -> str:
        """Return name, dtype and shape of the tensors, at most eight of them."""
        shown = [
            f"{name}: {str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
            for name, t in islice(self.items(), 8)
        ]
        more = [f"… {len(self) - len(shown)} more"] if len(self) > len(shown) else []
        return ", ".join([*shown, *more])

    def location(self, name: str) -> Location:
        """Return the buffer and the row of a tensor."""
        return self._locations[name]

    def buffer(self, name: str) -> Tensor:
        """Return a buffer `[rows, *shape]`; some rows may be free."""
        buffer = self._buffers[name]
        assert buffer is not None
        return buffer

    def __getitem__(self, name: str) -> Tensor:
        location = self._locations[name]
        return self.buffer(location.buffer)[location.row]

    @torch.no_grad()
    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if name in self._locations:
            del self[name]
        self.make_room(name, tensor)
        buffer = self._buffer_name(tensor)
        row = self._free_rows[buffer].pop()
        self.buffer(buffer)[row].copy_(tensor)
        self._locations[name] = Location(buffer, row)

    @torch.no_grad()
    def make_room(self, name: str, tensor: Tensor) -> None:
        """Take the memory for a tensor that will be put in."""
        buffer = self._buffer_name(tensor)
        if not self._free_rows.get(buffer):
            self._grow(buffer, tensor)

    @staticmethod
    def _buffer_name(tensor: Tensor) -> str:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return "_".join(["pack", *map(str, tensor.shape), dtype])

    def _grow(self, name: str, tensor: Tensor) -> None:
        """Double a buffer's rows, or make one with a row for a tensor of this shape and dtype."""
        old = self._buffers.get(name)
        before = 0 if old is None else len(old)
        after = max(1, 2 * before)
        buffer = (tensor if old is None else old).new_empty((after, *tensor.shape))
        if old is not None:
            buffer[:before] = old
        self.register_buffer(name, buffer, persistent=False)
        self._free_rows.setdefault(name, []).extend(reversed(range(before, after)))

    def __delitem__(self, name: str) -> None:
        buffer, row = self._locations.pop(name)
        self._free_rows[buffer].append(row)
        if len(self._free_rows[buffer]) == len(self.buffer(buffer)):
            del self._buffers[buffer], self._free_rows[buffer]
            self._non_persistent_buffers_set.discard(buffer)

    def __contains__(self, name: object) -> bool:
        return name in self._locations

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def __len__(self) -> int:
        return len(self._locations)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors."""
        return ((name, self[name]) for name in list(self._locations))

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self.items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, object],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, tensor in self.items():
            key = prefix + name
            if key not in state_dict:
                missing_keys.append(key)
            elif state_dict[key].shape != tensor.shape:
                error_msgs.append(
                    f"size mismatch for {key}: {list(state_dict[key].shape)} in the checkpoint and "
                    f"{list(tensor.shape)} in the model."
                )
            else:
                tensor.copy_(state_dict[key])
        if strict:
            known = {prefix + name for name in self}
            unexpected_keys.extend(
                key for key in state_dict if key.startswith(prefix) and key not in known
            )
