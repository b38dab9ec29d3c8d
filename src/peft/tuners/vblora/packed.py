# SPDX-License-Identifier: Apache-2.0
"""`PackedTensors`: small tensors that nobody trains, of thousands of adapters, side by side in a
few large ones.

A tensor of a few hundred bytes costs about as much again in Python and torch objects, and to run a
batch of adapters their tensors would have to be stacked in every call. Here all entries of one
shape and dtype are rows of one buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ...base.containers import AdapterContainer


class PackedTensors(AdapterContainer, nn.Module):
    """Tensors by adapter name, read by a call as those of `AdapterParameterDict`. In a state dict
    each is an entry of its own.

    An entry is a view: what is written into it is kept, until another entry is added and its buffer
    grows.

    Example:
        >>> packed = PackedTensors()
        >>> packed["a"], packed["b"] = torch.tensor([1, 2]), torch.tensor([3, 4])
        >>> packed("b"), packed.place("a")[1], packed.place("b")[1]
        (tensor([3, 4]), 0, 1)
        >>> list(packed.state_dict())
        ['a', 'b']
    """

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[str, tuple[str, int]] = {}
        self._free: dict[str, list[int]] = {}

    def forward(self, name: str) -> Tensor:
        """Return an adapter's tensor."""
        return self[name]

    def extra_repr(self) -> str:
        """Dtype and shape of the entries, of the first few where there are many."""
        shown = [
            f"{name}: {str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
            for name, t in islice(self.items(), 8)
        ]
        more = [f"… {len(self) - len(shown)} more"] if len(self) > len(shown) else []
        return ", ".join([*shown, *more])

    def place(self, name: str) -> tuple[str, int]:
        """The name of the buffer that an entry is in, and its row."""
        return self._places[name]

    def pack(self, name: str) -> Tensor:
        """A buffer of this name, `[rows, *shape]`; some rows may not be in use."""
        buffer = self._buffers[name]
        assert buffer is not None
        return buffer

    def __getitem__(self, name: str) -> Tensor:
        pack, row = self._places[name]
        return self.pack(pack)[row]

    @torch.no_grad()
    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if name in self._places:
            del self[name]
        pack = "_".join(["pack", *map(str, tensor.shape), str(tensor.dtype).removeprefix("torch.")])
        free = self._free.setdefault(pack, [])
        if not free:
            self._grow(pack, tensor, free)
        row = free.pop()
        self.pack(pack)[row].copy_(tensor)
        self._places[name] = (pack, row)

    def _grow(self, pack: str, tensor: Tensor, free: list[int]) -> None:
        """Make room for as many entries again as there are."""
        old = self._buffers.get(pack)
        before = 0 if old is None else len(old)
        after = max(1, 2 * before)
        buffer = (tensor if old is None else old).new_empty((after, *tensor.shape))
        if old is not None:
            buffer[:before] = old
        self.register_buffer(pack, buffer, persistent=False)
        free.extend(reversed(range(before, after)))

    def __delitem__(self, name: str) -> None:
        pack, row = self._places.pop(name)
        self._free[pack].append(row)
        if len(self._free[pack]) == len(self.pack(pack)):
            del self._buffers[pack], self._free[pack]
            self._non_persistent_buffers_set.discard(pack)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and entries."""
        return ((name, self[name]) for name in list(self._places))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in self.items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
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
                shapes = f"{list(state_dict[key].shape)} in the checkpoint and {list(tensor.shape)} in the model"
                error_msgs.append(f"size mismatch for {key}: {shapes}.")
            else:
                tensor.copy_(state_dict[key])
        if strict:
            known = {prefix + name for name in self}
            unexpected_keys.extend(
                key for key in state_dict if key.startswith(prefix) and key not in known
            )
