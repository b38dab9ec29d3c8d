# SPDX-License-Identifier: Apache-2.0
"""`add_weighted_adapter` for every method: what it sums exactly, what it approximates, what it
refuses, what it leaves alone.
"""

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import TARGETS, llama, mlp
from helpers.states import assert_unchanged, snapshot

import peft
from peft import PeftMixedModel, PeftModel, get_peft_model
from peft.base.registry import PEFT_TYPE_TO_TUNER_MAPPING
from peft.ops.task_vectors import (
    calculate_majority_sign_mask,
    disjoint_merge,
    prune,
    task_arithmetic,
)
from peft.tuners.tuners_utils import BaseTuner


@pytest.fixture(
    params=sorted(name for name in METHODS if PEFT_TYPE_TO_TUNER_MAPPING[name].combination_types)
)
def method(request):
    return METHODS[request.param]


def kinds(model):
    return model.base_model.combination_types


def some(model):
    """A combination that the method has; an exact one if there is any."""
    return "cat" if "cat" in kinds(model) else kinds(model)[0]


@pytest.fixture
def two(method):
    """Adapters of different rank on layers of which one is common."""
    model = get_peft_model(mlp(), method.config(target_modules=TARGETS), "a").eval()
    model.add_adapter("b", method.config(target_modules=["2", "4"], r=3))
    return model


def delta(model, method, path, name):
    layer = model.base_model.model.get_submodule(path)
    if name not in layer.scaling:
        return 0
    return layer.get_delta_weight(name, **method.merge).detach().double()


@pytest.mark.parametrize("weights", [[0.7, 0.4], [0.7, -1.3], [-1.0, -0.5], [1.0, 0.0]])
def test_a_sum_is_exact_or_tells_its_error(two, method, weights):
    exact = some(two) == "cat"
    errors = two.add_weighted_adapter(["a", "b"], weights, "new", some(two))
    assert sorted(errors) == ["0", "2", "4"]
    for path in errors:
        whole = weights[0] * delta(two, method, path, "a") + weights[1] * delta(
            two, method, path, "b"
        )
        lost = (delta(two, method, path, "new") - whole).norm()
        assert float(lost) == pytest.approx(errors[path] * float(whole.norm()), rel=1e-3, abs=1e-5)
        assert not exact or errors[path] == 0


def test_the_output_is_that_of_all_together(two, method):
    """For one layer in the model the sum of deltas is the sum of outputs."""
    names = ["a", "b"] if some(two) == "cat" else ["a"]  # a sum of one is no approximation either
    x = torch.randn(5, 16)
    layer = two.base_model.model[2]
    two.set_adapter(names)
    both = layer(x, **method.call)
    two.add_weighted_adapter(names, [1.0] * len(names), "new", some(two))
    two.set_adapter("new")
    assert layer.active_adapters == ["new"]
    torch.testing.assert_close(layer(x, **method.call), both, rtol=1e-4, atol=1e-5)


def test_it_is_saved_and_loaded_again(two, method, tmp_path):
    x = torch.randn(5, 8)
    for kind in kinds(two):
        of_any_rank = kind == "cat" or kind.endswith("svd")
        adapters, weights = (["a", "b"], [0.5, -0.5]) if of_any_rank else (["a", "a"], [0.7, 0.5])
        two.add_weighted_adapter(adapters, weights, kind, kind, density=0.5)
    expected = {}
    for kind in kinds(two):
        two.set_adapter(kind)
        expected[kind] = two(x, **method.call).detach()
    two.save_pretrained(tmp_path, selected_adapters=list(kinds(two)))
    for kind in kinds(two):
        loaded = PeftModel.from_pretrained(mlp_with(two), tmp_path / kind).eval()
        assert torch.equal(loaded(x, **method.call), expected[kind]), kind


def mlp_with(model):
    base = mlp()
    state = peft.get_base_model_state_dict(model)
    base.load_state_dict(state)
    return base


