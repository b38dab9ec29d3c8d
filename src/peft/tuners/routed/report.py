# SPDX-License-Identifier: Apache-2.0
"""The use of experts in some calls of a model: by layer, and by token of the last call."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch import Tensor

from ...base.errors import PeftValueError
from ...base.tables import left_out, table
from ...base.validation import choice
from ...checkpoint.files import write_report
from .adapter import RoutedAdapter
from .choice import Choice
from .layer import RoutedLayer

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

# Largest number of experts and of layers that printing lists.
_LISTED = 20


class LayerUse(TypedDict):
    """The use of experts in a layer.

    Attributes:
        tokens: Number of tokens, without padding.
        weight: Mean weight of each expert.
        chosen: Share of the tokens for which an expert was chosen.
    """

    tokens: int
    weight: list[float]
    chosen: list[float]


@dataclass(repr=False)
class ExpertReport:
    """The use of experts in the calls that `watch_experts` saw. `print` shows a table of the
    experts and a table of the layers.

    Attributes:
        experts: Their names.
        layers: The use in each layer, by module path.
        tokens: Of the last call, the mean weight of experts for each token over the layers that saw
            an input of that shape, `[rows, tokens, experts]`; None without such an input.
    """

    experts: list[str]
    layers: dict[str, LayerUse] = field(default_factory=dict)
    tokens: Tensor | None = None

    def __repr__(self) -> str:
        return f"ExpertReport({len(self.experts)} experts, {len(self.layers)} layers)"

    def __str__(self) -> str:
        """Return two tables: each expert's use over all layers, the most used first; and each
        layer's most used experts. Long tables are cut.
        """
        seen = max((use["tokens"] for use in self.layers.values()), default=0)
        head = f"Use of {len(self.experts)} experts in {len(self.layers)} layers, {seen} tokens"
        return "\n".join([head, "", *self._expert_lines(), "", *self._layer_lines()])

    def _expert_lines(self) -> Iterator[str]:
        weight, chosen = self.mean("weight"), self.mean("chosen")
        order = sorted(range(len(self.experts)), key=lambda i: -abs(weight[i]))
        rows = [("expert", "weight", "chosen")]
        rows += [(self.experts[i], f"{weight[i]:.3f}", f"{chosen[i]:.1%}") for i in order[:_LISTED]]
        yield table(rows, right=[1, 2])
        yield from left_out(len(order), _LISTED, "experts")

    def _layer_lines(self) -> Iterator[str]:
        rows = [("layer", "most used")]
        for path, use in list(self.layers.items())[:_LISTED]:
            order = sorted(range(len(self.experts)), key=lambda i: -abs(use["weight"][i]))
            named = (f"{self.experts[i]} {use['weight'][i]:.2f}" for i in order[:3])
            rows.append((path, ", ".join(named)))
        yield table(rows)
        yield from left_out(len(self.layers), _LISTED, "layers")

    def mean(self, measure: Literal["weight", "chosen"]) -> list[float]:
        """Return "weight" or "chosen" of each expert, the mean over layers."""
        for problem in choice("measure", measure, ("weight", "chosen")):
            raise PeftValueError(problem)
        if not self.layers:
            return [0.0] * len(self.experts)
        return torch.tensor([use[measure] for use in self.layers.values()]).mean(0).tolist()

    def token_table(self, texts: Sequence[Sequence[str]] | None = None) -> str:
        """Return a table with the most used expert of each token of the last call.

        Args:
            texts: The tokens of each row as text; by default their places.

        Raises:
            PeftValueError: No call had an input `[rows, tokens, features]`.
        """
        if self.tokens is None:
            raise PeftValueError("No call had an input [rows, tokens, features] to list.")
        best, lines = self.tokens.max(-1), []
        for row in range(self.tokens.shape[0]):
            for place in range(self.tokens.shape[1]):
                text = texts[row][place] if texts is not None else str(place)
                name = self.experts[int(best.indices[row, place])]
                lines.append(f"{row}  {text:12}  {name}  {float(best.values[row, place]):.2f}")
        return "\n".join(lines)

    def to_pandas(self) -> DataFrame:
        """Return a data frame with a row for each layer and expert."""
        import pandas

        rows = [
            {"layer": path, "expert": name, "weight": weight, "chosen": chosen}
            for path, use in self.layers.items()
            for name, weight, chosen in zip(self.experts, use["weight"], use["chosen"], strict=True)
        ]
        return pandas.DataFrame(rows)

    def to_dict(self) -> dict[str, object]:
        """Return the report, without single tokens, as values of JSON."""
        return {"experts": self.experts, "layers": dict(self.layers)}

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report to a file; a missing folder is created."""
        write_report(path, self.to_dict())

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the mean weight of each expert in each layer, with matplotlib.

        Args:
            path: A file for the figure, its suffix says the format; None saves nothing.
        """
        from matplotlib.figure import Figure

        width, height = 0.3 * len(self.experts) + 4, 0.2 * len(self.layers) + 2
        figure = Figure(figsize=(min(width, 24), min(height, 24)), dpi=120, layout="constrained")
        axes = figure.subplots()
        weights = [use["weight"] for use in self.layers.values()]
        image = axes.imshow(weights, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set_yticks(range(len(self.layers)), list(self.layers), fontsize=7)
        axes.set_xticks(range(len(self.experts)), self.experts, rotation=90, fontsize=8)
        axes.set_title("Weight of each expert, by layer", loc="left", fontsize=11)
        figure.colorbar(image, label="mean weight")
        if path is not None:
            figure.savefig(path)
        return figure


class ExpertWatch:
    """Sums over the calls of a model; `report` makes an `ExpertReport` of them."""

    def __init__(self, adapter: RoutedAdapter) -> None:
        self._adapter, self._number = adapter, adapter.config.n_tasks
        self._sums: dict[str, tuple[Tensor, Tensor, int]] = {}
        self._tokens: dict[str, Tensor] = {}

    @torch.no_grad()
    def note(self, path: str, layer: RoutedLayer, choice: Choice, x: Tensor) -> None:
        """Add a layer's choice for an input `[rows, *leading, in]`."""
        experts = layer.factors(self._adapter.name)
        here = _weights_by_row(choice, len(experts), x).float().cpu()  # [*rows, experts here]
        weights = here.new_zeros(*here.shape[:-1], self._number)
        weights[..., experts.numbers.cpu()] = here
        mask = layer.routing.real_tokens(x, layer)
        real = weights.flatten(0, -2) if mask is None else weights[mask.cpu()]
        weight, chosen, count = real.sum(0), (real != 0).float().sum(0), len(real)
        if (sums := self._sums.get(path)) is not None:
            weight, chosen, count = sums[0] + weight, sums[1] + chosen, sums[2] + count
        self._sums[path] = weight, chosen, count
        if weights.dim() == 3:
            self._tokens[path] = weights

    def report(self) -> ExpertReport:
        """Return the use of experts so far."""
        layers: dict[str, LayerUse] = {}
        for path, (weight, chosen, count) in self._sums.items():
            tokens = max(count, 1)
            layers[path] = {
                "tokens": count,
                "weight": (weight / tokens).tolist(),
                "chosen": (chosen / tokens).tolist(),
            }
        last = list(self._tokens.values())
        same = [table for table in last if table.shape == last[0].shape]
        tokens_seen = torch.stack(same).mean(0) if same else None
        return ExpertReport(list(self._adapter.config.experts), layers, tokens_seen)


