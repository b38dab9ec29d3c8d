# SPDX-License-Identifier: Apache-2.0
"""`peft.functional`: adapters in a model that is no `PeftModel`, of one method and of several."""

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import TARGETS, llama, mlp
from helpers.states import assert_unchanged, snapshot

import peft
import peft.functional as F
from peft.tuners.tuners_utils import AdapterParameterDict, BaseTunerLayer


@pytest.fixture
def two(method):
    """A plain model with two adapters of one method, on overlapping layers."""
    model = mlp()
    F.inject_adapter_in_model(method.config(target_modules=TARGETS), model, "one")
    return F.inject_adapter_in_model(method.config(target_modules=["2"]), model, "two")


@pytest.fixture
def several():
    """A plain model with an adapter of each method, two of them around the same layer."""
    model = mlp()
    for name in sorted(METHODS):
        F.inject_adapter_in_model(
            METHODS[name].config(target_modules=["0" if name == "LOKR" else "2"]), model, name
        )
    return model


def trainable(model):
    """Names of the adapters that have trainable parameters, and whether all of theirs are."""
    own: dict[str, set[bool]] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name in module.scaling:
                own.setdefault(name, set()).update(
                    p.requires_grad for p in module.adapter_parameters(name)
                )
        if isinstance(module, AdapterParameterDict):
            for name, parameter in module.items():
                own.setdefault(name, set()).add(parameter.requires_grad)
    assert all(len(states) == 1 for states in own.values())
    return {name for name, states in own.items() if states == {True}}


def active(model):
    return {
        tuple(module.active_adapters)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
    }


def test_one_or_several_adapters_are_set(two):
    for names in ("one", "two", ["one", "two"]):
        F.set_adapter(two, names)
        wanted = [names] if isinstance(names, str) else names
        assert active(two) == {tuple(wanted)}
        assert trainable(two) == set(wanted)
    F.set_adapter(two, "one", inference_mode=True)
    assert (active(two), trainable(two)) == ({("one",)}, set())


def test_adapters_of_several_methods_are_set(several):
    for names in ("LOKR", ["VBLORA", "POLY"], sorted(METHODS)):
        F.set_adapter(several, names)
        wanted = [names] if isinstance(names, str) else names
        assert active(several) == {tuple(wanted)}
        assert trainable(several) == set(wanted)


def test_only_layers_of_a_class_are_set(several):
    F.set_adapter(several, sorted(METHODS))
    kind = type(next(module for module in several.modules() if isinstance(module, BaseTunerLayer)))
    F.set_adapter(several, "LOKR", layer_cls=kind)
    assert active(several) == {("LOKR",), tuple(sorted(METHODS))}


def test_adapters_are_frozen_and_unfrozen(two, several):
    for model, names in ((two, ["one", "two"]), (several, sorted(METHODS))):
        F.set_requires_grad(model, names, False)
        assert trainable(model) == set()
        F.set_requires_grad(model, names[0])
        assert trainable(model) == {names[0]}
        F.set_requires_grad(model, names)
        assert trainable(model) == set(names)


def test_an_unknown_name_changes_nothing(two):
    before = snapshot(two)
    for call in (
        lambda: F.set_adapter(two, "three"),
        lambda: F.set_adapter(two, ["one", "three"]),
        lambda: F.set_requires_grad(two, ["one", "three"], False),
        lambda: F.delete_adapter(two, "three", prefix="x_"),
        lambda: F.cast_adapter_dtype(two, "three"),
    ):
        with pytest.raises(ValueError, match="three .*this model has one, two"):
            call()
    assert_unchanged(before, two)
    with pytest.raises(ValueError, match="this model has none"):
        F.set_adapter(mlp(), "one")


def test_a_deleted_adapter_leaves_nothing_behind(method):
    model = mlp()
    F.inject_adapter_in_model(method.config(target_modules=TARGETS), model, "one")
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(3, 8)
    expected = model(x, **method.call)
    F.inject_adapter_in_model(method.config(target_modules=["2"]), model, "two")
    with pytest.warns(
        UserWarning, match="two was active which is now deleted. Setting active adapter to one"
    ):
        assert F.delete_adapter(model, "two", prefix="") == ["one"]
    assert list(model.peft_config) == ["one"]
    assert model.state_dict().keys() == kept.keys()
    assert torch.equal(model(x, **method.call), expected)
    F.inject_adapter_in_model(
        method.config(target_modules=["2"]), model, "two"
    )  # the name is free again


