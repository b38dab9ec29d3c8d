# SPDX-License-Identifier: Apache-2.0
"""Similarity of adapters: inner products, cosines and distances of their deltas, in each layer
and in all together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..base.errors import PeftValueError
from ..base.suggestions import did_you_mean
from ..base.tables import left_out, table
from ..base.validation import at_least, check_flags
from ..checkpoint.files import write_report
from ..ops import similarity as _ops
from ..ops.clustering import Link, linkage
from ..ops.low_rank import LowRank
from ..ops.similarity import inner_products
from .plotting import plot_similarity
from .sources import Adapters, DeltaSource, Experts

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

# The key of all layers together.
_ALL = ""
# Largest number of adapters and of layers that printing lists.
_LISTED = 20


@dataclass(repr=False)
class AdapterSimilarity:
    """Inner products of adapters' deltas. `print` shows a table of the adapters and a table of the
    layers; of two adapters, a comparison by layer.

    Attributes:
        names: The adapters. A task of an adapter with several is "adapter.task".
        products: `⟨Δ_i, Δ_j⟩`, the sum over all layers, `[n, n]`, on the CPU in float64. A layer
            that an adapter does not adapt counts as zero.
        layers: The same of each layer, by module path; empty if they were not kept.
        source: Where the deltas are read.
    """

    names: list[str]
    products: Tensor
    layers: dict[str, Tensor]
    source: DeltaSource = field(compare=False)

    def norms(self, layer: str | None = None) -> Tensor:
        """Return the Frobenius norms of the deltas, `[n]`, of a layer or of all together."""
        return _ops.norms(self._of(layer))

    def cosines(self, layer: str | None = None) -> Tensor:
        """Return `⟨Δ_i, Δ_j⟩ / (‖Δ_i‖·‖Δ_j‖)`, `[n, n]`; 0 where one of the deltas is zero."""
        return _ops.cosines(self._of(layer))

    def distances(self, layer: str | None = None) -> Tensor:
        """Return `‖Δ_i − Δ_j‖`, `[n, n]`."""
        return _ops.distances(self._of(layer))

    def tree(self) -> tuple[list[Link], list[int]]:
        """Return the tree of average linkage by cosine, and the adapters in its order: alike ones
        beside each other. Without scipy no tree, and the adapters as they are.
        """
        return linkage(self.cosines())

    def _of(self, layer: str | None) -> Tensor:
        if layer is None:
            return self.products
        if isinstance(layer, str) and layer in self.layers:
            return self.layers[layer]
        kept = "they were not kept by layer" if not self.layers else f"{len(self.layers)} are"
        raise PeftValueError(
            f"There are no inner products of layer {layer!r}; {kept}."
            f"{did_you_mean(str(layer), self.layers)}"
        )

    def __repr__(self) -> str:
        return f"AdapterSimilarity({len(self.names)} adapters, {len(self.layers)} layers)"

    def __str__(self) -> str:
        """Return the tables. Long ones are cut."""
        lines = self._pair_lines() if len(self.names) == 2 else self._adapter_lines()
        return "\n".join(lines)

    def _pair_lines(self) -> Iterator[str]:
        first, second = self.names
        yield f"Δ1 = {first}, Δ2 = {second}"
        rows = [("layer", "‖Δ1‖", "‖Δ2‖", "‖Δ1 − Δ2‖", "cosine")]
        for layer in (*self.layers, None):
            one, two = self.norms(layer).tolist()
            gap, cosine = float(self.distances(layer)[0, 1]), float(self.cosines(layer)[0, 1])
            numbers = f"{one:.4g}", f"{two:.4g}", f"{gap:.4g}", f"{cosine:.3f}"
            rows.append((layer or "all layers", *numbers))
        yield table(rows, right=[1, 2, 3, 4])

    def _adapter_lines(self) -> Iterator[str]:
        cosines, norms = self.cosines(), self.norms()
        others = cosines.clone().fill_diagonal_(-torch.inf)
        rows = [("adapter", "norm", "most alike", "cosine")]
        for i in self.tree()[1][:_LISTED]:
            j = int(others[i].argmax())
            nearest = (self.names[j], f"{float(others[i, j]):.3f}") if j != i else ("", "")
            rows.append((self.names[i], f"{float(norms[i]):.4g}", *nearest))
        yield table(rows, right=[1, 3])
        yield from left_out(len(self.names), _LISTED, "adapters")
        if self.layers and len(self.names) > 1:
            yield from self._layer_lines()

    def _layer_lines(self) -> Iterator[str]:
        rows = [("cosines by layer", "mean", "least", "most")]
        for layer in (*islice(self.layers, _LISTED), None):
            pairs = _pairs(self.cosines(layer))
            mean, least, most = (f"{float(n):.3f}" for n in (pairs.mean(), *pairs.aminmax()))
            rows.append((layer or "all layers", mean, least, most))
        yield ""
        yield table(rows, right=[1, 2, 3])
        yield from left_out(len(self.layers), _LISTED, "layers")

    def rows(self) -> Iterator[dict[str, str | float]]:
        """Yield a row for each pair of adapters and each layer, "" for all layers together:
        `layer`, `first`, `second`, `product`, `cosine` and `distance`.
        """
        layers: list[str | None] = [None, *self.layers]
        for layer in layers:
            tables = [
                table.tolist()
                for table in (self._of(layer), self.cosines(layer), self.distances(layer))
            ]
            for i, first in enumerate(self.names):
                for j, second in enumerate(self.names[:i]):
                    product, cosine, distance = (table[i][j] for table in tables)
                    yield {
                        "layer": layer or "",
                        "first": second,
                        "second": first,
                        "product": product,
                        "cosine": cosine,
                        "distance": distance,
                    }

    def to_pandas(self) -> dict[str, DataFrame]:
        """Return data frames by name: "pairs" has `rows`, "cosines" the table of all layers
        together, and "norms" a row for each layer and a column for each adapter.
        """
        import pandas

        norms = {layer: self.norms(layer).tolist() for layer in self.layers}
        norms["all layers"] = self.norms().tolist()
        return {
            "pairs": pandas.DataFrame(list(self.rows())),
            "cosines": pandas.DataFrame(
                self.cosines().numpy(), index=self.names, columns=self.names
            ),
            "norms": pandas.DataFrame.from_dict(norms, orient="index", columns=self.names),
        }

    def to_dict(self) -> dict[str, object]:
        """Return the similarity as values of JSON."""
        return {
            "names": self.names,
            "norms": self.norms().tolist(),
            "cosines": self.cosines().tolist(),
            "products": self.products.tolist(),
            "layers": {path: table.tolist() for path, table in self.layers.items()},
        }

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the similarity to a file; a missing folder is created."""
        write_report(path, self.to_dict())

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the table of cosines with the tree of adapters, and the mean cosine of each layer,
        with matplotlib.

        Args:
            path: A file for the figure, its suffix says the format; None saves nothing.
        """
        links, order = self.tree()
        several = self.layers if len(self.names) > 1 else ()
        means = {path: float(_pairs(self.cosines(path)).mean()) for path in several}
        figure = plot_similarity(self.names, self.cosines(), order, links, means)
        if path is not None:
            figure.savefig(path)
        return figure


def adapter_similarity(
    model: nn.Module,
    adapters: Adapters | None = None,
    *,
    by_layer: bool = True,
    memory: int = 2**31,
) -> AdapterSimilarity:
    """Return the similarity of adapters, of any methods and ranks: of their deltas, whatever the
    factors that these are written in.

    With the factors of all adapters side by side, two products a layer give all pairs:
    `⟨Δ_i, Δ_j⟩ = Σ (B_iᵀ·B_j) ∘ (A_i·A_jᵀ)`, in float64. Modules that adapters train in full beside
    their deltas, such as heads, do not count.

    Args:
        model: The base model, or a model with adapters. It is not changed.
        adapters: Names of adapters of the model; folders or ids on the Hub; an `AdapterLibrary`; or
            a dictionary with a saved adapter for each name: a folder, an id, what `library.load`
            returns, or a pair of config and tensors. None: all adapters of the model.
        by_layer: Keep the inner products of each layer too, `layers·n²` numbers: of thousands of
            adapters more than the memory may hold.
        memory: Bytes that the factors of a block of adapters may take. Two blocks are in memory at
            a time, and each is read again for every later one.

    Returns:
        The similarity; printing it shows tables.

    Raises:
        PeftTypeError: `adapters` has entries of another type.
        PeftValueError: There are no adapters, or an adapter is unknown or comes twice.
        CheckpointError: An adapter is missing or damaged, or does not fit the base model.
        PeftNotSupportedError: An adapter's delta depends on the input, or has weight decomposition
            (DoRA).
        UnsupportedModuleError: A layer's delta is not a low-rank product.

    Example:
        >>> from peft import LoKrConfig, LoraConfig, get_peft_model
        >>> base = nn.Sequential(nn.Linear(8, 6))
        >>> lora = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(base, lora, "a")
        >>> model.add_adapter("b", lora)
        >>> similarity = adapter_similarity(model)
        >>> one, two = (model.base_model.model[0].get_delta_weight(name) for name in "ab")
        >>> torch.allclose(similarity.distances()[0, 1].float(), (one - two).norm())
        True

    Source: arXiv:2405.11157, section 3
    """
    for problem in at_least("memory", memory, most=None):
        raise PeftValueError(problem)
    check_flags(by_layer=by_layer)
    source = DeltaSource.of(model, adapters)
    names: list[list[str]] = []  # of each block
    blocks: list[list[str]] = []
    pieces: dict[tuple[int, int], dict[str, Tensor]] = {}
    for number, (adapter_names, block) in enumerate(source.blocks(memory)):
        for other, earlier in enumerate([*blocks, None]):
            columns = block if earlier is None else source.read_all(earlier)
            pieces[number, other] = _products(block, columns, by_layer)
        blocks.append(adapter_names)
        names.append(list(block))
    sizes = [len(block) for block in names]
    paths = dict.fromkeys(path for piece in pieces.values() for path in piece)
    tables = {path: _assembled(pieces, path, sizes) for path in paths}
    total = tables.pop(_ALL)
    return AdapterSimilarity([name for block in names for name in block], total, tables, source)


def _products(rows: Experts, columns: Experts, by_layer: bool) -> dict[str, Tensor]:
    """Return the inner products `[n, m]` of all pairs by layer if wanted, and of all layers."""
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    result = {_ALL: total}
    for path in dict.fromkeys(path for deltas in rows.values() for path in deltas):
        left = _with_layer(rows, path)
        right = left if columns is rows else _with_layer(columns, path)
        if not right.numbers:
            continue
        products = inner_products(left.deltas, right.deltas).to(total)
        entries = torch.tensor(left.numbers).unsqueeze(1), torch.tensor(right.numbers)
        total[entries] += products
        if by_layer:
            result[path] = torch.zeros_like(total)
            result[path][entries] = products
    return result


class _Layer(NamedTuple):
    """The deltas of a layer, and the numbers of the experts that have one."""

    numbers: list[int]
    deltas: list[LowRank]


def _with_layer(experts: Experts, path: str) -> _Layer:
    found = {i: deltas[path] for i, deltas in enumerate(experts.values()) if path in deltas}
    return _Layer(list(found), list(found.values()))


def _assembled(
    pieces: Mapping[tuple[int, int], Mapping[str, Tensor]], path: str, sizes: Sequence[int]
) -> Tensor:
    """Return a symmetric table of the pieces on and below its diagonal; missing ones are zero."""
    result = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    for (row, column), piece in pieces.items():
        if path in piece:
            result[ends[row] : ends[row + 1], ends[column] : ends[column + 1]] = piece[path]
            result[ends[column] : ends[column + 1], ends[row] : ends[row + 1]] = piece[path].mT
    return result


def _pairs(matrix: Tensor) -> Tensor:
    """Return the entries of all pairs of a symmetric matrix."""
    rows, columns = torch.tril_indices(len(matrix), len(matrix), -1)
    return matrix[rows, columns]
