# SPDX-License-Identifier: Apache-2.0
"""Which vectors of a bank serve which layers and factors."""

import collections
import json
import math

import pytest
import torch
from helpers.models import mlp

from peft import PeftModel, VBLoRAConfig, bank_usage, get_peft_model


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = VBLoRAConfig(
        r=3, num_vectors=10, vector_length=4, topk=2, target_modules=["0", "2"], init_logits_std=1.0
    )
    return get_peft_model(mlp(), config)


def by_hand(logits, topk=2):
    """Counts and weights of each vector, position by position."""
    counts, weights = collections.Counter(), collections.Counter()
    for position in logits.flatten(0, -2).tolist():
        best = sorted(range(len(position)), key=lambda i: -position[i])[:topk]
        total = sum(math.exp(position[i]) for i in best)
        for i in best:
            counts[i] += 1
            weights[i] += math.exp(position[i]) / total
    return counts, weights


def test_counts_and_weights_against_a_loop(model, tmp_path):
    usage = bank_usage(model)
    assert [(use.layer, use.factor) for use in usage.uses] == [
        ("0", "A"),
        ("0", "B"),
        ("2", "A"),
        ("2", "B"),
    ]
    for use in usage.uses:
        logits = getattr(
            model.base_model.model.get_submodule(use.layer), f"vblora_logits_{use.factor}"
        )["default"]
        counts, weights = by_hand(logits)
        assert use.counts.tolist() == [counts[i] for i in range(10)]
        assert use.weights.tolist() == pytest.approx([weights[i] for i in range(10)], rel=1e-5)
    model.peft_config["default"].save_only_topk_weights = True
    model.save_pretrained(tmp_path)
    compact = bank_usage(PeftModel.from_pretrained(mlp(), tmp_path))
    for use, other in zip(usage.uses, compact.uses, strict=True):
        assert torch.equal(use.counts, other.counts)
        torch.testing.assert_close(use.weights, other.weights, rtol=1e-5, atol=1e-5)


def test_the_summary(model):
    layer_0, layer_2 = model.base_model.model[0], model.base_model.model[2]
    with torch.no_grad():
        for layer, factor, vectors in (
            (layer_0, "A", (0, 1)),
            (layer_0, "B", (1, 2)),
            (layer_2, "A", (0, 1)),
            (layer_2, "B", (1, 2)),
        ):
            logits = getattr(layer, f"vblora_logits_{factor}")["default"].fill_(-5.0)
            logits[..., list(vectors)] = 0.0
    summary = bank_usage(model).summary()
    positions = 3 * 2 + 4 * 3 + 3 * 4 + 4 * 3
    assert {
        key: summary[key]
        for key in ("num_vectors", "positions", "used", "only_A", "only_B", "both")
    } == {
        "num_vectors": 10,
        "positions": positions,
        "used": 3,
        "only_A": 1,
        "only_B": 1,
        "both": 1,
    }
    shares = [18 / 2 / positions, 1 / 2, 24 / 2 / positions]
    assert summary["effective"] == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)))
    assert summary["top_tenth"] == pytest.approx(0.5)


def test_what_it_gives(model, tmp_path):
    pytest.importorskip("matplotlib")
    usage = bank_usage(model)
    rows = usage.rows()
    assert sum(row["count"] for row in rows) == 2 * 42
    assert sum(row["weight"] for row in rows) == pytest.approx(42)
    usage.save_json(tmp_path / "usage.json")
    assert json.loads((tmp_path / "usage.json").read_text())["rows"] == rows
    assert len(str(usage).splitlines()) == 1 + 4 + 1
    files = usage.plot(tmp_path / "plots")
    assert [file.name for file in files] == [
        "bank_map.png",
        "bank_histogram.png",
        "bank_layers.png",
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    pandas = pytest.importorskip("pandas")
    frame = usage.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == len(rows)


def test_other_adapters_have_none(model):
    with pytest.raises(ValueError, match="no adapter 'b' with a vector bank"):
        bank_usage(model, "b")


def test_a_file_is_asked_for(model, tmp_path):
    usage = bank_usage(model)
    usage.save_json(tmp_path / "new" / "usage.json")
    assert json.loads((tmp_path / "new" / "usage.json").read_text())["summary"] == usage.summary()
    for path, message in (
        (tmp_path, "is a folder; give the path of a file in it"),
        (tmp_path / "new" / "usage.json" / "more.json", "since '.*usage.json' is a file"),
        (5, "`path`=5 must be a path, not int"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            usage.save_json(path)
    with pytest.raises(TypeError, match="`model`='model' must be a module"):
        bank_usage("model")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "usage.json"]
