# SPDX-License-Identifier: Apache-2.0
"""LoRA on parameters: stacks of experts' matrices, and any matrix."""

import copy
import pickle
import re

import pytest
import torch
from helpers.experts import KINDS, TARGETS, Outer, mixture, tokens, with_deltas
from torch import nn

from peft import (
    LoraConfig,
    PeftModel,
    PeftWarning,
    get_peft_model,
    get_peft_model_state_dict,
    plan,
)
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter

EXACT = {"rtol": 1e-9, "atol": 1e-9}
ROUNDED = {"rtol": 1e-4, "atol": 1e-5}


def adapted(base, targets=TARGETS, **options):
    given = {"r": 3, "lora_alpha": 6, "target_modules": [], "init_lora_weights": False, **options}
    return get_peft_model(base, LoraConfig(target_parameters=targets, **given))


def wrappers(model):
    return [layer for layer in model.modules() if isinstance(layer, ParamWrapper)]


def textbook(layer, adapter="default"):
    """The delta of a parameter by a loop over experts, from the tensors as files have them."""
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    shape, r, scale = layer.get_param().shape, layer.r[adapter], layer.scaling[adapter]
    if len(shape) == 2:
        return scale * B @ A
    experts, turned = shape[0], getattr(layer.get_base_layer(), "is_transposed", False)
    deltas = []
    for e in range(experts):
        own = sum(torch.outer(B[:, k * experts + e], A[e * r + k]) for k in range(r))  # [out, in]
        deltas.append(scale * (own.T if turned else own))
    return torch.stack(deltas)


def textbook_deltas(model, adapter="default"):
    """The deltas of a whole model by the plain model's names of parameters."""
    found = {}
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, ParamWrapper) and adapter in layer.scaling:
            owner = ".".join(part for part in path.split(".") if part != "base_layer")
            found[f"{owner}.{layer.parameter_name}"] = textbook(layer, adapter)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_dense_sum(kind):
    base, ids = mixture(kind, dtype=torch.float64), tokens()
    model = adapted(copy.deepcopy(base))
    expected = with_deltas(base, textbook_deltas(model), input_ids=ids)
    found = model(input_ids=ids).logits
    assert (found - base(ids).logits).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, **EXACT)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(TARGETS) * 2
    weights = torch.randn(found.shape, dtype=found.dtype)
    wanted = torch.autograd.grad((expected * weights).sum(), trained)
    got = torch.autograd.grad((found * weights).sum(), trained)
    torch.testing.assert_close(got, wanted, **EXACT)
    assert all(gradient.abs().max() > 0 for gradient in got)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_implementation_of_experts_in_every_precision(implementation, dtype):
    base, ids = mixture("qwen3_moe", implementation, dtype), tokens()
    model = adapted(copy.deepcopy(base))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    deltas = {name: delta.to(dtype) for name, delta in textbook_deltas(model).items()}
    limits = ROUNDED if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    expected = with_deltas(base, deltas, input_ids=ids)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, **limits)


def test_experts_of_transformers_do_not_need_the_dense_sum(monkeypatch):
    monkeypatch.setattr(ParamWrapper, "delta_recipe", lambda *_: pytest.fail("a dense delta"))
    for kind in set(KINDS) - {"llama4"}:
        model = adapted(mixture(kind, "grouped_mm"))
        model(input_ids=tokens()).logits.sum().backward()


@pytest.mark.parametrize("targets", [["experts.up"], ["up", "mix"], ["first.weight", "up"]])
def test_any_module_reads_the_sum(targets):
    base = Outer(dtype=torch.float64)
    model, x = adapted(copy.deepcopy(base), targets), torch.randn(5, 6, dtype=torch.float64)
    parameters = dict(base.named_parameters())
    for name, delta in textbook_deltas(model).items():
        parameters[name] = parameters[name] + delta
    expected = torch.func.functional_call(base, parameters, (x,))
    torch.testing.assert_close(model(x), expected, **EXACT)
    # Also code around the module reads the sum.
    inner = model.base_model.model.experts.get_base_layer()
    torch.testing.assert_close(inner.up, parameters["experts.up"], **EXACT)


