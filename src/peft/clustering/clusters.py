# SPDX-License-Identifier: Apache-2.0
"""Clusters of adapters by the similarity of their deltas, and their experts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..base.errors import PeftTypeError, PeftValueError
from ..base.plain_values import plain
from ..base.progress import track
from ..base.suggestions import listed
from ..base.tables import counted, table
from ..base.validation import at_least, choice
from ..checkpoint.files import write_report
from ..checkpoint.paths import as_folder
from ..core.conversion import write_conversion
from ..ops.clustering import Partition, cut_tree, inertia, k_means, linkage, silhouettes
from ..ops.similarity import distances
from ..tuners.poly.conversion import PolyConversion
from . import experts
from .plotting import plot_similarity
from .similarity import AdapterSimilarity, adapter_similarity
from .sources import Adapters

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Method = Literal["k-means", "average"]
Metric = Literal["cosine", "euclidean"]


class ClusterRow(NamedTuple):
    """A cluster in a table.

    Attributes:
        cluster: Its name.
        size: Number of members.
        cosine: Mean cosine of its pairs, None for a single member.
        silhouette: Mean of its members.
        medoid: The most central member.
        members: All members.
    """

    cluster: str
    size: int
    cosine: float | None
    silhouette: float
    medoid: str
    members: list[str]


@dataclass(repr=False)
class AdapterClusters:
    """Clusters of adapters. `print` shows a table.

    Attributes:
        similarity: The adapters and the inner products of their deltas.
        labels: The cluster of each adapter; clusters are numbered in the order of their first
            members.
        method, metric: As for `cluster_adapters`.
        inertia: Sum of the squared distances of all adapters from the means of their clusters, of
            deltas of norm 1 for the metric "cosine".
        silhouettes: Of each adapter, `[n]`: near 1 if it is much closer to its cluster than to the
            next, below 0 if the next is closer. Zeros for a single cluster.
        scores: Mean silhouette for each number of clusters that was tried.
    """

    similarity: AdapterSimilarity
    labels: list[int]
    method: Method
    metric: Metric
    inertia: float
    silhouettes: Tensor
    scores: dict[int, float]

    @property
    def k(self) -> int:
        """The number of clusters."""
        return max(self.labels) + 1

    @property
    def members(self) -> dict[str, list[str]]:
        """The adapters of each cluster: "cluster_0", "cluster_1", …."""
        names = self.similarity.names
        return {
            f"cluster_{cluster}": [names[i] for i in numbers]
            for cluster, numbers in enumerate(self._numbers())
        }

    @property
    def medoids(self) -> list[str]:
        """The most central adapter of each cluster: that with the least sum of distances."""
        between = distances(_vectors(self.similarity, self.metric))
        medoids = []
        for numbers in self._numbers():
            central = int(between[numbers][:, numbers].sum(1).argmin())
            medoids.append(self.similarity.names[numbers[central]])
        return medoids

    def _numbers(self) -> list[list[int]]:
        """Return the adapters of each cluster by number."""
        return [[i for i, label in enumerate(self.labels) if label == c] for c in range(self.k)]

    def __repr__(self) -> str:
        return f"AdapterClusters({len(self.labels)} adapters, {self.k} clusters)"

    def __str__(self) -> str:
        """Return a table with a line for each cluster: its size, the mean cosine of its pairs, its
        mean silhouette, the most central adapter and the others.
        """
        head = (
            f"{counted(len(self.labels), 'adapter')} in {counted(self.k, 'cluster')} "
            f"({self.method}, {self.metric}): "
            f"silhouette {float(self.silhouettes.mean()):.3f}, inertia {self.inertia:.4g}"
        )
        rows = [("cluster", "size", "cosine", "silhouette", "most central", "others")]
        for row in self.rows():
            cosine = "" if row.cosine is None else f"{row.cosine:.3f}"
            others = listed(name for name in row.members if name != row.medoid)
            numbers = str(row.size), cosine, f"{row.silhouette:.3f}"
            rows.append((row.cluster, *numbers, row.medoid, others))
        return f"{head}\n\n{table(rows, right=[1, 2, 3])}"

    def rows(self) -> list[ClusterRow]:
        """Return a row for each cluster."""
        cosines = self.similarity.cosines()
        result = []
        groups = zip(self.members.items(), self._numbers(), self.medoids, strict=True)
        for (cluster, members), numbers, medoid in groups:
            pairs = len(numbers) * (len(numbers) - 1)
            inside = cosines[numbers][:, numbers]
            mean = float((inside.sum() - inside.diagonal().sum()) / pairs) if pairs else None
            silhouette = float(self.silhouettes[numbers].mean())
            result.append(ClusterRow(cluster, len(numbers), mean, silhouette, medoid, members))
        return result

    def to_pandas(self) -> DataFrame:
        """Return a data frame with a row for each adapter: its cluster and silhouette."""
        import pandas

        return pandas.DataFrame(
            {
                "adapter": self.similarity.names,
                "cluster": [f"cluster_{label}" for label in self.labels],
                "silhouette": self.silhouettes.tolist(),
            }
        )

    def to_dict(self) -> dict[str, object]:
        """Return the clusters as values of JSON."""
        return {
            "method": self.method,
            "metric": self.metric,
            "inertia": self.inertia,
            "scores": {str(k): score for k, score in self.scores.items()},
            "clusters": [row._asdict() for row in self.rows()],
        }

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the clusters to a file; a missing folder is created."""
        write_report(path, self.to_dict())

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the cosines of all pairs with the clusters framed, with matplotlib.

        Args:
            path: A file for the figure, its suffix says the format; None saves nothing.
        """
        names, groups = self.similarity.names, self._numbers()
        order = [i for numbers in groups for i in numbers]
        sizes = [len(numbers) for numbers in groups]
        figure = plot_similarity(names, self.similarity.cosines(), order, clusters=sizes)
        if path is not None:
            figure.savefig(path)
        return figure

    def save_experts(
        self,
        folder: str | os.PathLike[str],
        rank: int | float | None = None,
        *,
        weights: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Write an expert for each cluster, a LoRA adapter: the mean of its members' deltas.

        The sum is exact, with the ranks of all members side by side, or its best approximation of a
        rank. Each expert gets a folder of the cluster's name, in which "members.json" lists its
        members. They are summed one cluster at a time, and written when all are made.

        Args:
            folder: The folder for the experts' folders.
            rank: An integer: the rank of every layer. A fraction: in each layer the smallest rank
                that keeps this share of the energy, the sum of squared singular values. None: the
                exact sum.
            weights: A number for each adapter, in place of one over the size of its cluster.

        Returns:
            For each cluster `‖ΔW − B·A‖ / ‖ΔW‖` over all layers; 0 where the sum is exact.

        Raises:
            PeftValueError: A rank or weight is not allowed; nothing is written then.
            PeftNotSupportedError: An adapter is more than deltas, for example trains a head.
        """
        return experts.save_experts(
            as_folder(folder), self.similarity.source, self._weighted(weights), rank
        )

    def save_as_poly(
        self,
        folder: str | os.PathLike[str],
        rank: int | float | None = None,
        own_weight: float = 1.0,
        *,
        weights: Mapping[str, float] | None = None,
    ) -> PolyConversion:
        """Write a Poly adapter to train on: a skill for each cluster, the mean of its members'
        deltas, and a task for each adapter, which begins with its cluster's skill.

        Args:
            folder: The adapter's folder, which is made if missing.
            rank: Rank of the skills, as for `save_experts`.
            own_weight: Each task's weight of its cluster's skill, above 0; the other skills share
                the rest. With 1 they get almost no gradient; to train the routing use 0.9.
            weights: As for `save_experts`.

        Returns:
            The adapter that was written, with the errors of its skills.

        Raises:
            PeftError: As `save_experts`.
            UnsupportedModuleError: A layer is not linear.
        """
        path, clusters = as_folder(folder), self._weighted(weights)
        source = self.similarity.source
        converted = experts.inventory_of_experts(source, clusters, rank, own_weight)
        write_conversion(path, source.model, converted)
        return converted

    def _weighted(self, weights: Mapping[str, float] | None) -> list[experts.Cluster]:
        return experts.weighted_members(self.members, weights)


