# SPDX-License-Identifier: Apache-2.0
"""The choice of an adapter for each sample of a call, `adapter_names`.

It travels beside the call for all methods: an `AdapterBatch` on the stack `ADAPTER_BATCHES`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .call_rows import IN_ORDER, CallRows, Rows, bind, describe, entrances, positional_names
from .call_stack import CallStack
from .errors import PeftTypeError, PeftValueError
from .suggestions import adapters_there

# The name that chooses no adapter for a sample.
BASE_MODEL = "__base__"


class AdapterBatch:
    """The adapter that each sample of a call runs with.

    Args:
        names: An adapter's name for each sample, or `"__base__"` for none.
        call_rows: What the call knows of its rows.

    Attributes:
        samples: Numbers of the samples, by adapter.
        only: The adapter that all samples have, if it is one.
        call_rows: What the forward in progress knows.
    """

    def __init__(self, names: Sequence[str], call_rows: CallRows | None = None) -> None:
        self.size = len(names)
        self.samples: dict[str, list[int]] = {}
        for sample, name in enumerate(names):
            self.samples.setdefault(name, []).append(sample)
        self.only = names[0] if len(self.samples) == 1 else None
        self.call_rows = CallRows(len(names)) if call_rows is None else call_rows
        self.call_rows.samples = len(names)
        self._rows: dict[tuple[int, torch.device], dict[str, Tensor]] = {}
        self._numbers: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._owners: dict[tuple[tuple[str, ...], int, torch.device], tuple[Tensor, Tensor]] = {}

    def share(self, x: Tensor, layer: Any) -> Rows:
        """How a layer's input is shared out among the samples.

        Raises:
            PeftValueError: Nothing tells.
        """
        rows = self.call_rows.share(x, layer.layout)
        if rows is None:
            raise self.call_rows.refusal(x, layer, "Give all samples of a call the same adapter")
        return rows

    def rows(self, total: int, device: torch.device, shared: Rows = IN_ORDER) -> dict[str, Tensor]:
        """The numbers of a layer's rows, by adapter.

        Args:
            total: How many rows there are.
            device: Where the numbers are needed.
            shared: How the rows are shared out.
        """
        if shared.owner is not None:
            every = {
                name: torch.tensor(samples, device=device) for name, samples in self.samples.items()
            }
            return {
                name: torch.isin(shared.owner, samples).nonzero().flatten()
                for name, samples in every.items()
            }
        key = total, device
        if key not in self._rows:
            each = total // self.size
            rows = {
                name: [s * each + i for s in samples for i in range(each)]
                for name, samples in self.samples.items()
            }
            self._rows[key] = {name: torch.tensor(own, device=device) for name, own in rows.items()}
        return self._rows[key]

    def part(self, samples: dict[str, list[int]]) -> AdapterBatch:
        """The same call, of which only some samples run with an adapter."""
        part = copy.copy(self)
        part.samples = samples
        part._rows = {
            key: {name: rows[name] for name in samples} for key, rows in self._rows.items()
        }
        return part

    def numbers(self, values: tuple[int, ...], device: torch.device) -> Tensor:
        """Integers as a tensor, which all layers of a call that ask for the same share: making one
        waits for the device.
        """
        key = values, device
        if key not in self._numbers:
            self._numbers[key] = torch.tensor(values, device=device)
        return self._numbers[key]

    def owners(self, names: tuple[str, ...], x: Tensor, shared: Rows) -> tuple[Tensor, Tensor]:
        """The rows, of a layer's input, of the samples that run with some adapters, and the number
        of the adapter that each has; in the order of the rows.
        """
        key = names, x.shape[0], x.device
        if key not in self._owners or shared.owner is not None:
            rows = self.rows(x.shape[0], x.device, shared)
            own = torch.cat([rows[name] for name in names])
            number = torch.cat([torch.full_like(rows[name], i) for i, name in enumerate(names)])
            order = own.argsort()
            found = own[order], number[order]
            if shared.owner is not None:
                return found
            self._owners[key] = found
        return self._owners[key]

    @contextmanager
    def generating(self, model: nn.Module) -> Iterator[None]:
        """A call of `generate` for these samples, in which each forward says how many rows and
        tokens it has.
        """
        call_rows, handles = self.call_rows, []
        try:
            for entrance in entrances(model):
                names = positional_names(entrance.forward)

                def note(
                    module: nn.Module, args: Any, kwargs: Any, names: tuple[str, ...] = names
                ) -> None:
                    if ADAPTER_BATCHES.current is self:
                        self.call_rows = call_rows.inside(
                            describe(bind(names, args, kwargs)), is_generating=True
                        )

                handles.append(entrance.register_forward_pre_hook(note, with_kwargs=True))
            with ADAPTER_BATCHES.during(self):
                yield
        finally:
            self.call_rows = call_rows
            for handle in handles:
                handle.remove()


# A call inside another that chooses no adapters by sample is there as None.
ADAPTER_BATCHES: CallStack[AdapterBatch | None] = CallStack()


def adapter_batch(names: Any, known: Mapping[str, Any], call_rows: CallRows) -> AdapterBatch:
    """The choice of adapters for a call, checked.

    Args:
        names: What the caller passed as `adapter_names`.
        known: The model's adapters by name.
        call_rows: What the call knows of its rows.

    Raises:
        PeftTypeError: Not a list of strings.
        PeftValueError: An unknown name, or not one for each sample.
    """
    if (
        isinstance(names, str)
        or not isinstance(names, (list, tuple))
        or not all(isinstance(name, str) for name in names)
    ):
        raise PeftTypeError(
            f"`adapter_names`={names!r} must be a list with an adapter's name for each sample."
        )
    unknown = sorted({name for name in names if name not in known and name != BASE_MODEL})
    if unknown:
        raise PeftValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; {BASE_MODEL!r} "
            "means none, and this model has "
            f"{adapters_there(unknown[0], known)}"
        )
    samples = len(names) if call_rows.samples is None else call_rows.samples
    if len(names) != samples or not names:
        packed = "; texts packed into one row are one sample" if samples == 1 and names else ""
        raise PeftValueError(
            "Length of `adapter_names` should be the same as the number of inputs, "
            f"but got {len(names)} and {samples} respectively{packed}."
        )
    return AdapterBatch(names, call_rows)
