# SPDX-License-Identifier: Apache-2.0
"""Adapters made of one: some tasks, a blend of tasks, the mean of all skills."""

import pytest
import torch
from helpers.poly import poly
from helpers.states import assert_unchanged, snapshot

from peft import PeftModel, save_as_lora

NAN, INF = float("nan"), float("inf")


def test_the_mean_of_all_skills():
    model = poly(alpha=3.0)
    model.average_skills("mean")
    for layer in model.base_model.tuner_layers():
        A, B = layer.poly_lora_A["default"].double(), layer.poly_lora_B["default"].double()
        left = torch.cat([sum(A[q, s] for s in range(3)) / 3 for q in range(2)], 0)
        right = torch.cat([sum(B[q, s] for s in range(3)) / 3 for q in range(2)], 1)
        torch.testing.assert_close(
            layer.get_delta_weight("mean").double(), (left @ right * 1.5).T, atol=1e-6, rtol=1e-5
        )
    new = model.peft_config["mean"]
    assert (new.n_tasks, new.n_skills, new.n_splits, new.r, new.alpha, new.task_names) == (
        1,
        1,
        1,
        2,
        3.0,
        None,
    )


@pytest.mark.parametrize("task_rank", [0, 1])
def test_what_is_extracted_has_the_scale_that_was_set(task_rank):
    model = poly(task_rank=task_rank)
    for layer in model.base_model.tuner_layers():
        layer.set_scale("default", 3)
    x = torch.randn(2, 8)
    expected = model(x, task_ids=["d", "b"])
    factors = [
        layer.low_rank_factors("default", task_id={3: 0.25, 1: 0.75})
        for layer in model.base_model.tuner_layers()
    ]
    model.extract_tasks("few", ["d", "b"])
    model.extract_tasks("one", {"b": 1.0})
    model.extract_tasks("blend", {"d": 0.25, "b": 0.75})
    model.set_adapter("few")
    torch.testing.assert_close(model(x, task_ids=[0, 1]), expected)
    model.set_adapter("one")
    torch.testing.assert_close(model(x[1:]), expected[1:])
    for layer, low in zip(model.base_model.tuner_layers(), factors, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("blend"), low.B @ low.A)


@pytest.mark.parametrize("granularity", ["linear", "layer"])
def test_extracting_tasks(granularity, tmp_path):
    model = poly(router_granularity=granularity, rank_pattern={"2": 3})
    x = torch.randn(2, 8)
    expected = model(x, task_ids=["d", "b"])
    model.extract_tasks("few", ["d", "b"])
    model.extract_tasks("one", {"b": 1.0})
    model.extract_tasks("blend", {"d": 0.25, "b": 0.75})
    model.set_adapter("few")
    assert model.peft_config["few"].task_names == ["d", "b"] and torch.equal(
        model(x, task_ids=[0, 1]), expected
    )
    model.set_adapter("one")
    torch.testing.assert_close(model(x[1:]), expected[1:])
    for layer in model.base_model.tuner_layers():
        low = layer.low_rank_factors("default", task_id={3: 0.25, 1: 0.75})
        torch.testing.assert_close(layer.get_delta_weight("blend"), low.B @ low.A)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "few")
    assert torch.equal(loaded(x, task_ids=["d", "b"]), expected)
    with pytest.raises(ValueError, match="a task twice"):
        poly().extract_tasks("x", ["a", "a"])
    with pytest.raises(ValueError, match="already exists"):
        poly().extract_tasks("default", ["a"])


BAD_SHARES = [
    ({}, "names no task; pass a share for each"),
    ({"A": 1.0}, "Did you mean 'a'"),
    ({("a", "b"): 1.0}, "names 2 tasks; pass one"),
    *(
        ({"b": 1.0, "a": share}, r"\['a'\]`=.* must be a finite number")
        for share in (NAN, INF, "1", None, True, [1.0])
    ),
]


@pytest.mark.parametrize(("shares", "message"), BAD_SHARES, ids=str)
def test_shares_of_a_blend_are_checked(shares, message, tmp_path):
    model = poly()
    before = snapshot(model)
    for blend in (
        lambda: model.extract_tasks("blend", shares),
        lambda: save_as_lora(tmp_path / "lora", model, task_id=shares),
    ):
        with pytest.raises(ValueError, match=message):
            blend()
    assert_unchanged(before, model)
    assert list(model.peft_config) == ["default"] and not (tmp_path / "lora").exists()


def test_shares_are_numbers_of_any_kind_and_add_up():
    model = poly()
    model.extract_tasks("blend", {"a": torch.tensor(0.75), 0: -0.25, "b": 0})
    for layer in model.base_model.tuner_layers():
        # Both factors have the share: it is their weights that are blended.
        expected = 0.5**2 * layer.get_delta_weight("default", task_id=0).double()
        torch.testing.assert_close(layer.get_delta_weight("blend").double(), expected)
