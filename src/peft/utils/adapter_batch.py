# SPDX-License-Identifier: Apache-2.0
"""The choice of an adapter for each sample of a call, `adapter_names`.

It travels beside the call for all methods: an `AdapterBatch` on the stack `ADAPTER_BATCHES`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .call_stack import CallStack
from .error import PeftTypeError, PeftValueError
from .near_misses import adapters_there

# The name that chooses no adapter for a sample.
BASE_MODEL = "__base__"
# Keyword arguments under which models take the tensor whose rows are the samples.
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "inputs")


class AdapterBatch:
    """The adapter that each sample of a call runs with.

    Args:
        names: An adapter's name for each sample, or `"__base__"` for none.

    Attributes:
        samples: Numbers of the samples, by adapter.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.size = len(names)
        self.samples: dict[str, list[int]] = {}
        for sample, name in enumerate(names):
            self.samples.setdefault(name, []).append(sample)
        self._rows: dict[tuple[int, torch.device], dict[str, Tensor]] = {}
        self._numbers: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._owners: dict[tuple[tuple[str, ...], int, torch.device], tuple[Tensor, Tensor]] = {}

    def rows(self, tensor: Tensor) -> dict[str, Tensor]:
        """The rows of a layer's input, by adapter. Each sample has the same number of successive rows: its beams, or its tokens
        where the model flattens them.

        Raises:
            PeftValueError: The rows can't be shared out evenly.
        """
        total = tensor.shape[0]
        key = total, tensor.device
        if key not in self._rows:
            if total % self.size:
                raise PeftValueError(f"A layer sees {total} rows, which {self.size} `adapter_names` can't share out evenly.")
            each = total // self.size
            self._rows[key] = {
                name: torch.tensor([s * each + i for s in samples for i in range(each)], device=tensor.device)
                for name, samples in self.samples.items()
            }
        return self._rows[key]

    def part(self, samples: dict[str, list[int]]) -> AdapterBatch:
        """The same call, of which only some samples run with an adapter."""
        part = copy.copy(self)
        part.samples = samples
        part._rows = {key: {name: rows[name] for name in samples} for key, rows in self._rows.items()}
        return part

    def numbers(self, values: tuple[int, ...], device: torch.device) -> Tensor:
        """Integers as a tensor, which all layers of a call that ask for the same share: making one waits for the device."""
        key = values, device
        if key not in self._numbers:
            self._numbers[key] = torch.tensor(values, device=device)
        return self._numbers[key]

    def owners(self, names: tuple[str, ...], tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The rows, of a layer's input, of the samples that run with some adapters, and the number of the adapter that each has;
        in the order of the rows.
        """
        key = names, tensor.shape[0], tensor.device
        if key not in self._owners:
            rows = self.rows(tensor)
            own = torch.cat([rows[name] for name in names])
            number = torch.cat([torch.full_like(rows[name], i) for i, name in enumerate(names)])
            order = own.argsort()
            self._owners[key] = own[order], number[order]
        return self._owners[key]


# A call inside another that chooses no adapters by sample is there as None.
ADAPTER_BATCHES: CallStack[AdapterBatch | None] = CallStack()


def adapter_batch(names: Any, known: Mapping[str, Any], args: tuple[Any, ...], arguments: Mapping[str, Any]) -> AdapterBatch:
    """The choice of adapters for a call, checked.

    Args:
        names: What the caller passed as `adapter_names`.
        known: The model's adapters by name.
        args, arguments: Positional and keyword arguments of the call.

    Raises:
        PeftTypeError: Not a list of strings.
        PeftValueError: An unknown name, or not one for each sample.
    """
    if isinstance(names, str) or not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise PeftTypeError(f"`adapter_names`={names!r} must be a list with an adapter's name for each sample.")
    unknown = sorted({name for name in names if name not in known and name != BASE_MODEL})
    if unknown:
        raise PeftValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; {BASE_MODEL!r} means none, and this model has "
            f"{adapters_there(unknown[0], known)}"
        )
    inputs = first_input(args, arguments)
    samples = len(names) if inputs is None else inputs.shape[0]
    if len(names) != samples or not names:
        raise PeftValueError(
            "Length of `adapter_names` should be the same as the number of inputs, "
            f"but got {len(names)} and {samples} respectively."
        )
    return AdapterBatch(names)


def first_input(args: tuple[Any, ...], arguments: Mapping[str, Any], besides: tuple[str, ...] = ()) -> Tensor | None:
    """The tensor whose rows are the samples: the first positional argument, or the first that is known by name or is one and not
    among `besides`.
    """
    candidates = [*args, *(arguments.get(name) for name in _INPUTS)]
    candidates += [value for name, value in arguments.items() if name not in besides]
    return next((value for value in candidates if isinstance(value, Tensor) and value.dim() > 0), None)
