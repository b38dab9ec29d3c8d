# SPDX-License-Identifier: Apache-2.0
"""Modules that compute with a child's weight in place of calling the child: an adapter of the
child's output would have no effect there, but on merging. And convolutions whose own `forward`
gives outputs that an adapter's can't be added to.
"""

import copy
import dataclasses
import functools
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.states import assert_unchanged, snapshot
from torch import nn

from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from peft.base.child_uses import child_uses
from peft.base.errors import UnsupportedModuleError
from peft.core import plan


class Mixer(nn.Module):
    """A state space mixer in small: it calls one layer, and computes with the weight of others."""

    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(8, 8)
        self.dt_proj = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.tables = nn.ParameterList([torch.randn(8, 8), torch.randn(8, 8)])
        self.start = float(self.in_proj.weight.detach().sum())  # no part of a forward

    def forward(self, x):
        x = x.to(self.in_proj.weight.dtype).view(-1, self.in_proj.weight.shape[1])
        x = self.in_proj(x) @ self.dt_proj.weight.T + self.dt_proj.bias
        return sum((x @ self.tables[i] for i in range(len(self.tables))), self.convolved(x))

    def convolved(self, x):
        if len(x) > 1:
            return self.conv(x.T).T
        return (self.conv.weight[:, :, 1] @ x.T).T + self.conv.bias


