# SPDX-License-Identifier: Apache-2.0
"""Modules with the tensors of a layer's experts: their frozen factors, and their weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...base.geometry import Placement
from ...ops.low_rank import approximate
from .deltas import LayerExperts
from .products import Factors


class ExpertFactors(nn.Module):
    """The factors of a layer's experts side by side, `Factors`. They are frozen, and in no
    adapter's file.

    Attributes:
        ranks: The rank of each expert here, and last that of the general delta.
        numbers: The number of each expert that adapts the layer, by its place here.
        has_all: True if all experts of the adapter adapt the layer, in their order.
        has_general: True if the last place has the delta to subtract from each expert.
        place: The place of each of the adapter's experts, `[experts]`; 0 for one that is not here.
        is_here: 1 for an expert that adapts the layer, else 0, `[experts]`.
    """

    down: Tensor
    up: Tensor
    owner: Tensor
    rows: Tensor
    real: Tensor | None
    numbers: Tensor
    place: Tensor
    is_here: Tensor

    def __init__(self, experts: LayerExperts, placement: Placement) -> None:
        super().__init__()
        device, dtype = placement
        if device.type == "meta":
            device = torch.device("cpu")  # no checkpoint would fill them
        self.has_general = experts.general is not None
        self.has_all = list(experts.deltas) == list(range(experts.number))
        parts = list(experts.deltas.values())
        parts += [] if experts.general is None else [experts.general]
        self.ranks = [part.rank for part in parts]
        ranks, numbers = torch.tensor(self.ranks), torch.tensor(list(experts.deltas))
        place, is_here = torch.zeros(experts.number, dtype=torch.long), torch.zeros(experts.number)
        place[numbers], is_here[numbers] = torch.arange(len(numbers)), 1.0
        steps = torch.arange(max(self.ranks))
        real = steps < ranks.unsqueeze(1)
        tensors = {
            "down": torch.cat([part.A.to(device, dtype) for part in parts]),
            "up": torch.cat([part.B.mT.to(device, dtype) for part in parts]),
            "owner": torch.arange(len(parts)).repeat_interleave(ranks),
            "rows": (ranks.cumsum(0) - ranks).unsqueeze(1) + torch.where(real, steps, 0),
            "real": None if real.all() else real.to(dtype),
            "numbers": numbers,
            "place": place,
            "is_here": is_here.to(dtype),
        }
        for name, tensor in tensors.items():
            moved = None if tensor is None else tensor.detach().to(device).contiguous()
            self.register_buffer(name, moved, persistent=False)

    def forward(self) -> Factors:
        """Return the factors, by a call that offloading libraries see."""
        return Factors(self.down, self.up, self.owner, self.rows, self.real)

    def __len__(self) -> int:
        """Return the number of experts that adapt the layer."""
        return self.numbers.shape[0]

    def deltas(self) -> LayerExperts:
        """Return the experts' deltas."""
        factors = self()
        downs, ups = factors.down.split(self.ranks), factors.up.split(self.ranks)
        parts = [approximate(up.mT, down) for down, up in zip(downs, ups, strict=True)]
        general = parts.pop() if self.has_general else None
        numbers = self.numbers.tolist()
        return LayerExperts(dict(zip(numbers, parts, strict=True)), len(self.place), general)

    def blend(self, shares: Mapping[int, float]) -> tuple[Tensor, Tensor]:
        """Return `A [r, in]` and `B [out, r]` of the sum of experts' deltas, each times its share.

        Args:
            shares: By the expert's number.
        """
        factors = self()
        each = factors.down.new_zeros(self.rows.shape[0])
        for place, number in enumerate(self.numbers.tolist()):
            each[place] = shares.get(number, 0.0)
        if self.has_general:
            each[-1] = -each[:-1].sum()
        kept = (each != 0).index_select(0, factors.owner)
        if not kept.any():
            kept[0] = True  # a rank of at least 1
        weights = each.index_select(0, factors.owner)[kept]
        return factors.down[kept], (factors.up[kept] * weights.unsqueeze(1)).mT

    def extra_repr(self) -> str:
        """Return the sizes."""
        general = ", general=True" if self.has_general else ""
        return f"experts={len(self)}, ranks={min(self.ranks)} to {max(self.ranks)}{general}"


class ExpertWeights(nn.Module):
    """A factor on the delta of each expert, `values [experts]`."""

    def __init__(self, number: int, placement: Placement) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.empty(number, device=placement[0], dtype=placement[1]))

    def forward(self) -> Tensor:
        """Return the values, by a call that offloading libraries see."""
        return self.values


class SharedWeights(nn.Module):
    """Placeholder in a layer that uses the weights of another layer, where alone they are
    registered.
    """

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__()
        self._held = (weights,)  # in a tuple, so that torch does not register it

    def forward(self) -> Tensor:
        """Return the other layer's values."""
        return self._held[0]()
