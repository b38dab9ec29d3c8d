# SPDX-License-Identifier: Apache-2.0
"""Apply the adapter that a call chose for each sample to the rows of that sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..base.calls.adapter_batch import AdapterBatch
from ..base.calls.layout import RowLayout
from ..base.calls.rows import RowOwners
from ..ops.nested import dense
from .base_layer import output_dtype


class _Layer(Protocol):
    """The members of a layer that this file uses."""

    @property
    def layout(self) -> RowLayout: ...
    @property
    def scaling(self) -> Mapping[str, float]: ...
    def apply_to_any(self, adapter_name: str, x: Tensor, result: Tensor) -> Tensor: ...
    def apply_by_sample(
        self, batch: AdapterBatch, x: Tensor, result: Tensor, owners: RowOwners
    ) -> Tensor: ...
    def apply_to_samples(
        self, adapter_name: str, samples: list[int], x: Tensor, result: Tensor, owner: Tensor | None
    ) -> Tensor: ...


def apply_to_batch(layer: _Layer, batch: AdapterBatch, x: Tensor, result: Tensor) -> Tensor:
    """Return an output with each sample's own adapter applied to its rows."""
    if batch.only is not None:
        if batch.only not in layer.scaling:
            return result
        dtype = output_dtype(layer, result)
        return layer.apply_to_any(batch.only, x, result).to(dtype)
    owners, x = batch.row_owners(x, layer), dense(x)
    if not owners.sequence_first:
        return layer.apply_by_sample(batch, x, result, owners)
    turned = layer.apply_by_sample(batch, x.transpose(0, 1), result.transpose(0, 1), owners)
    return turned.transpose(0, 1).contiguous()


def apply_one_by_one(
    layer: _Layer, batch: AdapterBatch, x: Tensor, result: Tensor, owners: RowOwners
) -> Tensor:
    """Apply each sample's adapter to its rows: one gather for each adapter, one scatter for all."""
    by_adapter = {
        name: rows
        for name, rows in batch.rows_by_adapter(x.shape[0], x.device, owners).items()
        if name in layer.scaling and name in batch.samples
    }
    if not by_adapter:
        return result
    owner = owners.owner
    dtype = output_dtype(layer, result)
    changed = [
        layer.apply_to_samples(
            name, batch.samples[name], x[rows], result[rows], None if owner is None else owner[rows]
        ).to(dtype)
        for name, rows in by_adapter.items()
    ]
    return result.index_copy(0, torch.cat(list(by_adapter.values())), torch.cat(changed))
