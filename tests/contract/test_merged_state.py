# SPDX-License-Identifier: Apache-2.0
"""While an adapter is merged nothing may reach the base weights by a side door, and no argument of
a merge is ignored.
"""

import copy
import warnings

import pytest
import torch
from helpers.models import TARGETS, gpt2, llama, mlp
from torch import nn

from peft import (
    LoraConfig,
    PolyConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)


def _base_and_model(method, dtype=torch.float32):
    base = mlp(dtype)
    before = copy.deepcopy(base.state_dict())
    return before, get_peft_model(base, method.config(target_modules=TARGETS)).eval()


def _assert_base(before, model):
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_new_values_for_a_merged_adapter_do_not_spoil_the_base(method, tmp_path):
    """Loading either refuses while merged, or leaves base + new delta; taking it off gives back the
    base to the bit.
    """
    before, model = _base_and_model(method)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.prefix in name:
                parameter.add_(0.5)
    model.merge_adapter(**method.merge)
    try:
        model.load_adapter(tmp_path, "default")
    except (ValueError, RuntimeError) as error:
        assert "merged" in str(error)
    if any(layer.merged for layer in model.base_model.tuner_layers()):
        model.unmerge_adapter()
    _assert_base(before, model)


def test_a_state_dict_for_a_merged_adapter_does_not_spoil_the_base(method):
    before, model = _base_and_model(method)
    state = {key: tensor + 0.5 for key, tensor in get_peft_model_state_dict(model).items()}
    model.merge_adapter(**method.merge)
    try:
        set_peft_model_state_dict(model, state)
    except (ValueError, RuntimeError) as error:
        assert "merged" in str(error)
    if any(layer.merged for layer in model.base_model.tuner_layers()):
        model.unmerge_adapter()
    _assert_base(before, model)


@pytest.mark.parametrize("change", ["set_scale", "scale_layer", "unscale_layer"])
def test_scaling_a_merged_layer_does_not_spoil_the_base(method, change):
    before, model = _base_and_model(method)
    for layer in model.base_model.tuner_layers():
        layer.set_scale("default", 2)
    model.merge_adapter(**method.merge)
    for layer in model.base_model.tuner_layers():
        try:
            layer.set_scale("default", 3) if change == "set_scale" else getattr(layer, change)(
                *[3] * (change == "scale_layer")
            )
        except (ValueError, RuntimeError) as error:
            assert "merged" in str(error)
    if any(layer.merged for layer in model.base_model.tuner_layers()):
        model.unmerge_adapter()
    _assert_base(before, model)


def test_copies_of_a_merged_model_unmerge_to_the_base(method):
    before, model = _base_and_model(method)
    model.merge_adapter(**method.merge)
    _assert_base(before, copy.deepcopy(model))
    _assert_base(before, model)


def test_disabling_a_merged_model_gives_the_base(method):
    x = torch.randn(5, 8)
    base = mlp()
    expected = base(x)
    model = get_peft_model(base, method.config(target_modules=TARGETS)).eval()
    model.merge_adapter(**method.merge)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_adapters_come_off_to_the_bit(method, dtype):
    before, model = _base_and_model(method, dtype)
    model.add_adapter("b", method.config(target_modules=TARGETS))
    model.merge_adapter(["default"], **method.merge)
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["default", "b"], **method.merge)
    assert all(
        layer.merged_adapters == ["default", "b"] for layer in model.base_model.tuner_layers()
    )
    model.unmerge_adapter()
    _assert_base(before, model)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv1d_merges_to_what_it_computed_and_back(method, dtype):
    base = gpt2().to(dtype)
    before = copy.deepcopy(base.state_dict())
    ids = torch.randint(3, 48, (2, 5))
    model = get_peft_model(base, method.config(target_modules=["c_attn", "c_fc"])).eval()
    expected = model(input_ids=ids, **method.call).logits
    with model.disable_adapter():
        assert not torch.equal(model(input_ids=ids).logits, expected)
    model.merge_adapter(**method.merge)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(
        model(input_ids=ids).logits, expected, atol=tolerance, rtol=tolerance
    )
    model.unmerge_adapter()
    _assert_base(before, model)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_unknown_arguments_of_a_merge_are_refused(method, verb):
    before, model = _base_and_model(method)
    with pytest.raises((TypeError, ValueError), match="safe_mergee"):
        getattr(model, verb)(safe_mergee=True, **method.merge)
    assert not model.base_model.merged_adapters
    _assert_base(before, model)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_a_task_is_refused_where_there_are_none(method, verb):
    if method.merge:  # the method has tasks: a task out of range is the same mistake
        options, text = {"task_id": 99}, "99"
    else:
        options, text = {"task_id": 1}, "task_id"
    before, model = _base_and_model(method)
    with pytest.raises((TypeError, ValueError), match=text):
        getattr(model, verb)(**options)
    _assert_base(before, model)


def _poly(**fields):
    torch.manual_seed(1)
    return PolyConfig(
        **{
            "r": 2,
            "n_tasks": 3,
            "n_skills": 2,
            "init_weights": False,
            "target_modules": TARGETS,
            **fields,
        }
    )