class Regular(nn.Module):
    """A layer that calls its convolution, and reads the weight beside the forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self._reset_parameters()

    def _reset_parameters(self):
        nn.init.xavier_uniform_(self.conv.weight)

    def penalty(self):
        return self.conv.weight.square().sum()

    def forward(self, x):
        return self.conv(x)


def wrap(function):
    return functools.wraps(function)(lambda *args: function(*args))


class Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    @wrap
    def forward(this, x):
        return (lambda y: nn.functional.linear(y, this.a.weight))(x)


class Inherits(Decorated):
    def forward(self, x):
        return super().forward(x) + self.more(x)

    def more(self, x):
        return self.b(x) + self.c.weight.sum() + self.c(x)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer = Mixer()

    def forward(self, x):
        return self.mixer(x)


def outer():
    torch.manual_seed(0)
    return Outer()


class Falcon(Mixer):
    """A mixer that calls the layer where the model is quantized."""

    config = SimpleNamespace()

    def forward(self, x):
        return super().forward(x) if self.time_step(x) is None else self.time_step(x)

    def time_step(self, x):
        return self.dt_proj(x) if hasattr(self.config, "_is_quantized") else None


def test_a_layer_whose_weight_is_read_is_refused(method):
    """Its adapter would be lost; the message has what to do."""
    model = outer()
    before = snapshot(model)
    with pytest.raises(UnsupportedModuleError, match="never calls it.*name `dt_proj.weight`"):
        get_peft_model(model, method.config(target_modules=["in_proj", "dt_proj"]))
    assert_unchanged(before, model)


def test_a_convolution_that_is_read_in_one_branch_is_refused():
    with pytest.raises(UnsupportedModuleError, match="as well as calling it"):
        get_peft_model(outer(), LoKrConfig(target_modules=["conv"]))


def test_a_convolution_that_is_read_outside_the_forward_is_adapted():
    get_peft_model(nn.Sequential(Regular()), LoKrConfig(target_modules=["conv"]))


def test_a_saved_adapter_of_such_a_layer_is_loaded_with_a_warning(tmp_path, monkeypatch):
    """Other programs write such adapters; they have no effect there either."""
    with monkeypatch.context() as patch:
        patch.setattr(plan, "lost_reason", lambda *_: None)
        model = get_peft_model(outer(), LoraConfig(target_modules=["in_proj", "dt_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="`mixer.dt_proj`: Mixer computes with this layer's"):
        loaded = PeftModel.from_pretrained(outer(), tmp_path)
    x = torch.randn(5, 8)
    torch.testing.assert_close(loaded(x), model(x))


def test_a_saved_adapter_of_the_last_layer_of_an_attention_acts_when_merged(tmp_path):
    """Hugging Face PEFT writes such adapters for "all-linear"."""
    config = LoKrConfig(r=2, target_modules=["out_proj"], init_weights=False)
    plain = nn.ModuleDict({"attention": nn.ModuleDict({"out_proj": nn.Linear(8, 8)})})
    adapted = get_peft_model(plain, config)
    adapted.save_pretrained(tmp_path)
    delta = adapted.base_model.model["attention"]["out_proj"].get_delta_weight("default")

    attention = nn.MultiheadAttention(8, 2).eval()
    expected = copy.deepcopy(attention)
    with pytest.warns(UserWarning, match="`attention.out_proj`: nn.MultiheadAttention reads"):
        loaded = PeftModel.from_pretrained(nn.ModuleDict({"attention": attention}), tmp_path)
    x = torch.randn(5, 8)
    unmerged = loaded.base_model.model["attention"](x, x, x)[0]
    torch.testing.assert_close(unmerged, expected(x, x, x)[0])
    merged = loaded.merge_and_unload()["attention"]
    expected.out_proj.weight.data += delta
    torch.testing.assert_close(merged(x, x, x)[0], expected(x, x, x)[0])


def test_a_layer_that_quantized_models_call_is_adapted_there(monkeypatch):
    model, config = nn.ModuleDict({"mixer": Falcon()}), LoraConfig(target_modules=["dt_proj"])
    with pytest.raises(UnsupportedModuleError, match="never calls it"):
        get_peft_model(model, config)
    monkeypatch.setattr(Falcon.config, "_is_quantized", True, raising=False)
    get_peft_model(model, config)


def test_the_parameter_of_such_a_layer_is_adapted(method):
    """What the error advises works: the output is that of the model with `W + ΔW`."""
    config = method.config(target_modules=["in_proj"], target_parameters=["dt_proj.weight"])
    model, plain = get_peft_model(outer(), config).eval(), outer().double()
    x = torch.randn(5, 8)
    with torch.no_grad():
        for name in ("in_proj", "dt_proj"):
            layer = getattr(model.base_model.model.mixer, name)
            delta = layer.get_delta_weight("default", **method.merge)
            getattr(plain.mixer, name).weight += delta.double()
    torch.testing.assert_close(model(x, **method.call), plain(x.double()).float())
    model.merge_adapter(**method.merge)
    torch.testing.assert_close(model(x), plain(x.double()).float())


def test_all_linear_leaves_such_a_layer_out():
    with pytest.warns(UserWarning, match=re.escape("leaves out `mixer.dt_proj`: Mixer computes")):
        model = get_peft_model(outer(), LoraConfig(target_modules="all-linear"))
    assert model.targeted_module_names == ["mixer.in_proj"]


def test_items_of_a_list_of_parameters_are_adapted(method):
    """The list is indexed, iterated and counted as before, with `W + ΔW` as items."""
    targets = {"target_modules": [], "target_parameters": ["tables.1", "tables.0"]}
    model, plain = get_peft_model(outer(), method.config(**targets)).eval(), outer().double()
    x, lists = torch.randn(5, 8), model.base_model.model.mixer.tables
    layers = [layer for layer in model.modules() if hasattr(layer, "parameter_name")]
    with torch.no_grad():
        for layer in layers:
            delta = layer.get_delta_weight("default", **method.merge)
            plain.mixer.tables[int(layer.parameter_name)] += delta.double()
    assert len(layers) == len(lists) == 2
    assert lists
    torch.testing.assert_close(model(x, **method.call), plain(x.double()).float())


def test_items_of_a_dictionary_of_parameters_are_adapted(method):
    """Its keys, values and items are those of the dictionary, with `W + ΔW` for the adapted."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ParameterDict({"a": torch.eye(8), "b": 2 * torch.eye(8)})

        def forward(self, x):
            assert "a" in self.tables
            for name in self.tables:
                x = x @ self.tables[name]
            return sum(x @ table for _, table in self.tables.items())

    torch.manual_seed(0)
    model = nn.Sequential(Named())
    config = method.config(target_modules=[], target_parameters=["tables.a"])
    model = get_peft_model(model, config).eval()
    layer = next(layer for layer in model.modules() if hasattr(layer, "parameter_name"))
    a, x = torch.eye(8) + layer.get_delta_weight("default", **method.merge), torch.randn(3, 8)
    expected = (x @ a @ (2 * torch.eye(8))) @ (a + 2 * torch.eye(8))
    torch.testing.assert_close(model(x, **method.call), expected)


def test_uses_of_children_are_seen_in_closures_wrappers_and_base_classes():
    uses = child_uses(Inherits)
    assert uses.read == {"a", "c"}
    assert uses.called == {"b", "c"}
    assert child_uses(Mixer).read == {"dt_proj", "conv"}
    assert not child_uses(nn.Sequential).read


