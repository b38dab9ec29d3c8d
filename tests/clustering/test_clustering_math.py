# SPDX-License-Identifier: Apache-2.0
"""Inner products, clusters and search, against dense matrices, scikit-learn and scipy."""

import numpy as np
import pytest
import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist, squareform

from peft.ops.clustering import cut_tree, inertia, k_means, linkage, silhouettes
from peft.ops.low_rank import LowRank
from peft.ops.search import evolve
from peft.ops.similarity import cosines, distances, inner_products, norms

DOUBLE = torch.float64


def deltas(ranks, out=9, taps=7, dtype=torch.float32):
    return [
        LowRank(torch.randn(r, taps, dtype=dtype), torch.randn(out, r, dtype=dtype), 0.0, 1.0)
        for r in ranks
    ]


def dense(products):
    return torch.stack([(p.B.double() @ p.A.double()).flatten() for p in products])


# Small ranks go by factors, ranks as large as the matrix by elements.
@pytest.mark.parametrize(("ranks", "others"), [([1, 3, 2], [2, 1]), ([9, 12, 1, 30], [40, 8])])
@pytest.mark.parametrize("block", [None, 3])  # a few blocks
def test_inner_products_are_those_of_dense_deltas(ranks, others, block, monkeypatch):
    if block:
        monkeypatch.setattr("peft.ops.similarity._RANKS", block)
        monkeypatch.setattr("peft.ops.similarity._ELEMENTS", block * 63)
    rows, columns = deltas(ranks), deltas(others, dtype=torch.float16)
    torch.testing.assert_close(inner_products(rows, columns), dense(rows) @ dense(columns).mT)
    products = inner_products(rows, rows)
    torch.testing.assert_close(products, dense(rows) @ dense(rows).mT)
    torch.testing.assert_close(norms(products), dense(rows).norm(dim=1))
    torch.testing.assert_close(distances(products), torch.cdist(dense(rows), dense(rows)))


def test_a_delta_written_in_other_factors_is_the_same_and_a_zero_has_no_direction():
    (one,) = deltas([3])
    turn = torch.linalg.qr(torch.randn(3, 3))[0]
    turned = one._replace(A=turn @ one.A, B=one.B @ turn.mT)
    nothing = one._replace(B=torch.zeros_like(one.B))
    same = inner_products([one, one, nothing], [one, one, nothing])
    assert distances(same)[0, 1] == 0 and cosines(same)[0, 2] == cosines(same)[2, 2] == 0
    products = inner_products([one, turned], [one, turned])
    torch.testing.assert_close(cosines(products), torch.ones(2, 2, dtype=DOUBLE))
    assert distances(products)[0, 1] < 1e-6 * norms(products)[0]


def groups(seed=0):
    """Three groups of vectors, in mixed order, and the group of each."""
    random = np.random.default_rng(seed)
    owner = random.permutation(np.repeat(np.arange(3), [9, 4, 7]))
    return owner, random.normal(size=(3, 6))[owner] * 3 + random.normal(size=(20, 6))


def same_partition(one, other):
    return len({*zip(one, other, strict=True)}) == len({*one}) == len({*other})


@pytest.mark.parametrize("k", [1, 2, 3, 5, 20])
def test_k_means_is_as_good_as_that_of_dense_vectors(k):
    cluster = pytest.importorskip("sklearn.cluster")
    _, x = groups()
    found = k_means(torch.tensor(x @ x.T), k, starts=30)
    theirs = cluster.KMeans(k, n_init=30, random_state=0).fit(x)
    assert found.inertia <= theirs.inertia_ + 1e-9
    labels = found.labels.tolist()
    assert list(dict.fromkeys(labels)) == list(range(k))  # in the order of first members
    means = [x[found.labels.numpy() == c].mean(0) for c in range(k)]
    slow = sum(((x[i] - means[label]) ** 2).sum() for i, label in enumerate(labels))
    assert found.inertia == pytest.approx(slow) == inertia(torch.tensor(x @ x.T), found.labels)
    if k == 3:
        assert same_partition(labels, theirs.labels_.tolist())


def test_k_means_of_equal_vectors_fills_every_cluster_and_a_seed_repeats():
    same = torch.ones(5, 5)
    assert k_means(same, 3).labels.unique().tolist() == [0, 1, 2]
    _, x = groups()
    products = torch.tensor(x @ x.T)
    assert torch.equal(k_means(products, 4, seed=3).labels, k_means(products, 4, seed=3).labels)


def test_silhouettes_one_by_one():
    owner, x = groups()
    owner[owner == 1] = [1, 1, 1, 3]  # one alone
    D = squareform(pdist(x))
    score = silhouettes(torch.tensor(D), torch.tensor(owner))
    for i in range(20):
        mine = [j for j in range(20) if owner[j] == owner[i] and j != i]
        a = np.mean([D[i, j] for j in mine]) if mine else 0
        b = min(np.mean(D[i, owner == c]) for c in set(owner.tolist()) - {owner[i]})
        assert float(score[i]) == pytest.approx((b - a) / max(a, b) if mine else 0)


def test_a_tree_is_cut_as_scipy_cuts_it():
    _, x = groups()
    cosine = torch.tensor(1 - squareform(pdist(x, "cosine")))
    links, order = linkage(cosine)
    theirs = hierarchy.linkage(pdist(x, "cosine"), "average")
    assert sorted(order) == list(range(20))
    for k in (1, 2, 4, 20):
        wanted = hierarchy.fcluster(theirs, k, "maxclust").tolist()
        assert same_partition(cut_tree(links, k).tolist(), wanted)


def test_a_search_finds_a_minimum_within_bounds_in_as_many_evaluations():
    Q = torch.linalg.qr(torch.randn(6, 6))[0]
    curved, wanted = (
        Q @ torch.logspace(0, -1, 6).diag() @ Q.mT,
        torch.tensor([0.7, -0.4, 0, 0, 2, 0]),
    )
    seen = []

    def function(x):
        seen.append(x)
        return float((x - wanted) @ curved @ (x - wanted))

    found = evolve(function, torch.zeros(6), evaluations=600, step=0.3, bound=1.5)
    assert len(seen) == 600 == len(found.values) and found.values[0] == function(torch.zeros(6))
    assert torch.stack(seen).abs().max() <= 1.5
    x = torch.zeros(6, requires_grad=True)  # projected gradient descent
    for _ in range(3000):
        (step,) = torch.autograd.grad((x - wanted) @ curved @ (x - wanted), x)
        x = (x - 0.3 * step).detach().clamp(-1.5, 1.5).requires_grad_()
    least = float((x - wanted).detach() @ curved @ (x - wanted).detach())
    assert found.value == min(found.values) == function(found.x)
    assert found.value - least < 1e-3 * (found.values[0] - least)
    assert torch.equal(
        evolve(function, torch.zeros(6), evaluations=5, step=0.3, bound=1.5, seed=4).x,
        evolve(function, torch.zeros(6), evaluations=5, step=0.3, bound=1.5, seed=4).x,
    )
