# SPDX-License-Identifier: Apache-2.0
"""Clusters of vectors that are known by their inner products only: k-means, silhouettes, and the
tree of average linkage.

Means of clusters are never built: `‖x_i − m‖² = ⟨x_i, x_i⟩ − 2⟨x_i, m⟩ + ⟨m, m⟩` needs only inner
products, so vectors of any size are clustered exactly from a matrix `[n, n]`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Partition(NamedTuple):
    """A partition of `n` vectors into clusters.

    Attributes:
        labels: The cluster of each, `[n]`; clusters are numbered in the order of their first
            members.
        inertia: Sum of the squared distances of all vectors from the means of their clusters.
    """

    labels: Tensor
    inertia: float


class Link(NamedTuple):
    """A step of hierarchical clustering, as a row of scipy's linkage.

    Attributes:
        left, right: The clusters that are joined: the number of a vector, or `n + i` for the
            result of step `i`.
        distance: One minus their similarity, the mean over pairs.
        size: Number of vectors in the result.
    """

    left: int
    right: int
    distance: float
    size: int


def k_means(products: Tensor, k: int, seed: int = 0, starts: int = 10) -> Partition:
    """Return the partition into `k` clusters of least inertia that Lloyd's algorithm finds.

    Args:
        products: Inner products of the vectors, `[n, n]`.
        k: Number of clusters, at most `n`.
        seed: Of the draws of the first centers.
        starts: Number of runs, each from centers drawn by k-means++; the best counts.

    Example:
        >>> x = torch.tensor([[0.0], [5.0], [0.1], [5.2]], dtype=torch.float64)
        >>> k_means(x @ x.T, 2).labels.tolist()
        [0, 1, 0, 1]

    Source: Lloyd (1982); Arthur and Vassilvitskii (2007), k-means++; Dhillon, Guan and Kulis
        (2004), k-means by inner products
    """
    generator = torch.Generator().manual_seed(seed)
    products = products.double().cpu()
    runs = (_lloyd(products, _drawn_labels(products, k, generator), k) for _ in range(starts))
    best = min(runs, key=lambda run: run.inertia)
    return best._replace(labels=_by_first_member(best.labels))


def linkage(similarity: Tensor) -> tuple[list[Link], list[int]]:
    """Return the tree of average linkage, with scipy and distances `1 − similarity`, and its leaves
    from left to right. Without scipy no tree, and the leaves by number.

    Source: Sokal & Michener (1958), the unweighted pair-group method
    """
    if len(similarity) < 2 or find_spec("scipy") is None:
        return [], list(range(len(similarity)))
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    distance = (1 - similarity.nan_to_num()).clamp(min=0).fill_diagonal_(0)
    tree = hierarchy.linkage(squareform(distance.cpu().numpy(), checks=False), "average")
    links = [Link(int(a), int(b), float(d), int(size)) for a, b, d, size in tree]
    return links, [int(leaf) for leaf in hierarchy.leaves_list(tree)]


def cut_tree(links: list[Link], k: int) -> Tensor:
    """Return the labels `[n]` of the `k` clusters that a tree of `n` leaves has before its last
    `k − 1` steps.

    Example:
        >>> cut_tree([Link(0, 2, 0.1, 2), Link(1, 3, 0.5, 3)], 2)
        tensor([0, 1, 0])
    """
    n = len(links) + 1
    parents = list(range(2 * n - 1))
    for step, link in enumerate(links[: n - k]):
        parents[link.left] = parents[link.right] = n + step
    for node in range(2 * n - 2, -1, -1):  # a parent has a higher number
        parents[node] = parents[parents[node]]
    return _by_first_member(torch.tensor(parents[:n]))


def silhouettes(distances: Tensor, labels: Tensor) -> Tensor:
    """Return each vector's silhouette `(b − a) / max(a, b)`: `a` is its mean distance from the
    others of its cluster, `b` from those of the nearest other cluster. It is 0 for a vector alone
    in its cluster.

    Args:
        distances: `[n, n]`.
        labels: `[n]`, of two clusters or more.

    Returns:
        `[n]`, between -1 and 1.

    Source: Rousseeuw (1987)
    """
    member = F.one_hot(labels).to(distances)  # [n, k]
    sizes, sums = member.sum(0), distances @ member
    own = member.bool()
    inside = sums[own] / (sizes[labels] - 1).clamp(min=1)
    outside = (sums / sizes).masked_fill(own, float("inf")).amin(1)
    largest = torch.maximum(inside, outside)
    score = (outside - inside) / largest.masked_fill(largest == 0, 1)
    return score.masked_fill(sizes[labels] == 1, 0)


def inertia(products: Tensor, labels: Tensor) -> float:
    """Return the sum of squared distances of vectors from the means of their clusters."""
    distances = _to_means(products.double(), labels, int(labels.max()) + 1)
    return float(distances.gather(1, labels.unsqueeze(1)).sum().clamp(min=0))


def _lloyd(products: Tensor, labels: Tensor, k: int) -> Partition:
    """Assign vectors to the nearest mean until that lowers the inertia no more."""
    least = float("inf")
    for _ in range(300):
        own, nearest = _to_means(products, labels, k).min(1)
        if float(own.sum()) >= least or torch.equal(nearest, labels):
            break
        least = float(own.sum())
        labels = _without_empty(nearest, own, k)
    return Partition(labels, inertia(products, labels))


def _without_empty(labels: Tensor, distances: Tensor, k: int) -> Tensor:
    """Return labels in which each empty cluster has the vector that is farthest from its mean."""
    for empty in set(range(k)) - set(labels.tolist()):
        alone = torch.bincount(labels, minlength=k)[labels] == 1
        farthest = distances.masked_fill(alone, -1).argmax()
        labels, distances = labels.clone(), distances.clone()
        labels[farthest], distances[farthest] = empty, 0
    return labels


def _to_means(products: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return the squared distances `[n, k]` of vectors from the means of clusters; those from an
    empty cluster are infinite.
    """
    member = F.one_hot(labels, k).to(products)
    sizes = member.sum(0)
    share = member / sizes.clamp(min=1)
    cross = products @ share  # ⟨x_i, m_c⟩
    squares = (share * cross).sum(0)
    distances = products.diagonal().unsqueeze(1) - 2 * cross + squares
    return distances.clamp(min=0).masked_fill(sizes == 0, float("inf"))


def _drawn_labels(products: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Draw centers among the vectors, and assign each vector to the nearest.

    The probability of a vector is in proportion to the squared distance from the nearest center
    drawn before.
    """
    squares, n = products.diagonal(), len(products)
    centers: list[int] = []
    weights, to_centers = torch.ones(n, dtype=products.dtype), []
    for _ in range(k):
        centers.append(int(torch.multinomial(weights, 1, generator=generator)))
        cross = products[:, centers[-1]]
        to_centers.append((squares - 2 * cross + squares[centers[-1]]).clamp(min=0))
        weights = torch.stack(to_centers).amin(0).index_fill(0, torch.tensor(centers), 0)
        if not weights.any():  # the rest are equal to centers
            weights = torch.ones_like(weights).index_fill(0, torch.tensor(centers), 0)
    labels = torch.stack(to_centers).argmin(0)
    labels[centers] = torch.arange(k)
    return labels


def _by_first_member(labels: Tensor) -> Tensor:
    """Return labels with clusters numbered in the order of their first members."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels.tolist()))}
    return torch.tensor([numbers[label] for label in labels.tolist()])