def test_the_last_adapter_can_be_deleted(method):
    model = mlp()
    x = torch.randn(3, 8)
    expected = model(x)
    F.inject_adapter_in_model(method.config(target_modules=TARGETS), model, "one")
    assert F.delete_adapter(model, "one", prefix="") == []
    assert torch.equal(model(x), expected)
    assert model.peft_config == {}


def test_an_adapter_of_several_methods_is_deleted(several):
    F.set_adapter(several, sorted(METHODS))
    x = torch.randn(3, 8)
    for name in sorted(METHODS):
        left = F.delete_adapter(several, name, prefix="")
        assert left == [other for other in sorted(METHODS) if other > name]
        several(x, **({"task_ids": 1} if "POLY" in left else {}))
    assert not [
        name for name in several.state_dict() if any(prefix in name for prefix in ("lora", "lokr"))
    ]


def test_a_merged_adapter_is_not_deleted(two, method):
    F.set_adapter(two, "two")
    layer = next(
        module
        for module in two.modules()
        if isinstance(module, BaseTunerLayer) and "two" in module.scaling
    )
    layer.merge(**method.merge)
    before = snapshot(two)
    with pytest.raises(ValueError, match="while they are merged"):
        F.delete_adapter(two, "two", prefix="")
    assert_unchanged(before, two)


def test_one_adapter_is_cast(method):
    model = mlp(torch.bfloat16)
    for name in ("one", "two"):
        F.inject_adapter_in_model(method.config(target_modules=TARGETS), model, name)
    model.bfloat16()

    def dtypes(adapter):
        return {
            tensor.dtype for name, tensor in model.named_parameters() if adapter in name.split(".")
        }

    F.cast_adapter_dtype(model, "one", autocast_adapter_dtype=False)
    assert dtypes("one") == {torch.bfloat16}
    with torch.inference_mode():  # which leaves no trace
        F.cast_adapter_dtype(model, "one")
    assert not any(tensor.is_inference() for tensor in model.parameters())
    assert (dtypes("one"), dtypes("two")) == ({torch.float32}, {torch.bfloat16})
    assert all(
        tensor.dtype == torch.bfloat16
        for name, tensor in model.named_parameters()
        if "base_layer" in name
    )


def test_they_work_on_a_peft_model_too(method):
    model = peft.get_peft_model(mlp(), method.config(target_modules=TARGETS), "one")
    model.add_adapter("two", method.config(target_modules=TARGETS))
    F.set_adapter(model, "two")
    assert model.active_adapters == ["two"]
    F.set_requires_grad(model, "two", False)
    assert model.get_nb_trainable_parameters()[0] == 0
    F.set_adapter(model, "one")
    assert F.delete_adapter(model, "two", prefix="") == ["one"]
    assert list(model.peft_config) == ["one"]


def test_a_state_goes_out_of_one_model_and_into_another(method):
    models = [
        F.inject_adapter_in_model(method.config(target_modules=TARGETS), mlp(), "x")
        for _ in range(2)
    ]
    models[1].load_state_dict(
        {
            **models[1].state_dict(),
            **{
                k: v
                for k, v in models[0].state_dict().items()
                if "base_layer" in k or k.startswith("4")
            },
        }
    )
    result = F.set_peft_model_state_dict(
        models[1], F.get_peft_model_state_dict(models[0], adapter_name="x"), "x"
    )
    assert not result.missing_keys
    assert not result.unexpected_keys
    x = torch.randn(3, 8)
    assert torch.equal(models[0](x, **method.call), models[1](x, **method.call))


def test_transformers_own_methods_delete(method):
    model = llama()
    for name in ("one", "two"):
        model.add_adapter(method.config(target_modules=["q_proj"]), name)
    model.set_adapter("one")
    model.delete_adapter("two")
    assert (list(model.peft_config), model.active_adapters()) == (["one"], ["one"])
    model.delete_adapter("one")
    assert not hasattr(model, "peft_config")
    model(torch.tensor([[1, 2, 3]]))
    assert not [name for name in model.state_dict() if ".one" in name or ".two" in name]
