# SPDX-License-Identifier: Apache-2.0
"""Usage of a vector bank: the vectors that each factor of each layer selects, as counts, tables and
figures.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from ...base.calls.running import holds
from ...base.containers import walk
from ...base.tables import table
from ...checkpoint.files import write_report
from ...checkpoint.paths import as_folder
from ...core.adapter_choice import adapter_of
from .layer import VBLoRALayer
from .plotting import plot_bank_usage

if TYPE_CHECKING:
    from pandas import DataFrame


class FactorUsage(NamedTuple):
    """Usage of the bank by one factor of one layer.

    Args:
        layer: The layer's path.
        factor: "A" (input side) or "B" (output side).
        counts: Number of tiles that select each vector, `[num_vectors]`.
        weights: Sum of the tiles' weights of each vector, `[num_vectors]`; its total is the number
            of tiles.
    """

    layer: str
    factor: str
    counts: Tensor
    weights: Tensor


class UsageRow(TypedDict):
    """Row of `BankUsage.rows`: one vector that a factor of a layer uses."""

    layer: str
    factor: str
    vector: int
    count: int
    weight: float


class BankUsage:
    """Usage of a bank by an adapter.

    Args:
        uses: An entry for each factor of each layer, in the model's order.
        num_vectors: Size of the bank.
    """

    def __init__(self, uses: list[FactorUsage], num_vectors: int) -> None:
        self.uses = uses
        self.num_vectors = num_vectors

    def counts(self, factor: str | None = None) -> Tensor:
        """Return the number of tiles that select each vector, `[num_vectors]`.

        Args:
            factor: "A" or "B" to count only in that factor; None for both.
        """
        return torch.stack([use.counts for use in self.uses if factor in (None, use.factor)]).sum(0)

    def summary(self) -> dict[str, float]:
        """Return a few numbers that describe the usage.

        Returns:
            `num_vectors`; `positions`, the number of tiles; `used`, the number of vectors that any
            tile selects; `only_A`, `only_B` and `both`, of these the number in one factor or in
            both; `effective`, the exponential of the entropy of the vectors' weights, which is
            `num_vectors` if all have the same weight; `top_tenth`, the share of the weight on the
            most used tenth of the vectors.
        """
        a, b = self.counts("A") > 0, self.counts("B") > 0
        weights = torch.stack([use.weights for use in self.uses]).sum(0).double()
        shares = weights / weights.sum()
        entropy = -(shares * shares.clamp(min=1e-300).log()).sum()
        tenth = max(1, round(self.num_vectors / 10))
        return {
            "num_vectors": self.num_vectors,
            "positions": int(weights.sum().round()),
            "used": int((a | b).sum()),
            "only_A": int((a & ~b).sum()),
            "only_B": int((b & ~a).sum()),
            "both": int((a & b).sum()),
            "effective": float(entropy.exp()),
            "top_tenth": float(shares.sort(descending=True).values[:tenth].sum()),
        }

    def rows(self) -> list[UsageRow]:
        """Return a row for each vector that a factor of a layer uses."""
        return [
            UsageRow(
                layer=use.layer,
                factor=use.factor,
                vector=i,
                count=int(use.counts[i]),
                weight=float(use.weights[i]),
            )
            for use in self.uses
            for i in use.counts.nonzero().flatten().tolist()
        ]

    def to_pandas(self) -> DataFrame:
        """Return `rows` as a pandas `DataFrame`."""
        import pandas

        return pandas.DataFrame(self.rows(), columns=list(UsageRow.__annotations__))

    def save_json(self, path: str | os.PathLike) -> None:
        """Write `summary` and `rows` to a file; its folder is made if missing."""
        write_report(path, {"summary": self.summary(), "rows": self.rows()})

    def __repr__(self) -> str:
        return f"BankUsage({len(self.uses)} factors, num_vectors={self.num_vectors})"

    def __str__(self) -> str:
        """Return a table with a line for each factor of each layer, and the summary."""
        heading = ("layer", "factor", "positions", "vectors", "most used")
        rows: list[tuple[str, ...]] = [heading]
        for use in self.uses:
            numbers = use.weights.sum().round(), (use.counts > 0).sum()
            best = ", ".join(
                f"{i} ({int(use.counts[i])})"
                for i in use.counts.argsort(descending=True, stable=True)[:3].tolist()
            )
            rows.append((use.layer, use.factor, *(str(int(n)) for n in numbers), best))
        s = self.summary()
        return (
            f"{table(rows, right=[2, 3])}\n"
            f"{s['used']} of {s['num_vectors']} used: {s['only_A']} in A only, {s['only_B']} in B "
            f"only, {s['both']} in both; effectively {s['effective']:.1f}; the most used tenth has "
            f"{100 * s['top_tenth']:.0f} % of the weight"
        )

    def plot(self, folder: str | os.PathLike) -> list[Path]:
        """Draw the weight of each vector in each factor, the histogram of selections, and the
        number of vectors that each layer uses. Needs matplotlib.

        Args:
            folder: Folder for "bank_map.png", "bank_histogram.png" and "bank_layers.png"; made if
                missing.

        Returns:
            The files' paths.
        """
        folder = as_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        summary = self.summary()
        return plot_bank_usage(
            folder,
            [(use.layer, use.factor) for use in self.uses],
            torch.stack([use.counts for use in self.uses]),
            torch.stack([use.weights for use in self.uses]),
            f"{summary['used']} of {self.num_vectors} vectors used, effectively "
            f"{summary['effective']:.0f}",
        )


@holds
def bank_usage(model: nn.Module, adapter_name: str | None = None) -> BankUsage:
    """Return the usage of its vector bank by an adapter of a model.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        adapter_name: The adapter, in any storage format; by default the one called "default", else
            the only one that is active.

    Raises:
        PeftValueError: The model has no such adapter, or the choice is ambiguous.

    Example:
        >>> from peft import VBLoRAConfig, get_peft_model
        >>> config = VBLoRAConfig(r=2, num_vectors=6, vector_length=4, target_modules=["0"])
        >>> usage = bank_usage(get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config))
        >>> usage.summary()["positions"], usage.counts("A").sum()
        (8, tensor(8))

    Source: arXiv:2405.15179, section 3
    """
    adapter_name = adapter_of(model, adapter_name, VBLoRALayer, " with a vector bank")
    uses, num_vectors = [], 0
    for path, layer in walk(model):
        if not isinstance(layer, VBLoRALayer) or adapter_name not in layer.scaling:
            continue
        num_vectors = len(layer.bank(adapter_name))
        path = path.removeprefix("base_model.model.")
        for factor, (indices, weights) in zip("AB", layer.selections(adapter_name), strict=True):
            indices = indices.detach().cpu().long().flatten()
            weights = weights.detach().cpu().double().flatten()
            total = torch.zeros(num_vectors, dtype=torch.float64).index_add(0, indices, weights)
            counts = torch.bincount(indices, minlength=num_vectors)
            uses.append(FactorUsage(path, factor, counts, total))
    return BankUsage(uses, num_vectors)