def _weights_by_row(choice: Choice, number: int, x: Tensor) -> Tensor:
    """Return the weights of a layer's experts for its input, `[rows, *leading, experts]`."""
    shape = x.shape[:-1]
    if choice.weights.dim() == 1:
        return choice.weights.expand(*shape, number)
    weights = choice.weights.flatten(0, -2)
    if choice.experts is not None:
        experts = choice.experts.flatten(0, -2)
        # Weights of tokens, where experts are of samples.
        experts = experts.repeat_interleave(len(weights) // len(experts), 0)
        weights = weights.new_zeros(len(weights), number).scatter(1, experts, weights)
    rows = x.numel() // x.shape[-1]
    return weights.repeat_interleave(rows // len(weights), 0).view(*shape, number)


@contextmanager
def watch_experts(adapter: RoutedAdapter) -> Iterator[ExpertWatch]:
    """Context in which a watch sees the choices of an adapter's layers; several may overlap."""
    watch, layers = ExpertWatch(adapter), adapter.layers
    routings = {layer.routing for layer in layers.values()}
    notes = {layer: partial(watch.note, path) for path, layer in layers.items()}
    for layer, note in notes.items():
        layer.watches.setdefault(adapter.name, []).append(note)
    for routing in routings:
        routing.watches.append(watch)
    try:
        yield watch
    finally:
        for layer, note in notes.items():
            layer.watches[adapter.name].remove(note)
            if not layer.watches[adapter.name]:
                del layer.watches[adapter.name]
        for routing in routings:
            routing.watches.remove(watch)
