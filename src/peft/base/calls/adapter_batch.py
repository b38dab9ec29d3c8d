# SPDX-License-Identifier: Apache-2.0
"""The adapter of each sample of a call, as chosen by `adapter_names`."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import PeftTypeError, PeftValueError
from ..suggestions import adapters_there
from .arguments import argument_shapes, bind_arguments, entry_modules, positional_names
from .rows import IN_ORDER, CallRows, LayerWithLayout, RowOwners
from .stack import CallStack

# The name that chooses no adapter for a sample.
BASE_MODEL = "__base__"


class AdapterBatch:
    """The adapter that each sample of a call runs with.

    Args:
        names: An adapter's name for each sample, or `"__base__"` for none.
        call_rows: The counts of the call, from which the owners of rows follow.

    Attributes:
        samples: Indices of the samples, by adapter.
        only: The adapter of all samples, if they have the same.
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
        self._indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._sorted: dict[tuple[tuple[str, ...], int, torch.device], tuple[Tensor, Tensor]] = {}

    def row_owners(self, x: Tensor, layer: LayerWithLayout) -> RowOwners:
        """Return the owners of the rows of a layer's input; raise an error if they are unknown."""
        owners = self.call_rows.owners(x, layer.layout)
        if owners is None:
            raise self.call_rows.error(x, layer, "Give all samples of a call the same adapter")
        return owners

    def rows_by_adapter(
        self, total: int, device: torch.device, owners: RowOwners = IN_ORDER
    ) -> dict[str, Tensor]:
        """Return the indices of each adapter's rows in a layer's input of `total` rows."""
        if owners.owner is not None:
            owner = owners.owner
            return {
                name: torch.isin(owner, torch.tensor(samples, device=device)).nonzero().flatten()
                for name, samples in self.samples.items()
            }
        key = total, device
        if key not in self._rows:
            count = total // self.size
            rows = {
                name: [s * count + i for s in samples for i in range(count)]
                for name, samples in self.samples.items()
            }
            self._rows[key] = {name: torch.tensor(row, device=device) for name, row in rows.items()}
        return self._rows[key]

    def rows_of(
        self, names: tuple[str, ...], x: Tensor, owners: RowOwners
    ) -> tuple[Tensor, Tensor]:
        """Return the rows that run with one of `names`, in order, and their indices in `names`."""
        key = names, x.shape[0], x.device
        if owners.owner is None and key in self._sorted:
            return self._sorted[key]
        rows = self.rows_by_adapter(x.shape[0], x.device, owners)
        row = torch.cat([rows[name] for name in names])
        adapter = torch.cat([torch.full_like(rows[name], i) for i, name in enumerate(names)])
        order = row.argsort()
        result = row[order], adapter[order]
        if owners.owner is None:
            self._sorted[key] = result
        return result

    def subset(self, samples: dict[str, list[int]]) -> AdapterBatch:
        """Return the same call with adapters for only some of its samples."""
        result = copy.copy(self)
        result.samples = samples
        result._rows = {
            key: {name: rows[name] for name in samples} for key, rows in self._rows.items()
        }
        return result

    def index_tensor(self, values: tuple[int, ...], device: torch.device) -> Tensor:
        """Return integers as a tensor, made once a call, since making it waits for the device."""
        key = values, device
        if key not in self._indices:
            self._indices[key] = torch.tensor(values, device=device)
        return self._indices[key]

    @contextmanager
    def generating(self, model: nn.Module) -> Iterator[None]:
        """Context for a call of `generate`, in which each forward updates `call_rows`."""
        call_rows, handles = self.call_rows, []
        try:
            for entry in entry_modules(model):
                names = positional_names(entry.forward)

                def update(
                    module: nn.Module,
                    args: tuple[object, ...],
                    kwargs: dict[str, object] | None = None,  # none if removed by another thread
                    names: tuple[str, ...] = names,
                ) -> None:
                    if kwargs is not None and ADAPTER_BATCHES.current is self:
                        arguments = argument_shapes(bind_arguments(names, args, kwargs))
                        self.call_rows = call_rows.nested(arguments, is_generating=True)

                handles.append(entry.register_forward_pre_hook(update, with_kwargs=True))
            with ADAPTER_BATCHES.during(self):
                yield
        finally:
            self.call_rows = call_rows
            for handle in handles:
                handle.remove()


# None stands for a nested call that chooses no adapters by sample.
ADAPTER_BATCHES: CallStack[AdapterBatch | None] = CallStack()


def adapter_batch(names: object, known: Collection[str], call_rows: CallRows) -> AdapterBatch:
    """Return the adapters that the argument `adapter_names` of a call chooses, checked.

    Raises:
        PeftTypeError: `names` is not a list of strings.
        PeftValueError: A name is unknown, or there is not one for each sample.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise PeftTypeError(
            f"`adapter_names`={names!r} must be a list with an adapter's name for each sample."
        )
    unknown = sorted({name for name in names if name not in known and name != BASE_MODEL})
    if unknown:
        raise PeftValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; {BASE_MODEL!r} "
            f"means none, and this model has {adapters_there(unknown[0], known)}"
        )
    samples = len(names) if call_rows.samples is None else call_rows.samples
    if not names:
        raise PeftValueError("`adapter_names` is empty; pass an adapter's name for each sample.")
    if len(names) != samples:
        packed = "; texts packed into one row are one sample" if samples == 1 else ""
        raise PeftValueError(
            "Length of `adapter_names` should be the same as the number of inputs, "
            f"but got {len(names)} and {samples} respectively{packed}."
        )
    return AdapterBatch(names, call_rows)
