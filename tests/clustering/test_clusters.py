# SPDX-License-Identifier: Apache-2.0
"""Clusters of adapters and their experts, against dense means."""

import json
import os

import pytest
import torch
from scipy.linalg import svdvals
from torch import nn

from peft import (
    AdapterLibrary,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PolyConfig,
    cluster_adapters,
    get_peft_model,
)
from peft.clustering import clusters_of
from peft.core.low_rank_deltas import deltas_by_task
from peft.tuners.lora.conversion import adapter_from_deltas, write_conversion


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 12))


GROUPS = {"red": 4, "green": 2, "blue": 3}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Folders of adapters in three groups of alike deltas, in mixed order, one of them a task of a Poly
    adapter and one a LoKr adapter; and each one's dense deltas.
    """
    root, base, dense = tmp_path_factory.mktemp("library"), mlp(), {}
    torch.manual_seed(1)
    seeds = {
        "red": get_peft_model(
            mlp(), LoKrConfig(r=3, target_modules=["0", "2"], init_weights=False)
        ),
        "green": get_peft_model(
            mlp(), LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        ),
        "blue": get_peft_model(
            mlp(),
            PolyConfig(
                r=2,
                n_tasks=1,
                n_skills=1,
                task_names=["blue"],
                target_modules=["0", "2"],
                init_weights=False,
            ),
        ),
    }
    names = sorted(
        (f"{g}{i}" for g, count in GROUPS.items() for i in range(count)), key=lambda n: n[::-1]
    )
    for name in names:
        seed, first = seeds[name[:-1]], name.endswith("0")
        if first:
            seed.save_pretrained(root / name)
        deltas = next(iter(deltas_by_task(base, root / f"{name[:-1]}0").values()))
        if not first:
            noisy = {
                path: d._replace(B=d.B + 0.2 * d.B.std() * torch.randn_like(d.B))
                for path, d in deltas.items()
            }
            write_conversion(root / name, base, adapter_from_deltas(base, noisy, LoraConfig()))
            deltas = deltas_by_task(base, root / name)[""]
        dense[name] = {path: d.B.double() @ d.A.double() for path, d in deltas.items()}
    return [root / name for name in names], dense


def mean(dense, members, weights=None):
    weights = weights or dict.fromkeys(members, 1 / len(members))
    return {path: sum(weights[m] * dense[m][path] for m in members) for path in ("0", "2")}


@pytest.mark.parametrize(
    "options",
    [{"k": 3}, {}, {"k": range(2, 6), "method": "average"}, {"k": 3, "metric": "euclidean"}],
)
def test_groups_are_found(library, options):
    folders, dense = library
    clusters = cluster_adapters(mlp(), folders, **options)
    assert clusters.k == 3
    for members in clusters.members.values():
        groups = {name[:-1] for name in members}
        assert len(groups) == 1 and len(members) == GROUPS[groups.pop()]
    firsts = [members[0] for members in clusters.members.values()]
    assert firsts == sorted(firsts, key=list(dense).index)
    assert clusters.silhouettes.min() > 0.5 and max(clusters.scores, key=clusters.scores.get) == 3
    rows = {row.cluster: row for row in clusters.rows()}
    for name, members in clusters.members.items():
        x = torch.stack([torch.cat([dense[m][p].flatten() for p in ("0", "2")]) for m in members])
        if options.get("metric") != "euclidean":
            x = nn.functional.normalize(x)
        spread = torch.cdist(x, x).sum(1)
        assert rows[name].medoid == members[int(spread.argmin())]
        cosine = nn.functional.normalize(x) @ nn.functional.normalize(x).T
        pairs = cosine[tuple(torch.triu_indices(len(x), len(x), 1))]
        assert rows[name].cosine == pytest.approx(float(pairs.mean()), rel=1e-5)


@pytest.mark.parametrize("rank", [None, 2, 0.9])
def test_experts_are_means_of_the_deltas(library, rank, tmp_path):
    folders, dense = library
    clusters = cluster_adapters(mlp(), folders, k=3)
    weights = None if rank != 2 else {name: 0.1 * (i + 1) for i, name in enumerate(dense)}
    errors = clusters.save_experts(tmp_path, rank, weights=weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cluster_0", "cluster_1", "cluster_2"]
    for name, members in clusters.members.items():
        model = PeftModel.from_pretrained(mlp(), tmp_path / name)
        wanted, lost, whole = mean(dense, members, weights), 0.0, 0.0
        for path, delta in wanted.items():
            layer = model.get_base_model().get_submodule(path)
            values = svdvals(delta.numpy())
            energy = (values**2).cumsum() / (values**2).sum()
            kept = {None: len(values), 2: 2}.get(rank, int((energy < 0.9).sum()) + 1)
            found = layer.get_delta_weight("default").double()
            assert layer.r["default"] == min(kept, 8) or rank is None
            assert float((found - delta).norm()) == pytest.approx(
                float((values[kept:] ** 2).sum() ** 0.5), abs=1e-5
            )
            lost, whole = lost + (values[kept:] ** 2).sum(), whole + (values**2).sum()
        assert errors[name] == pytest.approx((lost / whole) ** 0.5, abs=1e-6)
        listed = json.loads((tmp_path / name / "members.json").read_text())
        assert list(listed["members"]) == members and listed["error"] == errors[name]
    # experts are adapters like others
    again = cluster_adapters(mlp(), [tmp_path / name for name in clusters.members], k=3)
    assert again.inertia == 0


def test_a_poly_adapter_has_a_skill_for_each_cluster_and_a_task_for_each_adapter(library, tmp_path):
    folders, dense = library
    clusters = cluster_adapters(mlp(), folders, k=3)
    converted = clusters.save_as_poly(tmp_path / "exact")
    model = PeftModel.from_pretrained(mlp(), tmp_path / "exact")
    assert model.peft_config["default"].task_names == [
        m for own in clusters.members.values() for m in own
    ]
    assert model.peft_config["default"].n_skills == 3 and set(converted.errors.values()) == {0.0}
    for members in clusters.members.values():
        for path, delta in mean(dense, members).items():
            layer = model.get_base_model().get_submodule(path)
            for task in members:
                found = layer.get_delta_weight(
                    "default", task_id=model.peft_config["default"].task_names.index(task)
                )
                torch.testing.assert_close(found.double(), delta, rtol=1e-4, atol=1e-5)
    small = clusters.save_as_poly(tmp_path / "small", 0.5, own_weight=0.8)
    assert small.config.r < converted.config.r and all(0 < e < 0.71 for e in small.errors.values())
    model = PeftModel.from_pretrained(mlp(), tmp_path / "small", is_trainable=True)
    weights = model.get_router_weights()["0"][:, 0]
    own = torch.tensor(sorted(clusters.labels))
    torch.testing.assert_close(
        weights, 0.1 + 0.7 * nn.functional.one_hot(own).float(), rtol=1e-5, atol=1e-6
    )
    model(torch.randn(4, 12), task_ids=[0, 3, 5, 8]).sum().backward()


def test_adapters_of_a_model_cluster_and_reports_are_written(tmp_path):
    model = get_peft_model(
        mlp(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), "one"
    )
    for name in ("two", "three", "four"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    clusters = cluster_adapters(model, k=2, seed=3)
    again = clusters_of(clusters.similarity, 2, seed=3)
    assert again.labels == clusters.labels
    lines = str(clusters).splitlines()
    assert (
        lines[0].startswith("4 adapters in 2 clusters (k-means, cosine): silhouette")
        and len(lines) == 5
    )
    clusters.save_json(tmp_path / "clusters.json")
    content = json.loads((tmp_path / "clusters.json").read_text())
    assert [c["members"] for c in content["clusters"]] == list(clusters.members.values())
    frame = clusters.to_pandas()
    assert (
        list(frame["adapter"]) == ["one", "two", "three", "four"]
        and frame["cluster"][0] == "cluster_0"
    )
    clusters.plot(tmp_path / "clusters.png")
    assert (tmp_path / "clusters.png").stat().st_size > 1000
    clusters.save_experts(tmp_path / "experts")
    assert (
        cluster_adapters(model, ["one"]).k == 1 and cluster_adapters(model, ["one", "two"]).k == 1
    )
    assert cluster_adapters(model, k=4).silhouettes.tolist() == [0] * 4


def test_an_index_of_the_folder_is_loaded_as_it_is_read(library):
    folders, _ = library
    index = AdapterLibrary(folders[0].parent, max_bytes=2000)  # holds a few at a time
    clusters = cluster_adapters(mlp(), index, k=3, memory=1)
    assert clusters.similarity.names == index.names == sorted(f.name for f in folders)
    some = {name: index.load(name) for name in index.filter(where=lambda e: "red" in e.name).names}
    assert cluster_adapters(mlp(), some, k=1).medoids[0].startswith("red")
    named = cluster_adapters(mlp(), folders, k=3)
    assert {frozenset(m) for m in clusters.members.values()} == {
        frozenset(m) for m in named.members.values()
    }
    assert len(clusters.save_experts(folders[0].parents[1] / "of_index", 1)) == 3


def test_wrong_choices_are_named_and_nothing_is_written(library, tmp_path, monkeypatch):
    folders, _ = library
    base = mlp()
    for options, message in (
        ({"k": 0}, "`k`=0 must be an integer of at least 1"),
        ({"k": 10}, "`k`=10 is more than the 9 adapters"),
        ({"k": []}, "no numbers to try"),
        ({"method": "ward"}, "`method`='ward' must be one of"),
        ({"metric": "cosin"}, "Did you mean 'cosine'"),
        ({"seed": -1}, "`seed`=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            cluster_adapters(base, folders, **options)
    clusters = cluster_adapters(base, folders, k=3)
    for options, message in (
        ({"rank": 0}, "rank"),
        ({"weights": {"nobody": 1.0}}, "'nobody', which is no adapter"),
        ({"weights": {"red0": 1.0}}, "a number for each adapter"),
        ({"weights": dict.fromkeys(clusters.similarity.names, float("nan"))}, "finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            clusters.save_experts(tmp_path / "experts", **options)
        with pytest.raises(ValueError, match=message):
            clusters.save_as_poly(tmp_path / "poly", **options)
    fresh = get_peft_model(mlp(), LoraConfig(target_modules=["0"]), "zero")
    fresh.add_adapter("other", LoraConfig(target_modules=["0"], init_lora_weights=False))
    with pytest.raises(ValueError, match="delta of zero is zero and has no direction.*euclidean"):
        cluster_adapters(fresh, k=2)
    assert cluster_adapters(fresh, k=2, metric="euclidean").k == 2
    headed = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], init_lora_weights=False)
    model = get_peft_model(mlp(), headed, "a")
    model.add_adapter("b", headed)
    with pytest.raises(
        NotImplementedError, match="Adapter 'a': It is more than deltas: it also trains `2`"
    ):
        cluster_adapters(model, k=1).save_experts(tmp_path / "experts")
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr("peft.clustering.clusters.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs scipy"):
        cluster_adapters(base, folders, method="average")


def test_an_adapter_of_a_library_that_has_no_deltas_is_named(tmp_path):
    for name in ("sums", "dates", "dora"):
        config = LoraConfig(r=2, target_modules=["0"], use_dora=name == "dora")
        get_peft_model(mlp(), config).save_pretrained(tmp_path / name)
    library = AdapterLibrary(tmp_path)
    with pytest.raises(NotImplementedError, match="Adapter 'dora': .*weight decomposition"):
        cluster_adapters(mlp(), library)
    with pytest.raises(RuntimeError, match="Adapter '(sums|dates|dora)': .*does not fit"):
        cluster_adapters(nn.Sequential(nn.Linear(5, 5)), library)
