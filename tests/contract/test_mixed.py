# SPDX-License-Identifier: Apache-2.0
"""Adapters of several methods on one model: what they add, adds up; each can be saved, merged and
taken out by itself.
"""

import copy
import itertools
import warnings

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import llama, mlp
from torch import nn

import peft
from peft import (
    LoKrConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer

PAIRS = list(itertools.permutations(sorted(METHODS), 2))
TARGETS = {"a": ["0", "2"], "b": ["2", "4"], "c": ["0"]}


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request):
    return [METHODS[name] for name in request.param]


def call(*methods):
    return {name: value for method in methods for name, value in method.call.items()}


def merge(*methods):
    return {name: value for method in methods for name, value in method.merge.items()}


def mixed(first, second, base=None, **options):
    model = get_peft_model(
        base or mlp(**options), first.config(target_modules=TARGETS["a"]), "a", mixed=True
    )
    model.add_adapter("b", second.config(target_modules=TARGETS["b"]))
    model.add_adapter("c", first.config(target_modules=TARGETS["c"]))
    return model.eval()


def layer_deltas(model, names, x, **arguments):
    """The output where the named adapters are active, of a model that is otherwise plain: the sum,
    layer by layer, by hand.
    """
    tuner_layers = {}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            tuner_layers.setdefault(path.split(".")[0], []).append(module)
    for i, module in enumerate(model.base_model.model):
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        y = base(x)
        for layer in tuner_layers.get(str(i), []):
            for name in names:
                if name in layer.scaling:
                    y = y + layer.delta_activations(name, x)
        x = y
    return x


def test_what_methods_add_adds_up(pair):
    model = mixed(*pair, dtype=torch.float64)
    assert isinstance(model, PeftMixedModel)
    assert isinstance(model, PeftModel)
    x = torch.randn(5, 8, dtype=torch.float64)
    for names in (["a"], ["b"], ["a", "b"], ["c", "b", "a"]):
        model.set_adapter(names)
        assert model.active_adapters == names
        if not any(method.call for method in pair):
            torch.testing.assert_close(model(x), layer_deltas(model, names, x))
        # One after the other on models of their own, where no layers overlap for "a" and "b" alone.
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable == {
            n
            for n, p in model.named_parameters()
            if n.split(".")[-1] in names or any(f".{a}." in n for a in names)
        }
    with model.disable_adapter():
        torch.testing.assert_close(model(x), mlp_like(model)(x))


def mlp_like(model):
    """The base model, rebuilt from its own layers."""
    return torch.nn.Sequential(
        *(
            m.get_base_layer() if isinstance(m, BaseTunerLayer) else m
            for m in model.base_model.model
        )
    )


def test_it_equals_each_method_alone(pair):
    first, second = pair
    model = mixed(*pair)
    x = torch.randn(5, 8)
    for name, method in (("a", first), ("b", second), ("c", first)):
        model.set_adapter(name)
        state = peft.get_peft_model_state_dict(model, adapter_name=name)
        alone = get_peft_model(
            copy.deepcopy(mlp_like(model)), method.config(target_modules=TARGETS[name])
        ).eval()
        result = peft.set_peft_model_state_dict(alone, state)
        assert not result.missing_keys
        assert not result.unexpected_keys
        torch.testing.assert_close(model(x, **call(*pair)), alone(x, **method.call))


def test_an_adapter_for_each_sample(pair):
    model = mixed(*pair)
    x = torch.randn(6, 8)
    names = ["a", "b", "__base__", "c", "b", "a"]
    together = model(x, adapter_names=names, **call(*pair))
    for i, name in enumerate(names):
        if name == "__base__":
            expected = mlp_like(model)(x[i : i + 1])
        else:
            model.set_adapter(name)
            expected = model(x[i : i + 1], **call(*pair))
        torch.testing.assert_close(together[i : i + 1], expected)


def test_merging_all_and_taking_off(pair):
    model = mixed(*pair)
    before = {n: p.clone() for n, p in mlp_like(model).named_parameters()}
    x = torch.randn(5, 8)
    model.set_adapter(["a", "b", "c"])
    expected = model(x, **call(*pair))
    model.merge_adapter(["b"], **merge(*pair))
    with pytest.warns(UserWarning, match="Already following adapters were merged b"):
        model.merge_adapter(**merge(*pair))
    assert sorted(model.base_model.merged_adapters) == ["a", "b", "c"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    for name, parameter in mlp_like(model).named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
    torch.testing.assert_close(model(x, **call(*pair)), expected)
    plain = model.merge_and_unload(**merge(*pair))
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)


