# SPDX-License-Identifier: Apache-2.0
"""Poly adapters side by side in one, and their tasks as LoRA adapters, against loops over splits
and skills in float64.
"""

import json

import pytest
import torch
from torch import nn

from peft import (
    PeftModel,
    PolyConfig,
    convert_to_lora,
    get_peft_model,
    save_as_lora,
    save_tasks_as_lora,
)
from peft.tuners.lora import conversion
from peft.tuners.poly.combining import Inventory, has_rest, side_by_side
from peft.tuners.poly.gating import gates, normalize


def inventory(factor, n_tasks, n_splits, n_skills, r, seed, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weights = normalize(gates(draw(n_tasks, n_splits, n_skills) * spread, False))
    return Inventory(
        factor,
        weights,
        draw(n_splits, n_skills, 24 // n_splits, r),
        draw(n_splits, n_skills, r, 12 // n_splits),
    )


def delta(weights, A, B):
    """`[in, out]` of one task: blocks of rows from the splits of `A`, blocks of columns from those
    of `B`.
    """
    rows = torch.cat(
        [sum(w * a for w, a in zip(ws, As, strict=True)) for ws, As in zip(weights, A, strict=True)]
    )
    columns = torch.cat(
        [
            sum(w * b for w, b in zip(ws, Bs, strict=True))
            for ws, Bs in zip(weights, B, strict=True)
        ],
        dim=1,
    )
    return rows @ columns


@pytest.mark.parametrize("spread", [0.0, 3.0, 60.0], ids=["even", "mixed", "closed"])
def test_side_by_side_every_task_keeps_its_mixes(spread):
    parts = [
        inventory(0.7, 4, 2, 3, 2, 0, spread),
        inventory(-1.9, 4, 3, 2, 3, 1, spread),
        inventory(0.0, 4, 1, 4, 1, 2, spread),
        inventory(2.0, 4, 1, 1, 2, 3, spread),
    ]
    closed = spread == 60
    assert any(map(has_rest, parts)) == closed
    logits, A, B = side_by_side(parts, closed)
    n = 10 + closed
    assert logits.shape == (4, 6 * n) and A.shape == (6, n, 4, 8) and B.shape == (6, n, 8, 2)
    mixed = normalize(gates(logits.unflatten(-1, (6, n)), False))
    for task in range(4):
        expected = sum(part.factor * delta(part.weights[task], part.A, part.B) for part in parts)
        found = delta(mixed[task], A, B) / 8
        assert float((found - expected).norm() / expected.norm()) < 1e-9


def test_an_adapter_that_a_task_has_closed_stays_closed(model):
    """All gates shut: its weights add up to less than one, and what they lack is nobody's."""
    model.add_adapter("b", poly(task_names=["x", "y", "z"], n_skills=1))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.poly_router["b"].module_logits[1] = -40
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "cat")
    assert model.peft_config["new"].n_skills == 4
    for task in range(3):
        expected = layer.get_delta_weight("a", task_id=task) + layer.get_delta_weight(
            "b", task_id=task
        )
        torch.testing.assert_close(
            layer.get_delta_weight("new", task_id=task), expected, rtol=1e-4, atol=1e-6
        )


def poly(**fields):
    fields = {
        "r": 2,
        "n_tasks": 3,
        "n_skills": 2,
        "n_splits": 2,
        "init_weights": False,
        "target_modules": ["0"],
        **fields,
    }
    return PolyConfig(**fields)


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    result = get_peft_model(base, poly(task_names=["x", "y", "z"]), "a").eval()
    with torch.no_grad():
        result.base_model.model[0].poly_router["a"].module_logits.normal_()
    return result


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_tasks": 2, "task_names": ["x", "y"]}, r"the same `n_tasks`: a has 3, b has 2"),
        (
            {"task_names": ["x", "y", "w"]},
            r"the same `task_names`: a has \['x', 'y', 'z'\], b has \['x', 'y', 'w'\]",
        ),
        (
            {"poly_type": "mope"},
            "Adapter b routes by input; only adapters that route by task can be combined",
        ),
    ],
)
def test_tasks_must_be_the_same(model, fields, message):
    model.add_adapter("b", poly(**{"task_names": ["x", "y", "z"], **fields}))
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "cat")
    assert sorted(model.peft_config) == ["a", "b"]