def cluster_adapters(
    model: nn.Module,
    adapters: Adapters | None = None,
    k: int | Iterable[int] | None = None,
    *,
    method: Method = "k-means",
    metric: Metric = "cosine",
    seed: int = 0,
    memory: int = 2**31,
) -> AdapterClusters:
    """Group adapters by the similarity of their deltas, so that few experts stand for many.

    Args:
        model, adapters, memory: As for `adapter_similarity`.
        k: The number of clusters. Several numbers: the one with the largest mean silhouette. None:
            of 2 to `2·√n`.
        method: "k-means" (as in the paper), or "average": the tree of average linkage, cut into
            `k`, which needs scipy.
        metric: "cosine" compares directions, deltas of norm 1; "euclidean" deltas as they are.
        seed: Of the first centers of k-means. The same seed gives the same clusters.

    Returns:
        The clusters; printing them shows a table.

    Raises:
        PeftValueError: A value is not allowed, or a delta is zero and has no direction.
        PeftError: As `adapter_similarity`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config, "a")
        >>> for name in "bcd":
        ...     model.add_adapter(name, config)
        >>> cluster_adapters(model, k=2).k
        2

    Source: arXiv:2405.11157, section 3 (model-based clustering)
    """
    _check_choices(k, method, metric, seed)
    similarity = adapter_similarity(model, adapters, by_layer=False, memory=memory)
    return clusters_of(similarity, k, method=method, metric=metric, seed=seed)


