# SPDX-License-Identifier: Apache-2.0
"""The similarity of adapters of all methods, against their dense deltas."""

import copy
import json

import pytest
import torch
from helpers.methods import METHODS
from torch import nn

import peft
from peft import LoKrConfig, LoraConfig, adapter_similarity, get_peft_model
from peft.clustering import clusters_of


def mlp(width=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 16))


def adapter(method, targets=("0", "2"), base=None, **more):
    config = METHODS[method].config(target_modules=list(targets), **more)
    return get_peft_model(copy.deepcopy(base or mlp()), config)


def dense(model, name="default", **options):
    """Each layer's delta in float64, by path."""
    layers = dict(model.get_base_model().named_modules())
    return {
        path: layers[path].get_delta_weight(name, **options).detach().double()
        for path in ("0", "2")
        if name in getattr(layers[path], "scaling", {})
    }


def flat(deltas, path=None):
    zero = torch.zeros(8 * 16)
    return torch.cat([deltas.get(p, zero).flatten() for p in ((path,) if path else ("0", "2"))])


def assert_similar(similarity, deltas):
    for path in (None, "0", "2"):
        rows = torch.stack([flat(each, path) for each in deltas])
        products = similarity.products if path is None else similarity.layers[path]
        torch.testing.assert_close(products, rows @ rows.mT, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            similarity.distances(path), torch.cdist(rows, rows), rtol=1e-4, atol=1e-5
        )
        cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
        torch.testing.assert_close(similarity.cosines(path), cosine, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(similarity.norms(path), rows.norm(dim=1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("memory", [1, 3000, 2**31])  # an adapter a block, a few, all
def test_saved_adapters_of_all_methods_are_compared_as_dense_deltas(memory, tmp_path):
    base, deltas, folders = mlp(), [], []
    for i, method in enumerate([*METHODS, "LORA"]):
        torch.manual_seed(i)
        model = adapter(method, ("2",) if i == 1 else ("0", "2"))
        folders.append(tmp_path / f"{method}{i}")
        model.save_pretrained(folders[-1])
        tasks = METHODS[method].fields.get("n_tasks", 0)
        options = [{"task_id": t} for t in range(tasks)] or [{}]
        deltas += [dense(model, **option) for option in options]
    before = copy.deepcopy(base.state_dict()), repr(base)
    similarity = adapter_similarity(base, folders, memory=memory)
    assert repr(base) == before[1] and all(
        torch.equal(base.state_dict()[k], v) for k, v in before[0].items()
    )
    names = [f.name for f in folders if "POLY" not in f.name]
    assert [n for n in similarity.names if "." not in n] == names
    assert any(name.startswith("POLY") and name.endswith(".task_0") for name in similarity.names)
    assert_similar(similarity, deltas)


def test_adapters_of_a_model_are_compared_at_their_present_scale(tmp_path):
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(mlp(), config, "a")
    model.add_adapter("b", LoraConfig(r=3, target_modules=["2"], init_lora_weights=False))
    model.add_adapter("new", LoraConfig(target_modules=["0"]))  # a zero delta
    model.base_model.model[0].set_scale("a", 0.3)
    similarity = adapter_similarity(model)
    assert similarity.names == ["a", "b", "new"]
    assert_similar(similarity, [dense(model, name) for name in similarity.names])
    model.save_pretrained(tmp_path / "x", selected_adapters=["b"])
    model.save_pretrained(tmp_path / "y", selected_adapters=["b"])
    pair = adapter_similarity(model, ["b", tmp_path / "x" / "b", tmp_path / "y" / "b"])
    assert pair.names == ["b", str(tmp_path / "x" / "b"), str(tmp_path / "y" / "b")]
    assert not pair.distances().any() and (pair.cosines() > 1 - 1e-12).all()
    assert not adapter_similarity(model, ["a", "b"], by_layer=False).layers
    saved = {
        "one": tmp_path / "x" / "b",
        "two": (model.peft_config["b"], peft.get_peft_model_state_dict(model, adapter_name="b")),
    }
    assert not adapter_similarity(mlp(), saved).distances().any()


def test_heads_beside_the_deltas_do_not_count(tmp_path):
    model = get_peft_model(
        mlp(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "a")
    for similarity in (adapter_similarity(model), adapter_similarity(mlp(), [tmp_path / "a"])):
        assert list(similarity.layers) == ["0"]
        torch.testing.assert_close(similarity.norms().float()[0], dense(model)["0"].norm().float())


def test_the_report_prints_and_writes(tmp_path):
    config = LoKrConfig(r=2, target_modules=["0", "2"], init_weights=False)
    model = get_peft_model(mlp(), config, "cats")
    model.add_adapter("dogs", config)
    pair = adapter_similarity(model)
    text = str(pair).splitlines()
    assert text[0] == "Δ1 = cats, Δ2 = dogs" and len(text) == 5
    one, two = (flat(dense(model, name)) for name in ("cats", "dogs"))
    wanted = one.norm(), two.norm(), (one - two).norm(), one @ two / one.norm() / two.norm()
    shown = [float(word) for word in text[-1].removeprefix("all layers").split()]
    assert shown == pytest.approx([float(w) for w in wanted], rel=1e-3, abs=6e-4)
    model.add_adapter("birds", config)
    similarity = adapter_similarity(model)
    assert "most alike" in str(similarity) and "all layers" in str(similarity)
    similarity.save_json(tmp_path / "new" / "similarity.json")
    content = json.loads((tmp_path / "new" / "similarity.json").read_text())
    assert content == json.loads(json.dumps(similarity.to_dict()))
    torch.testing.assert_close(
        torch.tensor(content["cosines"]).double(), similarity.cosines(), rtol=1e-6, atol=1e-6
    )
    frames = similarity.to_pandas()
    assert frames["cosines"].loc["cats", "cats"] == pytest.approx(1)
    assert len(frames["pairs"]) == 9 and set(frames["pairs"]["layer"]) == {"", "0", "2"}
    assert frames["norms"].loc["all layers", "dogs"] == pytest.approx(float(two.norm()))
    similarity.plot(tmp_path / "similarity.png")
    assert (tmp_path / "similarity.png").read_bytes().startswith(b"\x89PNG")
    adapter_similarity(model, ["cats"]).plot()
    assert "cats" in str(adapter_similarity(model, ["cats"]))


def test_wrong_arguments_of_a_similarity():
    similarity = adapter_similarity(adapter("LORA"))
    for layer in (5, ["0"], "a"):
        with pytest.raises(peft.PeftError, match="There are no inner products of layer"):
            similarity.cosines(layer)
    with pytest.raises(peft.PeftError, match="must be what `adapter_similarity` returns"):
        clusters_of(5)


def test_what_can_not_be_compared_is_named(tmp_path):
    model = adapter("LORA")
    model.save_pretrained(tmp_path / "a")
    wide = adapter("LORA", base=mlp(24))
    wide.save_pretrained(tmp_path / "wide")
    cases = [
        (mlp(), None, ValueError, "the model has none"),
        (mlp(), [], TypeError, "must be a list of names or folders"),
        (mlp(), "a", TypeError, "must be a list of names or folders"),
        (mlp(), {1: tmp_path / "a"}, TypeError, "names \\(strings\\) as keys, not 1"),
        (mlp(), [tmp_path / "a"] * 2, ValueError, "a' twice"),
        (mlp(), [tmp_path / "b"], FileNotFoundError, "b"),
        (
            mlp(),
            [tmp_path / "a", tmp_path / "wide"],
            RuntimeError,
            "wide': It does not fit this base model",
        ),
        (
            model,
            ["defualt"],
            ValueError,
            "neither an adapter of the model nor a folder.*Did you mean 'default'",
        ),
    ]
    for base, adapters, error, message in cases:
        with pytest.raises(error, match=message):
            adapter_similarity(base, adapters)
    with pytest.raises(ValueError, match="`memory`=0 must be an integer"):
        adapter_similarity(model, memory=0)
    with pytest.raises(ValueError, match="no inner products of layer '1'.*2 are"):
        adapter_similarity(model).cosines("1")