def test_a_sum_can_be_grown_and_keeps_its_names(model):
    x = torch.randn(5, 8)
    model.add_weighted_adapter(["a", "a"], [0.5, 0.25], "new", "cat")
    model.set_adapter("new")
    before = [model(x, task_ids=name) for name in "xyz"]
    model.add_tasks(["w"])
    model.add_skills(1)
    assert model.peft_config["new"].task_names == ["x", "y", "z", "w"]
    for name, expected in zip("xyz", before, strict=True):
        torch.testing.assert_close(model(x, task_ids=name), expected, rtol=1e-4, atol=1e-5)


# --- tasks as LoRA adapters
# -------------------------------------------------------------------------------------------


def lora_product(state, path="0"):
    return (
        state[f"base_model.model.{path}.lora_B.weight"]
        @ state[f"base_model.model.{path}.lora_A.weight"]
    )


def test_a_task_by_id_or_name_is_exact_of_rank_r(model):
    layer = model.base_model.model[0]
    for task, name in enumerate("xyz"):
        by_id, by_name = (
            convert_to_lora(model, adapter_name="a", task_id=task),
            convert_to_lora(model, adapter_name="a", task_id=name),
        )
        assert by_id.config.r == by_name.config.r == 2 and by_id.error == 0
        w = layer.poly_router["a"].task_weights()[task].double()
        expected = delta(w, layer.poly_lora_A["a"].double(), layer.poly_lora_B["a"].double()).T / 2
        for state in (by_id.state_dict, by_name.state_dict):
            torch.testing.assert_close(lora_product(state).double(), expected, rtol=1e-5, atol=1e-6)


def test_shares_of_tasks_mix_their_skills(model):
    layer = model.base_model.model[0]
    state = convert_to_lora(
        model, adapter_name="a", task_id={"x": 0.25, 2: 0.5, "z": 0.25}
    ).state_dict
    w = layer.poly_router["a"].task_weights().double()
    expected = (
        delta(
            0.25 * w[0] + 0.75 * w[2],
            layer.poly_lora_A["a"].double(),
            layer.poly_lora_B["a"].double(),
        ).T
        / 2
    )
    torch.testing.assert_close(lora_product(state).double(), expected, rtol=1e-5, atol=1e-6)


def test_all_tasks_become_folders(model, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "_TASKS_AT_ONCE", 2)
    x = torch.randn(5, 8)
    expected = {name: model(x, task_ids=name).detach() for name in "xyz"}
    errors = save_tasks_as_lora(model, tmp_path / "all", adapter_name="a")
    assert errors == dict.fromkeys("xyz", 0.0)
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["x", "y", "z"]
    some = save_tasks_as_lora(
        model, tmp_path / "some", [2, "x"], rank=1, adapter_name="a", progressbar=True
    )
    assert list(some) == ["z", "x"] and all(0 < error < 1 for error in some.values())
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == ["x", "z"]
    assert json.loads((tmp_path / "some" / "x" / "adapter_config.json").read_text())["r"] == 1
    base = model.unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "all" / "x", "x")
    for name in "yz":
        loaded.load_adapter(tmp_path / "all" / name, name)
    for name in "xyz":
        loaded.set_adapter(name)
        torch.testing.assert_close(loaded(x), expected[name], rtol=1e-5, atol=1e-6)


def test_tasks_without_names_and_names_that_are_no_folders(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 12)), poly(n_tasks=2))
    save_tasks_as_lora(model, tmp_path / "plain")
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["task_0", "task_1"]
    model = get_peft_model(nn.Sequential(nn.Linear(8, 12)), poly(task_names=["x", "../y", "z"]))
    with pytest.raises(ValueError, match=r"The task's name '\.\./y' can't be a folder's"):
        save_tasks_as_lora(model, tmp_path / "unsafe")
    with pytest.raises(ValueError, match=r"Unknown task names \['w'\]"):
        save_tasks_as_lora(model, tmp_path / "unsafe", ["w"])
    with pytest.raises(ValueError, match="`tasks` names no task"):
        save_tasks_as_lora(model, tmp_path / "unsafe", [])
    assert not (tmp_path / "unsafe").exists()
    save_as_lora(tmp_path / "y", model, task_id="../y")


def test_routing_by_input_has_no_delta(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 12)), poly(poly_type="mope"))
    assert not model.supports_lora_conversion()
    for attempt in (lambda: convert_to_lora(model, 2), lambda: save_tasks_as_lora(model, tmp_path)):
        with pytest.raises(NotImplementedError, match="routes by input can't be converted"):
            attempt()
