# SPDX-License-Identifier: Apache-2.0
"""Which expert serves which tokens and layers."""

import json

import pytest
import torch
from helpers.models import llama
from helpers.routed import NAMES, saved_adapters

import peft


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    torch.manual_seed(0)
    return saved_adapters(llama(), tmp_path_factory.mktemp("library"), ["q_proj", "down_proj"])[0]


def model_of(places, **options):
    torch.manual_seed(0)
    return peft.get_routed_model(llama(), places, **options).eval()


def test_tasks_are_counted_without_padding(places, tmp_path):
    model = model_of(places, routing="task")
    ids = torch.randint(3, 48, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    with model.watch_experts() as watch:
        model(input_ids=ids, attention_mask=mask, task_ids=["LORA", "POLY.task_2"])
        model(input_ids=ids[:1, :3], task_ids="LORA")
    model(input_ids=ids, task_ids="LOHA")  # unseen
    report = watch.report()
    lora, poly = NAMES.index("LORA"), NAMES.index("POLY.task_2")
    assert len(report.layers) == 4
    for use in report.layers.values():
        assert use["tokens"] == 10  # 5 + 2 + 3
        assert use["chosen"][lora] == pytest.approx(0.8)
        assert use["weight"][poly] == pytest.approx(0.2)
        assert sum(use["weight"]) == pytest.approx(1)
    assert "LORA" in str(report) and "80.0%" in str(report)
    report.save_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["experts"] == NAMES
    assert len(report.to_pandas()) == 4 * len(NAMES)
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 0


def test_watches_that_overlap_see_their_own_calls(places):
    """Contexts of two threads need not be nested."""
    model = model_of(places, routing="task")
    ids = torch.randint(3, 48, (1, 4))
    first, second = model.watch_experts(), model.watch_experts()
    one = first.__enter__()
    model(input_ids=ids, task_ids="LORA")
    two = second.__enter__()
    mask = torch.tensor([[0, 1, 1, 1]])
    model(input_ids=ids, attention_mask=mask, task_ids="LOHA")
    first.__exit__(None, None, None)
    model(input_ids=ids, attention_mask=mask, task_ids="POLY.task_2")
    second.__exit__(None, None, None)
    for watch, counts in (
        (one, {"LORA": 4 / 7, "LOHA": 3 / 7}),
        (two, {"LOHA": 0.5, "POLY.task_2": 0.5}),
    ):
        for use in watch.report().layers.values():
            assert use["chosen"] == pytest.approx([counts.get(name, 0) for name in NAMES])
    assert not any(
        layer.watches or layer.routing.watches for layer in model.base_model.tuner_layers()
    )


def test_a_watch_leaves_padding_out_after_that_of_another_adapter(tmp_path):
    """The adapters have other layers, and one routing."""
    for layer in ("q_proj", "down_proj"):
        (tmp_path / f"of_{layer}").mkdir()
        places, _ = saved_adapters(llama(), tmp_path / f"of_{layer}", [layer], ["LORA", "LOHA"])
        peft.get_routed_model(llama(), places, routing="task").save_pretrained(tmp_path / layer)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "q_proj").eval()
    model.load_adapter(str(tmp_path / "down_proj"), "other")
    model.base_model.set_adapter(["default", "other"])
    with model.watch_experts("other") as watch:
        with model.watch_experts("default"):
            pass
        mask = torch.tensor([[0, 1, 1, 1]])
        model(input_ids=torch.randint(3, 48, (1, 4)), attention_mask=mask, task_ids="LORA")
    assert [use["tokens"] for use in watch.report().layers.values()] == [3, 3]


def test_weights_of_the_last_calls_tokens(places):
    model = model_of(places, routing="arrow", top_k=2, routing_level="token")
    with model.watch_experts() as watch:
        model.generate(input_ids=torch.arange(3, 9)[None], max_new_tokens=2, do_sample=False)
        model(input_ids=torch.arange(3, 11)[None])
    report = watch.report()
    assert report.tokens.shape == (1, 8, len(NAMES))
    torch.testing.assert_close(report.tokens.sum(-1), torch.ones(1, 8))
    first = report.token_table([[f"t{i}" for i in range(8)]]).splitlines()[0]
    assert "t0" in first and NAMES[int(report.tokens[0, 0].argmax())] in first
    assert all(use["tokens"] == 6 + 1 + 8 for use in report.layers.values())
    assert not any(layer.watches for layer in model.base_model.tuner_layers())