def test_a_sum_is_computed_once_in_a_call(monkeypatch):
    model, calls = adapted(Outer(experts=5), ["up"]), []
    recipe = ParamWrapper.delta_recipe
    counted = lambda self, *args: calls.append(self) or recipe(self, *args)  # noqa: E731
    monkeypatch.setattr(ParamWrapper, "delta_recipe", counted)
    model(torch.randn(2, 6))
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])
def test_merging_adds_the_deltas_and_unmerging_gives_the_weights_back(kind):
    base, ids = mixture(kind), tokens()
    model = adapted(copy.deepcopy(base))
    before = {name: p.clone() for name, p in base.named_parameters()}
    expected, deltas = model(ids).logits, textbook_deltas(model)
    model.merge_adapter()
    merged = model.base_model.model.state_dict()
    for name, delta in deltas.items():
        inside = [key for key in merged if key.replace("base_layer.", "") == name]
        torch.testing.assert_close(merged[inside[0]], before[name] + delta, **ROUNDED)
    torch.testing.assert_close(model(ids).logits, expected, **ROUNDED)
    model.unmerge_adapter()
    torch.testing.assert_close(model(ids).logits, expected, **ROUNDED)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base(ids).logits)
    torch.testing.assert_close(model(ids).logits, expected, **ROUNDED)
    plain = model.unload()
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
    assert all(torch.equal(p, before[name]) for name, p in plain.named_parameters())
    assert torch.equal(plain(ids).logits, base(ids).logits)
    merged = adapted(copy.deepcopy(base))
    expected = merged(ids).logits
    merged = merged.merge_and_unload()
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    torch.testing.assert_close(merged(ids).logits, expected, **ROUNDED)


def test_a_merge_that_fails_changes_nothing():
    model = adapted(Outer(), ["up", "mix"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    wrappers(model)[0].lora_B["default"].weight.data[0, 0] = float("nan")
    before |= {n: p.clone() for n, p in model.named_parameters() if "lora_B" in n}
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())


def test_several_adapters_on_different_parameters(tmp_path):
    base, ids = mixture("mixtral", dtype=torch.float64), tokens()
    model = adapted(copy.deepcopy(base), ["down_proj"])
    two = LoraConfig(
        r=2, target_parameters=TARGETS, target_modules=["q_proj"], init_lora_weights=False
    )
    model.add_adapter("two", two)
    assert len(wrappers(model)) == 4
    deltas = {name: textbook_deltas(model, name) for name in ("default", "two")}
    outputs = {}
    for name in ("two", "default"):
        model.set_adapter(name)
        outputs[name] = model(ids).logits
    expected = with_deltas(base, deltas["default"], input_ids=ids)
    torch.testing.assert_close(outputs["default"], expected, **EXACT)
    model.base_model.set_adapter(["default", "two"])
    both = model(ids).logits
    model.save_pretrained(tmp_path, selected_adapters=["default", "two"])
    # An adapter's file does not depend on the adapters beside it.
    for folder, name in ((tmp_path / "two", "two"), (tmp_path, "default")):
        alone = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        torch.testing.assert_close(alone(ids).logits, outputs[name], **EXACT)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "two", adapter_name="two")
    again.load_adapter(tmp_path, "default")
    again.base_model.set_adapter(["default", "two"])
    torch.testing.assert_close(again(ids).logits, both, **EXACT)
    again.delete_adapter("two")
    torch.testing.assert_close(again(ids).logits, outputs["default"], **EXACT)


def test_keys_and_shapes_of_a_file():
    model = adapted(mixture("mixtral"))
    state = get_peft_model_state_dict(model)
    start = "base_model.model.model.layers.1.mlp.experts"
    own = {key: tuple(t.shape) for key, t in state.items() if key.startswith(start)}
    assert own == {
        f"{start}.base_layer.lora_A.weight": (4 * 3, 16),
        f"{start}.base_layer.lora_B.weight": (48, 4 * 3),
        f"{start}.lora_A.weight": (4 * 3, 24),
        f"{start}.lora_B.weight": (16, 4 * 3),
    }


def test_an_adapter_is_swapped_for_another_in_place(tmp_path):
    base, ids = mixture("mixtral", dtype=torch.float64), tokens()
    other = adapted(copy.deepcopy(base), r=3, lora_alpha=1)
    other.save_pretrained(tmp_path)
    model = adapted(base)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(ids).logits, other(ids).logits, **EXACT)