def test_the_others_are_left_alone_and_the_new_one_waits(two, method):
    before = snapshot(two)
    configs = {name: config.to_dict() for name, config in two.peft_config.items()}
    kind = some(two)
    two.add_weighted_adapter(["a", "b"], [0.5, -0.5], "new", kind)
    after = snapshot(two)
    for part in ("state", "requires_grad"):
        assert before[part].keys() < after[part].keys()
    assert all(
        torch.equal(after["state"][name], tensor) for name, tensor in before["state"].items()
    )
    assert all(
        after["requires_grad"][name] == flag for name, flag in before["requires_grad"].items()
    )
    assert torch.equal(after["rng"], before["rng"])
    assert {name: two.peft_config[name].to_dict() for name in configs} == configs
    new = {name for name in after["requires_grad"] if name not in before["requires_grad"]}
    assert new and all("new" in name.split(".") for name in new)
    assert not any(after["requires_grad"][name] for name in new)
    assert two.active_adapters == ["a"]
    two.set_adapter("new")
    two(torch.randn(3, 8), **method.call).sum().backward()
    assert all(p.grad is not None for name, p in two.named_parameters() if name in new)
    two.set_adapter("a")
    two.delete_adapter("new")
    assert sorted(two.peft_config) == ["a", "b"]


def test_one_adapter_may_come_twice_and_many_at_once(method):
    model = get_peft_model(mlp(), method.config(target_modules=TARGETS), "a").eval()
    model.add_adapter("b", method.config(target_modules=TARGETS))
    model.add_adapter("c", method.config(target_modules=TARGETS))
    names, weights = ["a", "b", "a", "c"], [0.5, 0.25, 0.5, -1.0]
    errors = model.add_weighted_adapter(names, weights, "new", some(model))
    for path in TARGETS:
        whole = sum(
            weight * delta(model, method, path, name)
            for name, weight in zip(names, weights, strict=True)
        )
        lost = (delta(model, method, path, "new") - whole).norm() / whole.norm()
        assert float(lost) == pytest.approx(errors[path], rel=1e-3, abs=1e-5)


def test_a_scaled_adapter_counts_as_it_is_and_a_merged_one_too(method):
    model = get_peft_model(mlp(), method.config(target_modules=TARGETS), "a").eval()
    for layer in model.base_model.tuner_layers():
        layer.set_scale("a", 0.25)
    model.merge_adapter(**method.merge)
    model.add_weighted_adapter(["a"], [2.0], "new", some(model))
    assert model.merged_adapters == ["a"]
    for path in TARGETS:
        found, own = delta(model, method, path, "new"), delta(model, method, path, "a")
        torch.testing.assert_close(found, 2 * own, rtol=1e-4, atol=1e-5)


def test_a_whole_module_of_one_adapter_goes_along(method):
    model = get_peft_model(mlp(), method.config(target_modules=TARGETS), "a").eval()
    model.add_adapter("b", method.config(target_modules=TARGETS, modules_to_save=["4"]))
    head = model.base_model.model[4]
    with torch.no_grad():
        head.modules_to_save["b"].weight.add_(1)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", some(model))
    assert model.peft_config["new"].modules_to_save == ["4"]
    copy = head.modules_to_save["new"]
    assert copy is not head.modules_to_save["b"] and torch.equal(
        copy.weight, head.modules_to_save["b"].weight
    )
    assert not copy.weight.requires_grad