def clusters_of(
    similarity: AdapterSimilarity,
    k: int | Iterable[int] | None = None,
    *,
    method: Method = "k-means",
    metric: Metric = "cosine",
    seed: int = 0,
) -> AdapterClusters:
    """Return the clusters of adapters whose similarity is known; arguments are those of
    `cluster_adapters`.
    """
    if not isinstance(similarity, AdapterSimilarity):
        raise PeftTypeError("`similarity` must be what `adapter_similarity` returns.")
    counts = _check_choices(k, method, metric, seed)
    n = len(similarity.names)
    if counts is None:
        counts = list(range(2, min(n - 1, math.ceil(2 * math.sqrt(n))) + 1)) or [1]
    if max(counts) > n:
        raise PeftValueError(f"`k`={max(counts)} is more than the {n} adapters.")
    products = _vectors(similarity, metric)
    between = distances(products)
    tried = track(counts, "Clustering", unit="k")
    parts = {count: _partition(products, count, method, metric, seed) for count in tried}
    scores = {
        count: silhouettes(between, part.labels) if count > 1 else torch.zeros(n).double()
        for count, part in parts.items()
    }
    best = max(counts, key=lambda count: float(scores[count].mean()))
    means = {count: float(score.mean()) for count, score in scores.items()}
    part = parts[best]
    return AdapterClusters(
        similarity, part.labels.tolist(), method, metric, part.inertia, scores[best], means
    )


def _check_choices(
    k: int | Iterable[int] | None, method: str, metric: str, seed: int
) -> list[int] | None:
    """Return the numbers of clusters to try, checked; None to choose them."""
    problems = [
        *choice("method", method, ("k-means", "average")),
        *choice("metric", metric, ("cosine", "euclidean")),
        *at_least("seed", seed, 0, most=2**63 - 1),
    ]
    counts = None if k is None else plain(k)
    if counts is not None:
        counts = sorted({*counts}) if isinstance(counts, Iterable) else [counts]
        problems += [problem for count in counts for problem in at_least("k", count)]
        problems += [] if counts else ["`k` has no numbers to try."]
    if problems:
        raise PeftValueError(" ".join(problems))
    if method == "average" and find_spec("scipy") is None:
        raise PeftValueError(
            'method="average" needs scipy: `pip install scipy`. method="k-means" does without.'
        )
    return counts


def _vectors(similarity: AdapterSimilarity, metric: Metric) -> Tensor:
    """Return the inner products of the deltas as the metric sees them."""
    if metric == "euclidean":
        return similarity.products
    norms = similarity.norms()
    zero = [name for name, n in zip(similarity.names, norms.tolist(), strict=True) if n == 0]
    if zero:
        raise PeftValueError(
            f"The delta of {', '.join(zero[:5])} is zero and has no direction; leave such adapters "
            'out, or pass metric="euclidean".'
        )
    return similarity.cosines()


def _partition(products: Tensor, k: int, method: Method, metric: Metric, seed: int) -> Partition:
    if method == "k-means":
        return k_means(products, k, seed)
    similarity = products if metric == "cosine" else 1 - distances(products)
    labels = cut_tree(linkage(similarity)[0], k)
    return Partition(labels, inertia(products, labels))