def test_a_merge_that_fails_for_one_method_leaves_nothing_merged(pair):
    model = mixed(*pair)
    before = {n: p.clone() for n, p in mlp_like(model).named_parameters()}
    with torch.no_grad():
        for layer in model.base_model.tuner_layers():
            if "b" in layer.scaling:
                next(layer.adapter_parameters("b")).fill_(float("nan"))
    if "vblora_vector_bank" in dict(model.base_model.named_children()):
        for name, bank in model.base_model.vblora_vector_bank.items():
            if name == "b":
                bank.data.fill_(float("nan"))
    model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True, **merge(*pair))
    assert not model.base_model.merged_adapters
    for name, parameter in mlp_like(model).named_parameters():
        assert torch.equal(parameter, before[name])


def test_saving_and_loading(pair, tmp_path):
    model = mixed(*pair)
    base = copy.deepcopy(mlp_like(model))
    x = torch.randn(5, 8)
    model.set_adapter(["a", "b"])
    expected = model(x, **call(*pair))
    model.save_pretrained(tmp_path)
    again = PeftMixedModel.from_pretrained(copy.deepcopy(base), tmp_path / "a", "a")
    again.load_adapter(tmp_path / "b", "b")
    again.set_adapter(["a", "b"])
    torch.testing.assert_close(again(x, **call(*pair)), expected, rtol=0, atol=0)
    # Each file is an ordinary adapter of its method.
    alone = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b").eval()
    model.set_adapter("b")
    torch.testing.assert_close(alone(x, **pair[1].call), model(x, **call(*pair)))


def test_deleting_and_adding_again(pair):
    model = mixed(*pair)
    x = torch.randn(5, 8)
    model.set_adapter("b")
    expected = model(x, **call(*pair))
    model.delete_adapter("a")
    torch.testing.assert_close(model(x, **call(*pair)), expected, rtol=0, atol=0)
    model.delete_adapter("c")
    model.add_adapter("a", pair[0].config(target_modules=TARGETS["a"]))
    torch.testing.assert_close(model(x, **call(*pair)), expected, rtol=0, atol=0)
    base = mlp_like(model)
    plain = model.unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    torch.testing.assert_close(plain(x), base(x))


def test_deleting_several_deletes_all_or_none(pair):
    model = mixed(*pair)
    x = torch.randn(5, 8)
    base, before = mlp_like(model), model(x, **call(*pair))
    model.merge_adapter(["b"], **{k: v for k, v in merge(*pair).items() if k in pair[1].merge})
    for names in (["a", "b"], ["a", "nobody"]):
        with pytest.raises(ValueError, match="nobody|while they are merged"):
            model.delete_adapter(names)
        assert set(model.peft_config) == set("abc")
    with pytest.raises(TypeError, match="must be one adapter's name"):
        model.delete_adapter(None)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x, **call(*pair)), before)
    model.delete_adapter(["a", "b", "c"])
    assert not model.peft_config
    torch.testing.assert_close(model.get_base_model()(x), base(x))


def test_a_copy_is_a_model_of_its_own(pair):
    model = mixed(*pair)
    x = torch.randn(5, 8)
    model.set_adapter(["a", "b"])
    expected = model(x, **call(*pair))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(other(x, **call(*pair)), expected)
    other.add_adapter("d", pair[1].config(target_modules=["0"]))
    assert "d" not in model.peft_config


def test_generation(pair):
    model = get_peft_model(llama(), pair[0].config(target_modules=["q_proj"]), "a", mixed=True)
    model.add_adapter("b", pair[1].config(target_modules=["q_proj", "v_proj"]))
    model.set_adapter(["a", "b"])
    model.eval()
    ids = torch.randint(3, 48, (2, 5))
    tokens = model.generate(input_ids=ids, max_new_tokens=4, num_beams=2, **call(*pair))
    assert tokens.shape == (2, 9)