def test_gradient_checkpointing_and_generation():
    base, ids = mixture("qwen3_moe"), tokens()
    model = adapted(base).train()
    plain = torch.autograd.grad(
        model(ids).logits.sum(), wrappers(model)[0].lora_A["default"].weight
    )
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.zero_grad()
        model(ids).logits.sum().backward()
        own = wrappers(model)[0].lora_A["default"].weight.grad
        torch.testing.assert_close(own, plain[0], **ROUNDED)
    model.gradient_checkpointing_disable()
    model.eval()
    found = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    expected = model.merge_and_unload().generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)


def test_copies_and_pickles():
    model, x = adapted(Outer(), ["up", "mix"]), torch.randn(2, 6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        with torch.no_grad():
            wrappers(other)[0].lora_A["default"].weight.zero_()
        assert not torch.equal(other(x), model(x))


def test_patterns_of_ranks_and_the_plan():
    base = mixture("mixtral")
    options = {
        "rank_pattern": {"experts.gate_up_proj": 2, r"^model.layers.1.mlp.experts.down_proj": 5},
        "alpha_pattern": {"down_proj": 1},
    }
    config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=TARGETS, **options)
    planned = plan(base, config)
    model = get_peft_model(base, config)
    ranks = {layer.parameter_name: layer.r["default"] for layer in wrappers(model)}
    assert ranks == {"gate_up_proj": 2, "down_proj": 5}
    assert planned.parameters == model.get_nb_trainable_parameters()[0]
    assert "model.layers.*.mlp.experts.gate_up_proj (2x)  MixtralExperts 4x 16->48" in str(planned)


def test_a_parameter_that_is_computed():
    class Plus(nn.Module):
        def forward(self, weight):
            return weight + 1

    base, x = Outer(), torch.randn(3, 6)
    nn.utils.parametrize.register_parametrization(base.experts, "up", Plus())
    plain = base(x)
    model = adapted(base, ["experts.up"])
    layer = wrappers(model)[0]
    assert torch.equal(layer.get_param(), layer.get_base_layer().parametrizations.up.original + 1)
    expected = layer.get_param() + textbook(layer)
    torch.testing.assert_close(layer.get_base_layer().up, expected, **ROUNDED)
    with pytest.raises(NotImplementedError, match="computes `up`"):
        model.merge_adapter()
    assert torch.equal(model.unload()(x), plain)


@pytest.mark.parametrize(
    ("targets", "options", "error", "message"),
    [
        (["experts.upp"], {}, ValueError, "did you mean 'experts.up'"),
        (["experts.bias"], {}, ValueError, r"`experts.bias`.*\[4\].*two or three dimensions"),
        (["up"], {"lora_dropout": 0.1}, ValueError, "does not work with `lora_dropout`=0.1"),
        (["up"], {"use_dora": True}, ValueError, "does not work with `use_dora`"),
        (["up"], {"init_lora_weights": "pissa"}, ValueError, "`init_lora_weights`='pissa'"),
        (["first.weight"], {"target_modules": ["first"]}, ValueError, "Trying to wrap an `nn.Par"),
        (["up"], {"modules_to_save": ["experts"]}, ValueError, "did not match|no such parameter"),
    ],
)
def test_refusals_leave_the_model_as_it_was(targets, options, error, message):
    base = Outer()
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(error, match=message):
        adapted(base, targets, **options)
    assert [type(module) for module in base.modules()] == kinds
    assert all(p.requires_grad for p in base.parameters())


def test_other_refusals():
    with pytest.raises(ValueError, match=re.escape("top-level module is not supported (parameter")):
        adapted(Outer().experts, ["up"])
    packed = Outer()
    packed.experts.up = nn.Parameter(torch.zeros(3, 4, 6, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="stored as torch.uint8"):
        adapted(packed, ["up"])
    with pytest.warns(PeftWarning, match="'mixx' \\(did you mean 'mix'\\?\\)"):
        model = adapted(Outer(), ["up", "mixx"])
    with pytest.raises(ValueError, match="its parameters up have adapters"):
        model.add_adapter("more", LoraConfig(target_modules=["experts"]))
    with pytest.raises(ValueError, match="add_weighted_adapter does not support targeting nn.Par"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