def test_token_rows_of_one_adapter_go_along(method):
    model = get_peft_model(llama(), method.config(target_modules=["q_proj"]), "a").eval()
    model.add_adapter("b", method.config(target_modules=["q_proj"], trainable_token_indices=[3, 5]))
    rows = model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta
    with torch.no_grad():
        rows["b"].add_(1)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", some(model))
    assert model.peft_config["new"].trainable_token_indices == [3, 5]
    assert torch.equal(rows["new"], rows["b"])
    model.add_adapter("c", method.config(target_modules=["q_proj"], trainable_token_indices=[4]))
    with pytest.raises(ValueError, match="Adapters b, c train different rows of embeddings"):
        model.add_weighted_adapter(["b", "c"], [1, 1], "other", some(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combination_type": "foo"}, "Invalid combination_type: 'foo'; .*Model has '"),
        ({"adapters": ["a", "x"]}, "Adapter x does not exist; this model has a, b"),
        ({"weights": [1.0]}, "Pass one weight for each adapter; got 2 and 1"),
        ({"adapters": [], "weights": []}, "Pass one weight for each adapter; got 0 and 0"),
        ({"weights": [1.0, float("nan")]}, "must be finite numbers"),
        ({"adapter_name": "a"}, "Adapter with name 'a' already exists"),
        ({"adapter_name": "a.b"}, "must be a non-empty string without dots"),
        ({"svd_rank": 0}, "`svd_rank`=0 is not allowed"),
        ({"svd_clamp": 2.0}, "`svd_clamp`=2.0 is not allowed"),
        ({"majority_sign_method": "most"}, "`majority_sign_method`='most' is not allowed"),
    ],
)
def test_refusals_change_nothing(two, arguments, message):
    before = snapshot(two)
    request = {
        "adapters": ["a", "b"],
        "weights": [1.0, 1.0],
        "adapter_name": "new",
        "combination_type": some(two),
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        two.add_weighted_adapter(**request)
    assert_unchanged(before, two)
    assert sorted(two.peft_config) == ["a", "b"]


def test_names_are_a_list(two):
    with pytest.raises(TypeError, match="`adapters`='ab' must be a list of names"):
        two.add_weighted_adapter("ab", [1.0, 1.0], "new", some(two))


def test_every_method_says_what_it_has(two, method):
    lacking = [kind for kind in ("cat", "svd", "linear", "ties") if kind not in kinds(two)]
    for kind in lacking:
        with pytest.raises(
            ValueError, match=rf"Invalid combination_type: '{kind}'; .* has '{kinds(two)[0]}'"
        ):
            two.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", kind, density=0.5)
    assert bool(lacking) == (method.config_cls is not peft.LoraConfig)


def test_a_method_without_any(two, monkeypatch):
    monkeypatch.setattr(type(two.base_model), "combination_types", BaseTuner.combination_types)
    with pytest.raises(
        ValueError, match="Invalid combination_type: 'cat'; .*Model has no combinations"
    ):
        two.add_weighted_adapter(["a"], [1.0], "new", "cat")


def with_heads(method, base=mlp, **fields):
    """A model with two adapters that each train a copy of its last layer."""
    configs = [
        method.config(target_modules=TARGETS, modules_to_save=["4"], **fields) for _ in range(2)
    ]
    model = get_peft_model(base(), configs[0], "a").eval()
    model.add_adapter("b", configs[1])
    with torch.no_grad():
        for name in "ab":
            for parameter in model.base_model.model[4].modules_to_save[name].parameters():
                parameter.normal_()
    return model


def test_two_copies_of_a_module_need_a_word(method):
    model = with_heads(method)
    before = snapshot(model)
    for heads, error, message in (
        (
            None,
            ValueError,
            r"Adapters a, b each train a copy of `4\.weight`. Choose .* `heads`: 'mean' or the "
            r"name of .* \('a', 'b'\)",
        ),
        ("c", ValueError, r"`heads`='c' must be 'mean' or the name of .* \('a', 'b'\)"),
        (
            "stack",
            ValueError,
            "`heads`='stack' is offered by `save_as_poly` .* must be 'mean' or the name",
        ),
        ("maen", ValueError, "Did you mean 'mean'"),
        (1, TypeError, "`heads`=1 must be"),
    ):
        with pytest.raises(error, match=message):
            model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", some(model), heads=heads)
    with pytest.raises(ValueError, match="weights .* sum to zero"):
        model.add_weighted_adapter(["a", "b"], [1.0, -1.0], "new", some(model), heads="mean")
    with pytest.raises(
        ValueError,
        match=r"Only one adapter .* a, b each train .*add_weighted_adapter\(…, heads=…\)",
    ):
        model.set_adapter(["a", "b"])
    assert_unchanged(before, model)


def test_equal_copies_of_a_module_need_no_word(method):
    model = with_heads(method)
    copies = model.base_model.model[4].modules_to_save
    copies["b"].load_state_dict(copies["a"].state_dict())
    model.add_weighted_adapter(["a", "b"], [3.0, -1.0], "new", some(model))
    for name in ("weight", "bias"):
        assert torch.equal(getattr(copies["new"], name), getattr(copies["a"], name))


def test_copies_of_a_module_become_their_mean_or_that_of_one(method):
    model = with_heads(method)
    copies = model.base_model.model[4].modules_to_save
    model.add_weighted_adapter(["a", "b"], [3.0, -1.0], "mean", some(model), heads="mean")
    model.add_weighted_adapter(["a", "b"], [3.0, -1.0], "of b", some(model), heads="b")
    for name in ("weight", "bias"):
        a, b, mean, of_b = (
            getattr(copies[adapter], name).double() for adapter in ("a", "b", "mean", "of b")
        )
        torch.testing.assert_close(mean, (3 * a - b) / 2, atol=1e-6, rtol=1e-6)
        assert torch.equal(of_b, b)
    assert model.peft_config["mean"].modules_to_save == ["4"]


def test_trained_biases_can_not_be_summed():
    model = get_peft_model(mlp(), peft.LoraConfig(target_modules=TARGETS, bias="all"), "a")
    with pytest.raises(ValueError, match="Adapter a trains biases of the base model"):
        model.add_weighted_adapter(["a"], [1.0], "new", "cat")


def test_adapters_of_several_methods(method):
    model = PeftMixedModel(mlp(), method.config(target_modules=TARGETS), "a").eval()
    other = peft.LoKrConfig if method.config_cls is not peft.LoKrConfig else peft.LoraConfig
    model.add_adapter("other", other(r=2, target_modules=TARGETS))
    model.add_adapter("b", method.config(target_modules=["2"]))
    with pytest.raises(ValueError, match="Adapters of different methods can't be combined: "):
        model.add_weighted_adapter(["a", "other"], [1.0, 1.0], "new", "cat")
    kind = some(get_peft_model(mlp(), method.config(target_modules=TARGETS)))
    errors = model.add_weighted_adapter(["a", "b"], [1.0, -0.5], "new", kind)
    assert sorted(errors) == TARGETS
    assert type(model.peft_config["new"]) is method.config_cls


# --- utils.merge_utils
# ------------------------------------------------------------------------------------------------


def test_pruning_keeps_the_largest_or_draws():
    x = torch.tensor([[1.0, -4.0, 2.0], [0.5, 3.0, -0.1]])
    assert torch.equal(
        prune(x, 0.5, "magnitude"), torch.tensor([[0.0, -4.0, 2.0], [0.0, 3.0, 0.0]])
    )
    assert not prune(x, 0.1, "magnitude").any()
    many = torch.ones(10000)
    drawn = prune(many, 0.3, "random", rescale=True)
    assert set(drawn.tolist()) == {0.0, float(torch.tensor(1.0) / 0.3)}
    assert float(drawn.mean()) == pytest.approx(1, abs=0.06)
    assert not prune(many, 0.0, "random", rescale=True).any()
    with pytest.warns(UserWarning, match=r"density 1\.5 is greater than or equal to 1"):
        assert prune(x, 1.5, "magnitude") is x
    with pytest.raises(ValueError, match="Density should be >= 0, got -0.1"):
        prune(x, -0.1, "magnitude")
    with pytest.raises(ValueError, match="Unknown method best"):
        prune(x, 0.5, "best")


def test_signs_are_elected_by_weight_or_by_count():
    x = torch.tensor([[5.0, 1.0, 0.0], [-1.0, -1.0, 2.0], [-1.0, 0.0, 3.0]])
    assert calculate_majority_sign_mask(x, "total").tolist() == [
        [True, True, False],
        [False, False, True],
        [False, False, True],
    ]
    assert calculate_majority_sign_mask(x, "frequency").tolist() == [
        [False, True, False],
        [True, False, True],
        [True, False, True],
    ]
    assert disjoint_merge(x, calculate_majority_sign_mask(x, "total")).tolist() == [5.0, 1.0, 2.5]
    with pytest.raises(ValueError, match='Unimplemented mask method "loudest"'):
        calculate_majority_sign_mask(x, "loudest")
    assert task_arithmetic(list(x), torch.tensor([1.0, 2.0, -1.0])).tolist() == [4.0, -1.0, 1.0]