def _spread(model):
    """Give tasks routes that differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "module_logits" in name:
                parameter.normal_()
    return model.eval()


def test_another_task_than_the_merged_one_is_not_passed_over():
    """The model holds task 1; asking it to unload with task 2 gives task 2 or an error, never task
    1.
    """
    x = torch.randn(5, 8)
    model = _spread(get_peft_model(mlp(), _poly()))
    wanted = model(x, task_ids=2).detach()
    model.merge_adapter(task_id=1)
    try:
        plain = model.merge_and_unload(task_id=2)
    except (ValueError, RuntimeError) as error:
        assert "merged" in str(error)
    else:
        torch.testing.assert_close(plain(x), wanted, atol=1e-5, rtol=1e-4)


def test_a_task_name_means_each_adapters_own_task():
    """Two adapters that have the same tasks in another order."""
    x = torch.randn(5, 8)
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), _poly(task_names=["a", "b", "c"], target_modules=["0"])
    )
    model.add_adapter("other", _poly(task_names=["c", "b", "a"], target_modules=["0"]))
    _spread(model)
    layer = model.base_model.model[0]
    wanted = layer.get_base_layer()(x)
    for name, task in (("default", 0), ("other", 2)):
        wanted = wanted + x @ layer.get_delta_weight(name, task_id=task).T
    try:
        model.merge_adapter(["default", "other"], task_id="a")
    except ValueError as error:
        assert "task" in str(error)
    else:
        torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("order", [["one", "three"], ["three", "one"]])
def test_a_merge_that_fails_for_one_adapter_merges_none(order):
    """One adapter has a single task and needs no `task_id`, the other has three and does."""
    base = mlp()
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, _poly(n_tasks=1), adapter_name="one")
    model.add_adapter("three", _poly(n_tasks=3))
    for verb, options in [
        ("merge_adapter", {}),
        ("merge_adapter", {"task_id": 2}),
        ("merge_and_unload", {}),
    ]:
        with pytest.raises(ValueError, match="task"):
            getattr(model, verb)(adapter_names=order, **options)
        assert not any(layer.merged for layer in model.base_model.tuner_layers())
    _assert_base(before, model)


def test_a_broken_adapter_among_several_merges_none():
    """Tasks by name, another number in each adapter; the last adapter's weights are not numbers."""
    base = mlp()
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, _poly(task_names=["a", "b", "c"]), adapter_name="good")
    model.add_adapter("bad", _poly(task_names=["c", "b", "a"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bad" in name.split("."):
                parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match="adapter bad seems to be broken"):
        model.merge_adapter(["good", "bad"], safe_merge=True, task_id="a")
    assert not any(layer.merged for layer in model.base_model.tuner_layers())
    _assert_base(before, model)


def test_a_broken_adapter_among_several_of_any_method_merges_none(method):
    before, model = _base_and_model(method)
    model.add_adapter("bad", method.config(target_modules=["2"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bad" in name.split("."):
                parameter.fill_(float("inf"))
    for verb in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(ValueError, match="adapter bad seems to be broken"):
            getattr(model, verb)(adapter_names=["default", "bad"], safe_merge=True, **method.merge)
        assert not any(layer.merged for layer in model.base_model.tuner_layers())
    _assert_base(before, model)


def test_training_what_is_merged_earns_a_word(method):
    """Once, naming the line, where a gradient is missing; nothing where nobody expects one."""
    config = method.config(target_modules=["0"], modules_to_save=["4"])
    model = get_peft_model(mlp(), config).eval()
    x = torch.randn(3, 8)

    def words():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(x, **method.call)
        assert all(one.filename == __file__ for one in caught)
        return [str(one.message) for one in caught]

    model.merge_adapter(**method.merge)
    assert not words()
    model.train()
    with torch.no_grad():
        assert not words()
    (word,) = words()
    assert (
        "adapters are merged: default" in word and "Call `unmerge_adapter` before training" in word
    )
    assert not words()
    model.unmerge_adapter()
    assert not words()
    model.set_requires_grad("default", False)
    model.merge_adapter(**method.merge)
    assert not words()


def _tied():
    base = llama()
    base.config.tie_word_embeddings, base.lm_head.weight = True, base.model.embed_tokens.weight
    return base


@pytest.mark.parametrize("merged_before", [False, True])
def test_merging_for_good_makes_two_of_a_tied_weight(method, merged_before, tmp_path):
    """The other use stays as it is, and a saved model is read as it was."""
    ids = torch.arange(1, 7).view(1, -1)
    with pytest.warns(UserWarning, match="`lm_head` shares a weight with `model.embed_tokens`"):
        model = get_peft_model(_tied(), method.config(target_modules=["lm_head", "q_proj"])).eval()
    with torch.no_grad():
        for parameter in (
            p
            for name, p in model.named_parameters()
            if model.prefix in name and p.is_floating_point()
        ):
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected, embeddings = (
        model(ids, **method.call).logits,
        model.get_input_embeddings().weight.clone(),
    )
    if merged_before:
        with pytest.warns(
            UserWarning,
            match="`lm_head` shares its weight with `model.embed_tokens`, and merging changes it in both",
        ):
            model.merge_adapter(**method.merge)
        assert not torch.equal(model.get_input_embeddings().weight, embeddings)
    with pytest.warns(UserWarning, match="Setting `tie_word_embeddings` to False"):
        merged = model.merge_and_unload(**method.merge)
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(merged.get_input_embeddings().weight, embeddings)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(
        type(merged).from_pretrained(tmp_path)(ids).logits, expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("merged_before", [False, True])
def test_a_merge_that_fails_leaves_weights_tied(merged_before):
    base = _tied()
    before = base.lm_head.weight.detach().clone()
    with pytest.warns(UserWarning, match="shares a weight"):
        model = get_peft_model(
            base, LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
        )
    model.add_adapter("b", LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    model.lm_head.lora_A["b"].weight.data[0] = torch.nan
    if merged_before:
        with pytest.warns(UserWarning, match="changes it in both"):
            model.merge_adapter()
    merged = model.lm_head.base_layer.weight.detach().clone()
    with (
        pytest.warns(UserWarning, match="Setting"),
        pytest.raises(ValueError, match="seems to be broken"),
    ):
        model.merge_and_unload(safe_merge=True, adapter_names=["default", "b"])
    assert model.lm_head.base_layer.weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings
    assert model.lm_head.merged_adapters == ["default"] * merged_before
    torch.testing.assert_close(model.lm_head.base_layer.weight, merged)
    if merged_before:
        model.unmerge_adapter()
    assert torch.equal(model.lm_head.base_layer.weight, before)


def test_only_merging_into_a_tied_weight_earns_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            _tied(), LoraConfig(target_modules=["lm_head", "q_proj"]), adapter_name="a"
        )
        model.add_adapter("b", LoraConfig(target_modules=["q_proj"]))
        model.merge_adapter(["a"])
        model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter(["b"])


def test_merges_into_a_tied_weight_come_off_to_the_bit():
    base = _tied()
    before = base.lm_head.weight.detach().clone()
    with pytest.warns(UserWarning, match="shares a weight"):
        model = get_peft_model(
            base, LoraConfig(target_modules=["lm_head", "embed_tokens"], init_lora_weights=False)
        )
    model.merge_adapter()
    assert not torch.equal(base.lm_head.base_layer.weight, before)
    model.unmerge_adapter()
    assert torch.equal(base.lm_head.base_layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged_again", [False, True])
def test_a_weight_changed_by_hand_keeps_the_change(dtype, merged_again):
    """The change stays in every entry, up to rounding. What nobody changed comes off to the bit,
    without a word, wherever it was moved.
    """
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)
    config = LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
    model = get_peft_model(base, config)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    weights = [layer.base_layer.weight for layer in base]
    before = [weight.detach().clone() for weight in weights]
    model.merge_adapter(["default"])
    change = torch.randn(64, 64).to(dtype)
    with torch.no_grad():
        weights[0].add_(change)
    message = "changed while adapters were merged into it: default"
    if merged_again:
        with pytest.warns(UserWarning, match=message):
            model.merge_adapter(["b"])
        model.unmerge_adapter()
    else:
        with pytest.warns(UserWarning, match=message):
            model.unmerge_adapter()
    # Each of the sums was rounded to an exponent of at most 2^4.
    step = 3 * torch.finfo(dtype).eps * 16
    expected = before[0].double() + change.double()
    assert (base[0].base_layer.weight.double() - expected).abs().max() <= step
    assert torch.equal(base[1].base_layer.weight, before[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter(["default"])
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        copy.deepcopy(model).unmerge_adapter()
        model.unmerge_adapter()


def test_a_merge_that_fails_leaves_suspended_merges_to_come_back():
    """One merged adapter waits while adapters are disabled; a merge that fails in the second layer
    forgets it in none.
    """
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    for name in ("waiting", "broken"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    x, layers = torch.randn(3, 8), [model.eval().base_model.model[int(i)] for i in TARGETS]
    model.merge_adapter(["waiting"])
    expected = model(x)
    model.base_model.disable_adapter_layers()
    for broken in layers:
        weight = broken.lora_B["broken"].weight
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaN"):
            model.merge_adapter(["broken"], safe_merge=True)
        with torch.no_grad():
            weight.zero_()
    model.base_model.enable_adapter_layers()
    torch.testing.assert_close(model(x), expected)


def test_unmerging_one_adapter_forgets_no_other():
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.eval().merge_adapter(["default", "other"])
    layer, weight = model.base_model.model[0], model.base_model.model[0].weight.clone()
    model.base_model.disable_adapter_layers()
    layer.unmerge(["other"])
    model.base_model.set_requires_grad(["default"], False)
    model.base_model.enable_adapter_layers()
    base = layer.unmerged_weight()
    assert "other" not in layer.merged_adapters
    x = torch.randn(3, 8)
    W = base + layer.get_delta_weight("default")
    torch.testing.assert_close(layer(x), x @ W.T + layer.bias)
    assert not torch.equal(weight, base)
