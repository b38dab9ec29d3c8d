# SPDX-License-Identifier: Apache-2.0
"""What is done to one adapter leaves alone a thousand others, and costs what it costs beside one.

Cost is counted in calls of functions, Python's and C's, which does not depend on how busy a machine
is.
"""

import warnings

import pytest
import torch
from helpers.calls import calls_of
from helpers.methods import METHODS
from helpers.models import TARGETS, llama, mlp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode

import peft
from peft import (
    LoKrConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.base.containers import AdapterContainer, named_tensors, state_of, walk
from peft.tuners.tuners_utils import AdapterModuleDict, AdapterParameterDict, BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter

FEW, MANY = 3, 43


class Touched(TorchFunctionMode):
    """The tensors that torch's functions and attributes are asked about."""

    def __init__(self):
        super().__init__()
        self.ids = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        for value in (*args, *(kwargs or {}).values()):
            for one in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(one, torch.Tensor):
                    self.ids.add(id(one))
        return function(*args, **(kwargs or {}))


def with_adapters(method, number, **fields):
    """A model with the adapters "default", "a1", "a2", …"""
    torch.manual_seed(0)
    model = get_peft_model(mlp(), method.config(target_modules=TARGETS, **fields))
    for i in range(1, number):
        added(model, f"a{i}", method, **fields)
    return model


def added(model, name, method, **fields):
    """Add an adapter, always with the same values: how often a weight is rounded in merging depends
    on them.
    """
    torch.manual_seed(0)
    model.add_adapter(name, method.config(target_modules=TARGETS, **fields))


def work_on_one(model, method, folder, **fields):
    """What is done to single adapters, by name."""
    tuner = model.base_model
    return {
        "load": lambda: model.load_adapter(folder, "new"),
        "load again": lambda: model.load_adapter(folder, "new"),
        "hotswap": lambda: hotswap_adapter(model, folder, "new"),
        "state": lambda: get_peft_model_state_dict(model, adapter_name="new"),
        "save": lambda: model.save_pretrained(folder / "out", selected_adapters=["new"]),
        "add": lambda: added(model, "other", method, **fields),
        "train": lambda: tuner.set_requires_grad("other", True),
        "merge": lambda: tuner.merge_adapter(["other"], **method.merge),
        "unmerge": lambda: tuner.unmerge_adapter(),
        "convert": lambda: peft.convert_to_lora(
            model, 2, "other", **({"task_id": 1} if method.call else {})
        ),
        "delete": lambda: model.delete_adapter("other"),
        "delete loaded": lambda: model.delete_adapter("new"),
    }


KINDS = {name: {} for name in METHODS} | {
    "LORA trained whole": {"modules_to_save": ["4"]},
    "LORA dora": {"use_dora": True},
    "POLY task skills": {"task_rank": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_cost_does_not_grow_with_other_adapters(kind, tmp_path):
    method, fields = METHODS[kind.split()[0]], KINDS[kind]
    with_adapters(method, 1, **fields).save_pretrained(tmp_path)
    costs = []
    for number in (FEW, FEW, FEW, MANY):  # the first two times caches are filled
        model = with_adapters(method, number, **fields)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            costs.append(
                {
                    name: calls_of(work)
                    for name, work in work_on_one(model, method, tmp_path, **fields).items()
                }
            )
    # A call for each other adapter would be 40 calls more; names of temporary files, say, take now
    # one call and now another.
    grown = {
        name: (cost, costs[3][name])
        for name, cost in costs[2].items()
        if abs(costs[3][name] - cost) > 15
    }
    assert not grown


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_other_adapters_are_not_touched(kind, tmp_path):
    """No function of torch sees one, and no attribute of one is asked for: nothing is read,
    written, frozen or copied.
    """
    method, fields = METHODS[kind.split()[0]], KINDS[kind]
    with_adapters(method, 1, **fields).save_pretrained(tmp_path)
    model = with_adapters(method, FEW, **fields)
    others = {
        id(tensor): name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if ".a" in name
    }
    assert len(others) >= FEW - 1
    for name, work in work_on_one(model, method, tmp_path, **fields).items():
        with Touched() as touched, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
        seen = {others[one] for one in touched.ids & others.keys()}
        assert not seen, name


@pytest.mark.parametrize(
    "fields", [{}, {"modules_to_save": ["4"]}], ids=["layers", "trained whole"]
)
def test_switching_asks_others_for_flags_alone(method, fields):
    """Any adapter may have been unfrozen by hand; those that were not are seen to be frozen, and
    left so.
    """
    model = with_adapters(method, 4, **fields)
    others = {
        id(p)
        for name, p in model.named_parameters()
        if not {"a2", "a3"}.isdisjoint(name.split("."))
    }
    asked = []

    class Asked(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if any(id(value) in others for value in args):
                asked.append(function)
            return function(*args, **(kwargs or {}))

    with Asked():
        model.set_adapter("a1")
        with model.disable_adapter():
            pass
    assert others and set(asked) == {torch.Tensor.requires_grad.__get__}
    for name, parameter in model.named_parameters():
        if "a2" in name.split("."):
            parameter.requires_grad_(True)
    model.set_adapter("a3")
    trained = {
        part for name, p in model.named_parameters() if p.requires_grad for part in name.split(".")
    }
    assert trained & {"default", "a1", "a2", "a3"} == {"a3"}


@pytest.mark.parametrize("kind", KINDS)
def test_containers_by_adapter_name_are_known_by_their_type(kind):
    """What a walk leaves out is what containers have for adapters, and all of that."""
    method, fields = METHODS[kind.split()[0]], KINDS[kind]
    model = with_adapters(method, 3, **fields)
    everywhere = dict(model.named_modules())
    assert dict(walk(model, None)) == everywhere
    assert list(dict(walk(model, ["default", "a1", "a2"]))) == list(everywhere)
    for adapters in ((), ("a1",)):
        left_out = {"default", "a1", "a2"}.difference(adapters)
        assert list(dict(walk(model, adapters))) == [
            path for path in everywhere if left_out.isdisjoint(path.split("."))
        ]
        state = {
            k: v
            for k, v in model.state_dict(keep_vars=True).items()
            if left_out.isdisjoint(k.split("."))
        }
        found = state_of(model, adapters)
        assert list(found) == list(state) and all(
            found[key] is tensor for key, tensor in state.items()
        )
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            by_name = [
                value
                for name in (*layer.container_names, *layer.value_names)
                if isinstance(value := getattr(layer, name), nn.Module)
            ]
            assert by_name and all(isinstance(value, AdapterContainer) for value in by_name)


def test_a_walk_is_in_the_order_of_named_modules():
    """Also where modules sit in several places, or modules have a state dict of their own."""

    class Own(nn.Linear):
        def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
            destination[prefix + "own"] = self.weight
            return destination

    shared = nn.Linear(2, 2)
    inner = nn.Sequential(shared, nn.ReLU(), Own(2, 2))
    root = nn.ModuleDict(
        {
            "a": inner,
            "b": nn.ModuleList([inner, shared]),
            "c": AdapterModuleDict({"x": inner}),
            "d": nn.BatchNorm1d(2),
        }
    )
    root["d"].register_buffer("transient", torch.zeros(1), persistent=False)
    root["d"].register_state_dict_pre_hook(
        lambda module, prefix, keep_vars: module.running_mean.add_(1)
    )
    root["a"].register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.update({f"{prefix}more": torch.ones(1)})
    )
    root["e"] = AdapterParameterDict(
        {"x": nn.Parameter(torch.zeros(1)), "y": nn.Parameter(torch.zeros(1))}
    )
    assert list(walk(root, None)) == list(root.named_modules())
    assert list(walk(root, None, repeated=True)) == list(root.named_modules(remove_duplicate=False))
    closed = [path for path, _ in walk(root, None, repeated=True, closed=(nn.Sequential,))]
    assert closed == ["", "a", "b", "b.0", "b.1", "c", "c.x", "d", "e"]
    assert list(named_tensors(walk(root, None), None)) == list(root.named_parameters())
    tensors = dict([*root.named_parameters(), *root.named_buffers()])
    assert dict(named_tensors(walk(root, None), None, buffers=True)) == tensors
    assert "e.x" not in dict(named_tensors(walk(root)))
    before = root["d"].running_mean.clone()
    state, expected = state_of(root, None), root.state_dict(keep_vars=True)
    assert list(state) == list(expected) and all(
        torch.equal(state[key], tensor) for key, tensor in expected.items()
    )
    assert torch.equal(root["d"].running_mean, before + 2)  # by the hook, once each


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_in_layers_of_other_adapters_are_saved_too(bias, tmp_path):
    """`bias="lora_only"` trains those of all adapted layers; the file is one for any model, alone
    or beside adapters of other layers.
    """

    def fresh():
        torch.manual_seed(0)
        return mlp()

    other, trained = LoraConfig(r=2, target_modules=["0"]), ["0", "2", "4"][: 2 + (bias == "all")]
    model = get_peft_model(fresh(), other, "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["2"], bias=bias))
    model.set_adapter("b")
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn_like(p))
    x = torch.randn(3, 8)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "b" / "adapter_model.safetensors")
    root = "base_model.model"
    assert {key for key in state if key.endswith("bias")} == {
        f"{root}.{i}.base_layer.bias" if i == "2" else f"{root}.{i}.bias" for i in trained
    }

    def check():
        alone = PeftModel.from_pretrained(fresh(), tmp_path / "b")
        torch.testing.assert_close(alone(x), model(x))
        into = get_peft_model(fresh(), LoraConfig(r=2, target_modules=["2"], bias=bias))
        assert set_peft_model_state_dict(into, load_peft_weights(tmp_path / "b")) == ([], [])
        torch.testing.assert_close(into(x), model(x))
        beside = get_peft_model(fresh(), LoraConfig(r=2, target_modules=["4"]), "c").eval()
        assert beside.load_adapter(tmp_path / "b", "b") == ([], [])
        beside.set_adapter("b")
        torch.testing.assert_close(beside(x), model(x))

    check()
    # Other writers name them by the layers that were there.
    state[f"{root}.0.base_layer.bias"] = state.pop(f"{root}.0.bias")
    save_file(state, tmp_path / "b" / "adapter_model.safetensors")
    check()


def test_trained_biases_under_the_layers_of_several_methods(tmp_path):
    """Whichever of the layers is around the other."""
    config, x = LoraConfig(r=2, target_modules=["0"], bias="lora_only"), torch.randn(3, 8)
    for names in (("a", "b"), ("b", "a")):
        torch.manual_seed(0)
        model = get_peft_model(mlp(), LoKrConfig(r=2, target_modules=["4"]), "c", mixed=True)
        for name in names:
            model.add_adapter(name, config if name == "a" else LoKrConfig(target_modules=["0"]))
        model.set_adapter("a")
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p.add_(torch.randn_like(p))
        state = get_peft_model_state_dict(model, adapter_name="a")
        ends = ("lora_A.weight", "lora_B.weight", "base_layer.bias")
        assert set(state) == {f"base_model.model.0.{end}" for end in ends} | {
            "base_model.model.4.bias"
        }
        torch.manual_seed(0)
        alone = get_peft_model(mlp(), config)
        assert set_peft_model_state_dict(alone, state) == ([], [])
        torch.testing.assert_close(alone.eval()(x), model.eval()(x))


def test_tied_weights_count_once_beside_many_adapters(method):
    model = get_peft_model(llama(), method.config(target_modules=["q_proj"]), "a")
    model.base_model.model.lm_head.weight = model.base_model.model.model.embed_tokens.weight
    model.add_adapter("b", method.config(target_modules=["q_proj"]))
    state = get_peft_model_state_dict(model, adapter_name="b", save_embedding_layers=True)
    assert (
        "base_model.model.model.embed_tokens.weight" in state
        and "base_model.model.lm_head.weight" not in state
    )
    assert not set_peft_model_state_dict(model, state, "b").unexpected_keys


def test_a_copy_of_a_module_is_without_others_adapters(method, tmp_path):
    """What one adapter trains whole is the base model's module, whatever another has put into it."""

    def net():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(8, 16), nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        ).eval()

    x = torch.randn(3, 8)
    for whole in ("1", "1.2"):
        model = get_peft_model(net(), method.config(target_modules=["1.0", "1.2"]), "a")
        model.add_adapter("b", method.config(target_modules=["0"], modules_to_save=[whole]))
        model.set_adapter("b")
        copy = model.base_model.model.get_submodule(whole).modules_to_save["b"]
        assert repr(copy) == repr(net().get_submodule(whole)) and all(
            p.requires_grad for p in copy.parameters()
        )
        model.save_pretrained(tmp_path, selected_adapters=["b"])
        again = PeftModel.from_pretrained(net(), tmp_path / "b")
        torch.testing.assert_close(again(x, **method.call), model(x, **method.call))
    model = get_peft_model(net(), method.config(target_modules=["1.0"]), "a")
    model.merge_adapter(**method.merge)
    with pytest.raises(
        ValueError, match="`1`: adapters are merged into it; call `unmerge_adapter`"
    ):
        model.add_adapter("b", method.config(target_modules=["0"], modules_to_save=["1"]))
    assert list(model.peft_config) == ["a"]
