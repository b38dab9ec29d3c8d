# SPDX-License-Identifier: Apache-2.0
"""Which vectors of a bank serve which layers and factors: counted, tabulated and drawn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...base.containers import walk
from ...checkpoint.files import write_report
from ...config import as_folder
from ...core.adapter_choice import adapter_of
from .bank import select_topk
from .config import Form
from .layer import VBLoRALayer


class Use(NamedTuple):
    """How one factor of one layer uses the bank.

    Args:
        layer: The layer's path.
        factor: "A" (input side) or "B" (output side).
        counts: How many positions chose each vector, `[num_vectors]`.
        weights: What weight these choices have together, `[num_vectors]`; sums to the number of
            positions.
    """

    layer: str
    factor: str
    counts: Tensor
    weights: Tensor


class BankUsage:
    """How an adapter uses its bank.

    Args:
        uses: An entry for each factor of each layer, in the model's order.
        num_vectors: Size of the bank.

    Attributes:
        uses: As given.
        num_vectors: As given.
    """

    def __init__(self, uses: list[Use], num_vectors: int) -> None:
        self.uses = uses
        self.num_vectors = num_vectors

    def counts(self, factor: str | None = None) -> Tensor:
        """How many positions chose each vector, `[num_vectors]`, in one factor or in both."""
        return torch.stack([use.counts for use in self.uses if factor in (None, use.factor)]).sum(0)

    def summary(self) -> dict[str, float]:
        """The bank's usage in a few numbers.

        Returns:
            `num_vectors`; `positions`; `used`: vectors that any position chose; `only_A`, `only_B`,
            `both`: those used on one side or on both; `effective`: exp of the entropy of the
            choices' weights, as many vectors as would be used alike; `top_tenth`: the share of all
            weight that the most used tenth of the vectors has.
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

    def rows(self) -> list[dict[str, Any]]:
        """A row for each vector that a factor of a layer uses: `layer`, `factor`, `vector`,
        `count`, `weight`.
        """
        return [
            {
                "layer": use.layer,
                "factor": use.factor,
                "vector": i,
                "count": int(use.counts[i]),
                "weight": float(use.weights[i]),
            }
            for use in self.uses
            for i in use.counts.nonzero().flatten().tolist()
        ]

    def to_pandas(self) -> Any:
        """`rows` as a pandas `DataFrame`."""
        import pandas

        return pandas.DataFrame(
            self.rows(), columns=["layer", "factor", "vector", "count", "weight"]
        )

    def save_json(self, path: str | os.PathLike) -> None:
        """Write `summary` and `rows` to a file; its folder is made if missing."""
        write_report(path, {"summary": self.summary(), "rows": self.rows()})

    def __repr__(self) -> str:
        return f"BankUsage({len(self.uses)} factors, num_vectors={self.num_vectors})"

    def __str__(self) -> str:
        """A table: a line for each factor of each layer, and the summary."""
        width = max(len(use.layer) for use in self.uses)
        lines = [f"{'layer':{width}}  factor  positions  vectors  most used"]
        for use in self.uses:
            positions, used = int(use.weights.sum().round()), int((use.counts > 0).sum())
            best = ", ".join(
                f"{i} ({int(use.counts[i])})"
                for i in use.counts.argsort(descending=True, stable=True)[:3].tolist()
            )
            lines.append(f"{use.layer:{width}}  {use.factor:6}  {positions:9}  {used:7}  {best}")
        s = self.summary()
        lines.append(
            f"{s['used']} of {s['num_vectors']} used: {s['only_A']} in A only, {s['only_B']} in B "
            f"only, {s['both']} in both; "
            f"effectively {s['effective']:.1f}; the most used tenth has {100 * s['top_tenth']:.0f} "
            "% of the weight"
        )
        return "\n".join(lines)

    def plot(self, folder: str | os.PathLike) -> list[Path]:
        """Draw the map of selections, the histogram of how often vectors are chosen, and the usage
        by layer.

        Args:
            folder: Where "bank_map.png", "bank_histogram.png" and "bank_layers.png" go; made if
                missing.

        Returns:
            The files' paths.
        """
        from .drawing import draw

        place = as_folder(folder)
        place.mkdir(parents=True, exist_ok=True)
        return draw(self, place)


def bank_usage(model: Any, adapter_name: str | None = None) -> BankUsage:
    """How an adapter of a model uses its vector bank.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        adapter_name: The adapter, in any form: logits, or indices and weights; by default the one
            called "default", else the only one that is active.

    Raises:
        PeftValueError: The model has no such adapter, or several could be meant.

    Example:
        >>> from peft import VBLoRAConfig, get_peft_model
        >>> config = VBLoRAConfig(r=2, num_vectors=6, vector_length=4, target_modules=["0"])
        >>> usage = bank_usage(get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config))
        >>> usage.summary()["positions"], usage.counts("A").sum()
        (8, tensor(8))

    Source: arXiv:2405.15179
    """
    adapter_name = adapter_of(model, adapter_name, VBLoRALayer, " with a vector bank")
    uses, size = [], 0
    for path, layer in walk(model):
        if not isinstance(layer, VBLoRALayer) or adapter_name not in layer.scaling:
            continue
        size = len(layer.bank(adapter_name))
        path = path.removeprefix("base_model.model.")
        for factor, (indices, weights) in zip("AB", _choices(layer, adapter_name), strict=True):
            indices, weights = (
                indices.detach().cpu().long().flatten(),
                weights.detach().cpu().double().flatten(),
            )
            counts = torch.bincount(indices, minlength=size)
            uses.append(
                Use(
                    path,
                    factor,
                    counts,
                    torch.zeros(size, dtype=torch.float64).index_add(0, indices, weights),
                )
            )
    return BankUsage(uses, size)


def _choices(layer: VBLoRALayer, adapter_name: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """Indices and weights `[…, topk]` for `A` and for `B`."""
    if layer.form[adapter_name] is not Form.LOGITS:
        return layer.chosen(adapter_name)
    found = (select_topk(logits, layer.topk[adapter_name]) for logits in layer.logits(adapter_name))
    return tuple((indices, logits.softmax(-1, dtype=torch.float32)) for indices, logits in found)
