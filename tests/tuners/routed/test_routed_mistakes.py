# SPDX-License-Identifier: Apache-2.0
"""Mistakes in calls of a routed model are refused with their remedy, and change nothing."""

from pathlib import Path

import pytest
import torch
from helpers.routed import saved_adapters
from helpers.states import assert_unchanged, snapshot
from torch import nn

import peft
from peft.base.errors import PeftNotSupportedError

TARGETS = ["0", "2"]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).eval()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    return saved_adapters(mlp(), folder, TARGETS, ["LORA", "LOKR", "VBLORA"])[0]


@pytest.fixture
def x():
    torch.manual_seed(3)
    return torch.randn(2, 3, 8)


def test_decomposed_adapters_are_refused_before_and_after(places, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    peft.get_peft_model(mlp(), config).save_pretrained(tmp_path / "dora")
    model = peft.get_routed_model(mlp(), places)
    before = snapshot(model)
    for call in (
        lambda: peft.get_routed_model(mlp(), {"d": tmp_path / "dora"}),
        lambda: model.add_experts({"d": tmp_path / "dora"}),
    ):
        with pytest.raises(PeftNotSupportedError, match="Expert 'd'.*decomposition"):
            call()
    assert_unchanged(before, model)


def test_messages_speak_of_experts(places, x):
    model = peft.get_routed_model(mlp(), places, routing="task")
    for call in (
        lambda: model(x, task_ids="LORAS"),
        lambda: model.remove_experts("LORAS"),
        lambda: model.set_expert_weights({"LORAS": 1.0}),
    ):
        with pytest.raises(ValueError, match="Unknown expert names.*Did you mean 'LORA'"):
            call()
    with pytest.raises(ValueError, match="the adapter has 3 experts"):
        model(x)
    with pytest.raises(ValueError, match="no experts to route over"):
        peft.get_routed_model(mlp(), {})


def test_gates_are_fitted_in_a_model_that_runs_them(places, x):
    model = peft.get_routed_model(mlp(), places, routing="phatgoose")
    loss = {"LORA": lambda: model(x, task_ids="LORA").square().mean()}
    for wrong in ([], 3):
        with pytest.raises(TypeError, match=r"`examples\['LORA'\]` must be"):
            model.fit_gates({"LORA": wrong})
    with model.disable_adapter(), pytest.raises(ValueError, match="switched off"):
        model.fit_gates(loss)
    model.copy_adapter("default", "other")
    with pytest.raises(ValueError, match="Adapter other must be active"):
        model.fit_gates(loss, adapter_name="other")
    assert model.fit_gates(loss, steps=1)["LORA"]

    blend = peft.get_routed_model(mlp(), places, routing="learned")
    blend.merge_adapter()
    with pytest.raises(ValueError, match="are merged"):
        blend.fit_gates(lambda: blend(x).square().mean())

    means = peft.get_routed_model(mlp(), places, routing="activation").eval()
    with means.disable_adapter(), pytest.raises(ValueError, match="switched off"):
        means.collect_prototypes({"LORA": x})
    with pytest.raises(ValueError, match="have no prototypes"):
        means(x)


@pytest.mark.parametrize(
    "options",
    [
        {"routing": "fixed", "temperature": 0.5},
        {"routing": "task", "temperature": 2.0},
        {"routing": "arrow", "weights_granularity": "model"},
        {"routing": "task", "weights_granularity": "model"},
    ],
)
def test_options_without_effect_are_refused(places, options):
    base = mlp()
    with pytest.raises(ValueError, match="leave it out"):
        peft.get_routed_model(base, places, **options)
    assert type(base[0]) is nn.Linear


def test_a_mixed_model_tells_where_routed_methods_are(places):
    model = peft.get_peft_model(mlp(), peft.RoutedConfig(experts=places), mixed=True)
    with pytest.raises(
        AttributeError, match=r"ROUTED\. A model of several methods .* load it here"
    ):
        model.named_experts()
    with pytest.raises(AttributeError, match="Did you mean 'set_adapter'"):
        model.set_adpter("default")


def test_a_library_gives_experts_in_memory(places, x):
    library = peft.AdapterLibrary(Path(places["LORA"]).parent)
    model = peft.get_routed_model(
        mlp(), {name: library.load(name) for name in places}, routing="task"
    ).eval()
    for name, place in places.items():
        alone = peft.PeftModel.from_pretrained(mlp(), place)
        torch.testing.assert_close(model(x, task_ids=name), alone(x))
    with pytest.raises(TypeError, match="Expert 'a'.*pair"):
        peft.get_routed_model(mlp(), {"a": (1, 2, 3)})


def test_arguments_of_other_types(places, x):
    model = peft.get_routed_model(mlp(), places, routing="activation").eval()
    with model.watch_experts() as watch:
        pass
    arrow, paths = peft.ArrowConfig(top_k=1), list(places.values())
    gks = peft.ArrowConfig(top_k=1, use_gks=True)
    before = snapshot(model)
    for error, message, call in (
        (TypeError, "Experts must be a dictionary", lambda: model.add_experts(paths)),
        (
            TypeError,
            "Experts must be a dictionary",
            lambda: peft.get_routed_model(mlp(), places, general_experts=paths),
        ),
        (
            TypeError,
            "`hub_options` must be a dictionary",
            lambda: peft.get_routed_model(mlp(), places, hub_options="main"),
        ),
        (TypeError, "`experts`=5 must be a name", lambda: model.remove_experts(5)),
        (TypeError, "'LORA' needs batches", lambda: model.collect_prototypes({"LORA": 5})),
        (ValueError, "`measure`='wieght' must be", lambda: watch.report().mean("wieght")),
        (
            ValueError,
            "at least one adapter path, in a list",
            lambda: peft.create_arrow_model(mlp(), Path(paths[0]), arrow),
        ),
        (
            ValueError,
            "`general_adapter_paths`, a list",
            lambda: peft.create_arrow_model(mlp(), paths, gks, paths[0]),
        ),
    ):
        with pytest.raises(error, match=message) as caught:
            call()
        assert isinstance(caught.value, peft.PeftError)
    assert_unchanged(before, model)
