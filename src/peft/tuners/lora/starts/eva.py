# SPDX-License-Identifier: Apache-2.0
"""EVA: `A` is the principal directions of a layer's inputs, and layers whose inputs vary in more
directions get a larger rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ....ops.low_rank import subspace_svd, wide

# Rounds of subspace iteration, and the seed of its random numbers: those of other
# implementations, so that all find the same directions.
_ROUNDS, _SEED = 4, 42


class PrincipalDirections:
    """The largest principal directions of rows that come in batches, without keeping the rows.

    Each batch is decomposed together with the directions so far, weighted by their singular values,
    and a row for the difference of the means.

    Args:
        count: How many directions.

    Attributes:
        directions: `[count, features]`, orthonormal, largest variance first; None before the first
            batch.
        singular_values: `[count]`.
        variance_shares: `[count]`, the share of the variance of all rows in each direction.

    Example:
        >>> found = PrincipalDirections(1)
        >>> for batch in (torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([[-2.0, -4.0]])):
        ...     found.add(batch)
        >>> found.directions, round(found.variance_shares.item(), 3)
        (tensor([[0.4472, 0.8944]], dtype=torch.float64), 1.0)

    Source: Ross et al., "Incremental learning for robust visual tracking", 2008, section 3.1;
    arXiv:2410.07170, section 3.2
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.directions: Tensor | None = None
        self.singular_values = self.variance_shares = torch.empty(0)
        self.similarity = torch.zeros(count)
        self._rows, self._mean, self._squares = 0, torch.empty(0), torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """Add a batch of rows `[n, features]`, at least as many as there are directions."""
        rows = rows.float()
        n, before = len(rows), self._rows
        mean = wide(rows).mean(0)
        squares = (wide(rows) - mean).square().sum()
        if self.directions is None:
            stacked = rows - mean.to(rows.dtype)
        else:
            shift = self._mean - mean
            squares = self._squares + squares + shift.square().sum() * (before * n / (before + n))
            mean = (self._mean * before + mean * n) / (before + n)
            known = self.singular_values.unsqueeze(1) * self.directions
            moved = math.sqrt(before * n / (before + n)) * shift
            stacked = torch.vstack(
                [known.to(shift), (rows - rows.mean(0)).to(shift), moved.unsqueeze(0)]
            )
        self._rows, self._mean, self._squares = before + n, mean, squares
        S, directions = _right_singular_vectors(stacked, 2 * self.count)
        S, directions = S[: self.count], directions[: self.count]
        if self.directions is not None:
            self.similarity = F.cosine_similarity(directions, self.directions.to(directions))
        self.directions, self.singular_values = directions, S
        self.variance_shares = S.square() / squares.to(S).clamp_min(torch.finfo(S.dtype).tiny)


def _right_singular_vectors(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return singular values `[k]` and right singular vectors `[k, n]` whose largest entries are
    positive.
    """
    count = min(count, *matrix.shape)
    if matrix.shape[0] < matrix.shape[1]:
        vectors, S, _ = subspace_svd(matrix.mT, count, _ROUNDS, _SEED)
    else:
        _, S, vectors = subspace_svd(matrix, count, _ROUNDS, _SEED)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return S, (vectors * torch.sign(largest)).mT


def shared_ranks(
    shares: Mapping[str, Tensor], leaders: Mapping[str, str], budget: int
) -> dict[str, int]:
    """Return a rank for each layer: the number of its directions among the `budget` of all layers
    with the largest shares of variance.

    Args:
        shares: The shares of variance of each leader's directions.
        leaders: For each layer, the layer that stands for all with the same input.
        budget: The sum of the ranks.

    Returns:
        Ranks by layer, zero for some. Of layers with the same input the leader has the largest.

    Example:
        >>> shares = {"a": torch.tensor([0.6, 0.3, 0.1]), "b": torch.tensor([0.9, 0.05])}
        >>> shared_ranks(shares, {"a": "a", "b": "b"}, 3)
        {'a': 2, 'b': 1}

    Source: arXiv:2410.07170, section 3.3
    """
    owners = [path for path, leader in leaders.items() for _ in shares[leader]]
    values = torch.cat([shares[leader].cpu() for leader in leaders.values()])
    best = values.argsort(descending=True, stable=True)[:budget].tolist()
    counts = Counter(owners[i] for i in best)
    ranks = {path: counts[path] for path in leaders}
    for path, leader in leaders.items():
        if ranks[path] > ranks[leader]:
            ranks[path], ranks[leader] = ranks[leader], ranks[path]
    return ranks