def test_two_methods_injected_into_a_plain_model(pair):
    """Without a PeftModel around them, adapters of two methods find their own parts in a
    checkpoint.
    """
    base = mlp()
    inject_adapter_in_model(pair[0].config(target_modules=TARGETS["a"]), base, "a")
    inject_adapter_in_model(pair[1].config(target_modules=TARGETS["b"]), base, "b")
    for name in "ab":
        state = peft.get_peft_model_state_dict(base, adapter_name=name)
        assert state
        assert not any("base_layer" in key for key in state)
        doubled = {
            key: tensor * 2 if tensor.is_floating_point() else tensor
            for key, tensor in state.items()
        }
        result = peft.set_peft_model_state_dict(base, doubled, name)
        assert not result.missing_keys
        assert not result.unexpected_keys
        for key, tensor in peft.get_peft_model_state_dict(base, adapter_name=name).items():
            torch.testing.assert_close(tensor, doubled[key])


def test_an_unsuited_method_is_refused(method, monkeypatch):
    from peft.base import registry as peft_types

    monkeypatch.delitem(peft_types.PEFT_TYPE_TO_MIXED_MODEL_MAPPING, method.config().peft_type)
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(mlp(), method.config(target_modules=["0"]), mixed=True)


def test_a_second_model_around_layers_that_have_adapters(method):
    """A base that holds adapters already takes another under a new name, whatever wrapped it first."""
    base = mlp()
    x = torch.randn(5, 8)
    first = get_peft_model(base, method.config(target_modules=["0", "2"]), "first")
    expected = first.eval()(x, **method.call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = get_peft_model(base, method.config(target_modules=["2", "4"]), "second").eval()
    assert second(x, **method.call).isfinite().all()
    second.base_model.enable_adapter_layers()
    for layer in second.base_model.tuner_layers():
        layer.set_adapter("first")
    torch.testing.assert_close(first(x, **method.call), expected)


def decomposed_over_lora(by_rows, **lora):
    """A decomposed LoKr adapter "b" around LoRA's adapter "a", and the weight and bias that both make
    by the formula `m / ‖W + ΔB‖ ⊙ (W + ΔA + ΔB)`; norms of columns leave `ΔA` out of the product.
    """
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], **lora), "a", mixed=True)
    norms = {"weight_decompose": True, "wd_on_output": by_rows}
    model.add_adapter("b", LoKrConfig(r=2, target_modules=["0"], **norms))
    model.set_adapter(["a", "b"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    outer = base[0]
    weight, a, b = (
        tensor.double()
        for tensor in (
            outer.get_base_layer().weight,
            outer.base_layer.get_delta_weight("a"),
            outer.get_delta_weight("b"),
        )
    )
    norm = (weight + b).norm(dim=1 if by_rows else 0, keepdim=True)
    factor = outer.lokr_magnitude["b"].double().view(norm.shape) / norm
    total = factor * (weight + a + b) if by_rows else factor * (weight + b) + a
    return model.eval(), lambda x: (x.double() @ total.T + base[0].bias).float()


@pytest.mark.parametrize("by_rows", [True, False])
def test_a_decomposed_adapter_over_another_methods(by_rows):
    """The forward, and every merge that is not refused, compute the formula."""
    model, formula = decomposed_over_lora(by_rows)
    x = torch.randn(3, 8)
    weight = model.base_model.model[0].get_base_layer().weight.detach().clone()
    for names in ([], ["a"], ["a", "b"], ["b", "a"], None):
        if names != []:
            model.merge_adapter(names)
        torch.testing.assert_close(model(x), formula(x), rtol=1e-4, atol=1e-4)
        if names != []:
            model.unmerge_adapter()
        assert torch.equal(model.base_model.model[0].get_base_layer().weight, weight)
    if by_rows:
        with pytest.raises(NotImplementedError, match="b is decomposed and applies after a"):
            model.merge_adapter(["b"])
    else:
        model.merge_adapter(["b"])
    torch.testing.assert_close(model(x), formula(x), rtol=1e-4, atol=1e-4)
    if by_rows:
        for layer in model.base_model.tuner_layers():
            layer.merge(adapter_names=["a"])
        model.base_model.model[0].merge(adapter_names=["b"])
        torch.testing.assert_close(model(x), formula(x), rtol=1e-4, atol=1e-4)


def test_no_norms_apply_to_a_merged_bias():
    model, _ = decomposed_over_lora(True, lora_bias=True)
    x = torch.randn(3, 8)
    before = model(x)
    for names in (None, ["a"]):
        with pytest.raises(NotImplementedError, match="Adapter a adds to the bias.*adapter b"):
            model.merge_adapter(names)
        assert torch.equal(model(x), before)
