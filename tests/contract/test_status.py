# SPDX-License-Identifier: Apache-2.0
"""`get_layer_status` and `get_model_status` for every method."""

import dataclasses
import warnings

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import TARGETS, llama, mlp
from torch import nn

import peft
from peft.base.registry import PEFT_TYPE_TO_TUNER_MAPPING
from peft.peft_model import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from peft.tuners.tuners_utils import BaseTunerLayer


class Net(nn.Module):
    """Two layers to adapt and one to train whole."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.head(self.b(self.a(x)))


@pytest.fixture
def model(method):
    model = peft.get_peft_model(
        Net(), method.config(target_modules=["a", "b"], modules_to_save=["head"]), "one"
    )
    model.add_adapter("two", method.config(target_modules=["b"]))
    return model


def layers(model):
    return {status.name: status for status in model.get_layer_status()}


def test_fields_are_those_of_the_interface():
    assert [f.name for f in dataclasses.fields(TunerLayerStatus)] == [
        "name",
        "module_type",
        "enabled",
        "active_adapters",
        "merged_adapters",
        "requires_grad",
        "available_adapters",
        "devices",
        "quantization_backend",
    ]
    assert [f.name for f in dataclasses.fields(TunerModelStatus)] == [
        "base_model_type",
        "adapter_model_type",
        "peft_types",
        "trainable_params",
        "total_params",
        "num_adapter_layers",
        "enabled",
        "active_adapters",
        "merged_adapters",
        "requires_grad",
        "available_adapters",
        "devices",
        "quantization_backend",
    ]


def test_a_fresh_model(model, method):
    found = layers(model)
    assert list(found) == ["model.a", "model.b", "model.head"]
    kind = method.config().peft_type.value.lower()
    assert found["model.a"] == TunerLayerStatus(
        name="model.a",
        module_type=f"{kind}.Linear",
        enabled=True,
        active_adapters=["one"],
        merged_adapters=[],
        requires_grad={"one": True},
        available_adapters=["one"],
        devices={"one": ["cpu"]},
        quantization_backend=None,
    )
    assert found["model.b"].requires_grad == {"one": True, "two": False}
    assert found["model.b"].available_adapters == ["one", "two"]
    assert (found["model.head"].module_type, found["model.head"].available_adapters) == (
        "ModulesToSaveWrapper",
        ["one"],
    )
    trainable, total = model.get_nb_trainable_parameters()
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[method.config().peft_type].__name__
    assert model.get_model_status() == TunerModelStatus(
        base_model_type="Net",
        adapter_model_type=tuner,
        peft_types={"one": kind.upper(), "two": kind.upper()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=3,
        enabled=True,
        active_adapters=["one"],
        merged_adapters=[],
        requires_grad={"one": True, "two": False},
        available_adapters=["one", "two"],
        devices={"one": ["cpu"], "two": ["cpu"]},
        quantization_backend=None,
    )


def test_switching_adapters_shows(model):
    model.set_adapter("two")
    status = model.get_model_status()
    assert (status.active_adapters, status.requires_grad) == (["two"], {"one": False, "two": True})
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        status = model.get_model_status()
        assert (status.enabled, status.requires_grad) == (False, {"one": False, "two": False})
        assert all(not layer.enabled for layer in model.get_layer_status())
    model.set_adapter("one")
    model.delete_adapter("two")
    assert model.get_model_status().available_adapters == ["one"]


def test_irregular_states_are_called_so(model, method):
    a, b = model.base_model.model.a, model.base_model.model.b
    a.enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"
    a.enable_adapters(True)
    a.set_adapter("two")
    assert model.get_model_status().active_adapters == "irregular"
    a.set_adapter("one")
    b.merge(**method.merge)
    assert model.get_model_status().merged_adapters == "irregular"
    a.merge(**method.merge)
    assert model.get_model_status().merged_adapters == [
        "one"
    ]  # `head` is no layer that could merge
    model.unmerge_adapter()
    next(a.adapter_parameters("one")).requires_grad_(False)
    assert layers(model)["model.a"].requires_grad == {"one": "irregular"}
    assert model.get_model_status().requires_grad == {"one": "irregular", "two": False}
    model.base_model.model.head.enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"


def test_a_module_that_uses_another_adapter_than_the_layers_is_irregular(model):
    model.base_model.model.head.set_adapter("two")
    assert model.get_model_status().active_adapters == "irregular"


def test_a_model_with_injected_adapters(method):
    model = peft.inject_adapter_in_model(
        method.config(target_modules=TARGETS), mlp(), "x", low_cpu_mem_usage=True
    )
    found = get_layer_status(model)
    assert [status.name for status in found] == TARGETS
    assert found[0].devices == {"x": ["meta"]}
    status = get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == (
        "other",
        "None",
        {},
    )
    assert (status.active_adapters, status.num_adapter_layers) == (["x"], 2)


def test_a_transformers_model_with_adapters_of_its_own(method):
    model = llama()
    model.add_adapter(method.config(target_modules=["q_proj"]), "x")
    status = get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == (
        "LlamaForCausalLM",
        "None",
        {},
    )
    assert [layer.name for layer in get_layer_status(model)] == [
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    ]


def test_several_methods_on_one_model():
    names = sorted(METHODS)
    model = peft.get_peft_model(
        mlp(), METHODS[names[0]].config(target_modules=["0"]), names[0], mixed=True
    )
    for name in names[1:]:
        model.add_adapter(name, METHODS[name].config(target_modules=["2"]))
    model.set_adapter(names)
    status = model.get_model_status()
    assert status.peft_types == {name: name for name in names}
    assert (status.base_model_type, status.active_adapters, status.available_adapters) == (
        "Sequential",
        names,
        names,
    )
    kinds = [layer.module_type for layer in model.get_layer_status()]
    assert sorted(kinds) == sorted(f"{name.lower()}.Linear" for name in names)


@pytest.mark.compile
def test_a_compiled_model_reads_like_the_model(model):
    compiled = torch.compile(model, backend="eager")
    assert get_layer_status(compiled) == get_layer_status(model)
    assert get_model_status(compiled) == get_model_status(model)


def test_rows_of_embeddings_are_layers_too(method):
    config = method.config(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    model = peft.get_peft_model(llama(), config)
    found = layers(model)
    assert found["model.model.embed_tokens"].module_type == "TrainableTokensWrapper"
    assert found["model.model.embed_tokens"].requires_grad == {"default": True}
    assert model.get_model_status().requires_grad == {"default": True}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_named(method, bits):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes

    net, kind = Net(), bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    quantised = kind(16, 16, **({} if bits == 4 else {"has_fp16_weights": False}))
    quantised.load_state_dict(net.b.state_dict())
    net.b = quantised.to("cpu")
    model = peft.get_peft_model(net, method.config(target_modules=["a", "b"]))
    assert layers(model)["model.b"].quantization_backend == f"bnb {bits}bit"
    assert layers(model)["model.a"].quantization_backend is None
    assert model.get_model_status().quantization_backend == "irregular"


@pytest.mark.parametrize("function", [get_layer_status, get_model_status])
def test_a_model_without_adapters_is_an_error(function):
    with pytest.raises(ValueError, match="No adapter layers found in the model"):
        function(mlp())
    with pytest.raises(TypeError, match="got <class 'int'>"):
        function(3)


def test_the_functions_are_the_methods(model):
    assert model.get_layer_status() == peft.get_layer_status(model) == get_layer_status(model)
    assert model.get_model_status() == peft.get_model_status(model) == get_model_status(model)
    assert sum(isinstance(module, BaseTunerLayer) for module in model.modules()) == 2