class Padded(nn.Conv2d):
    """A convolution that pads its input by itself, as those of video autoencoders do in time."""

    def forward(self, x):
        k = self.kernel_size[0] - 1
        return super().forward(nn.functional.pad(x, (k, 0, k, 0)))


CONVOLUTIONS = {
    "LOKR": LoKrConfig(r=2, target_modules=["0"], init_weights=False),
    "LOHA": LoHaConfig(r=2, target_modules=["0"], init_weights=False),
    "LORA": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_that_pads_its_input_is_refused(name):
    """An adapter's output has the size that the settings of the convolution give."""
    model = nn.Sequential(Padded(4, 8, 3), nn.ReLU())
    before = snapshot(model)
    with pytest.raises(UnsupportedModuleError, match="`0`: Padded has a `forward` of its own"):
        get_peft_model(model, CONVOLUTIONS[name])
    assert_unchanged(before, model)
    get_peft_model(nn.Sequential(Padded(4, 8, 1)), CONVOLUTIONS[name])(torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_saved_adapter_of_a_convolution_that_pads_is_merged(name, tmp_path):
    """Its `forward` convolves with `W + ΔW`."""
    get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 3)), CONVOLUTIONS[name]).save_pretrained(tmp_path)
    base = nn.Sequential(Padded(4, 8, 3))
    plain, x = copy.deepcopy(base), torch.randn(2, 4, 5, 5)
    with pytest.warns(UserWarning, match="`0`: Padded has a `forward` of its own"):
        model = PeftModel.from_pretrained(base, tmp_path)
    plain[0].weight.data += model.base_model.model[0].get_delta_weight("default")
    torch.testing.assert_close(model.merge_and_unload()(x), plain(x))


class Routing(nn.Linear):
    """A layer that returns scores and logits, as Llama 4's router does."""

    def forward(self, x):
        logits = super().forward(x)
        return logits.sigmoid(), logits


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_layer_that_returns_a_tuple_is_refused(name):
    model = nn.ModuleDict({"router": Routing(4, 2), "up": nn.Linear(4, 4)})
    before = snapshot(model)
    config = dataclasses.replace(CONVOLUTIONS[name], target_modules=["router"])
    with pytest.raises(UnsupportedModuleError, match="`router`: Routing has .* returns a tuple"):
        get_peft_model(model, config)
    assert_unchanged(before, model)
    config = dataclasses.replace(config, target_modules="all-linear")
    with pytest.warns(UserWarning, match="'all-linear' leaves out `router`: Routing has"):
        assert get_peft_model(model, config).targeted_module_names == ["up"]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_layer_that_returns_a_tuple_is_named_in_its_first_call(name):
    """On the meta device its `forward` can't be tried."""
    with torch.device("meta"):
        model = nn.Sequential(Routing(4, 2))
    model = get_peft_model(model, CONVOLUTIONS[name])
    model.add_adapter("other", CONVOLUTIONS[name])
    x = torch.randn(2, 3, 4, device="meta")
    for names in (None, ["other"] * 2, ["default", "other"]):
        with pytest.raises(
            UnsupportedModuleError, match="Routing returned a tuple, not one tensor"
        ):
            model(x) if names is None else model(x, adapter_names=names)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_layer_that_returns_a_tuple_runs_where_no_adapter_acts(name, tmp_path):
    """Merged adapters act through the weight; another adapter may not have the layer."""
    linear = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    get_peft_model(linear, CONVOLUTIONS[name]).save_pretrained(tmp_path)
    base = nn.ModuleList([Routing(4, 2), nn.Linear(2, 2)])
    plain, x = copy.deepcopy(base[0]), torch.randn(3, 4)
    with pytest.warns(UserWarning, match="`0`: Routing has a `forward` of its own"):
        model = PeftModel.from_pretrained(base, tmp_path)
    layer = base[0]
    with pytest.raises(UnsupportedModuleError, match="Routing returned a tuple"):
        layer(x)
    model.add_adapter("other", dataclasses.replace(CONVOLUTIONS[name], target_modules=["1"]))
    model.set_adapter("other")
    torch.testing.assert_close(layer(x), plain(x))
    model.merge_adapter(["default"])
    plain.weight.data += layer.get_delta_weight("default")
    torch.testing.assert_close(layer(x), plain(x))
