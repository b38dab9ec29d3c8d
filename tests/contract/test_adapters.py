# SPDX-License-Identifier: Apache-2.0
"""What holds for an adapter of any registered method on any model."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers.models import TARGETS, gpt2, llama, mlp, t5
from helpers.textbook import adapted_weight
from torch import nn

import peft
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_target_module_exists,
    inspect_matched_modules,
)

pytestmark = pytest.mark.quick


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def randomised(model, method, name):
    """Add an adapter with values of its own."""
    torch.manual_seed(ord(name[0]))
    model.add_adapter(name, method.config(target_modules=TARGETS))
    return model


def test_a_fresh_adapter_changes_nothing(method):
    x = torch.randn(5, 8)
    base = mlp()
    expected = base(x)
    if method.no_op is None:
        # Such a method is random by design; then it must change something.
        model = get_peft_model(base, method.config(target_modules=TARGETS))
        assert not torch.allclose(model(x, **method.call), expected)
    else:
        model = get_peft_model(base, method.config(target_modules=TARGETS, **method.no_op))
        torch.testing.assert_close(model.eval()(x, **method.call), expected)


def test_only_the_adapter_is_trained(model, method):
    model.train()
    names = trainable(model)
    assert names
    assert all(model.prefix in name for name in names)
    model(torch.randn(5, 8), **method.call).square().sum().backward()
    assert {
        name
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    } == names


WAYS = {
    "copy": lambda model, method, folder: model.copy_adapter("default", "b"),
    "load": lambda model, method, folder: model.load_adapter(folder, "b", is_trainable=True),
    "add": lambda model, method, folder: (
        model.add_adapter("b", method.config(target_modules=TARGETS, modules_to_save=["4"])),
        model.load_adapter(folder, "b"),
    ),
}


@pytest.mark.parametrize("way", ["from_pretrained", *WAYS])
def test_what_inference_mode_made_can_be_trained(method, way, tmp_path):
    """Gradients are those of the same adapter loaded outside of it."""
    bases = [mlp() for _ in range(3)]
    for base in bases:
        base.load_state_dict(bases[0].state_dict())
    with torch.inference_mode():
        model = get_peft_model(
            bases[0], method.config(target_modules=TARGETS, modules_to_save=["4"])
        )
        model.save_pretrained(tmp_path)
        if way == "from_pretrained":
            model = PeftModel.from_pretrained(bases[1], tmp_path, is_trainable=True)
        else:
            WAYS[way](model, method, tmp_path)
            model.set_adapter("b")
    other = PeftModel.from_pretrained(bases[2], tmp_path, is_trainable=True)
    x = torch.randn(5, 8)
    for each in (model, other):
        each.eval()(x, **method.call).square().sum().backward()
    found, wanted = ([p for p in each.parameters() if p.requires_grad] for each in (model, other))
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_the_delta_weight_is_the_formulas(method):
    """In float64, for the task that merging is asked for; forward is compared in test_inputs."""
    base = nn.Sequential(nn.Linear(8, 16)).double()
    model = get_peft_model(base, method.config(target_modules=["0"])).double().eval()
    layer = model.base_model.model[0]
    delta = layer.get_delta_weight("default", **method.merge)
    x = torch.randn(5, 8, dtype=torch.float64)
    expected, _ = adapted_weight(layer, x, method.merge.get("task_id"))
    assert delta.abs().max() > 1e-3
    torch.testing.assert_close(layer.base_layer.weight + delta, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_and_unmerging(method, dtype):
    x = torch.randn(5, 8, dtype=dtype)
    base = mlp(dtype)
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, method.config(target_modules=TARGETS)).eval()
    expected = model(x, **method.call)
    model.merge_adapter(safe_merge=True, **method.merge)
    assert all(layer.merged for layer in model.base_model.tuner_layers())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(model(x), expected, atol=tolerance, rtol=tolerance)
    model.unmerge_adapter()
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_merge_and_unload_leaves_a_plain_model(model, method):
    x = torch.randn(5, 8)
    expected = model(x, **method.call)
    plain = model.merge_and_unload(safe_merge=True, **method.merge)
    assert [type(module) for module in plain] == [type(module) for module in mlp()]
    assert not plain._forward_pre_hooks
    torch.testing.assert_close(plain(x), expected, atol=1e-5, rtol=1e-4)


def test_unload_gives_back_the_modules_themselves(method):
    base = mlp()
    modules = list(base)
    model = get_peft_model(base, method.config(target_modules=TARGETS))
    assert list(model.unload()) == modules


def test_several_adapters_add_up(model, method):
    x = torch.randn(5, 8)
    layer = model.base_model.model[0]
    plain = layer.get_base_layer()(x)
    randomised(model, method, "b")
    options = {key: value for key, value in method.call.items() if key == "task_ids"}
    deltas = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        deltas[name] = layer(x, **options) - plain
    model.set_adapter(["default", "b"])
    assert model.active_adapters == ["default", "b"]
    torch.testing.assert_close(
        layer(x, **options) - plain, deltas["default"] + deltas["b"], atol=1e-5, rtol=1e-4
    )
    assert not torch.allclose(deltas["default"], deltas["b"])


def test_switching_moves_what_is_trainable(model, method):
    first = trainable(model)
    randomised(model, method, "b")
    assert trainable(model) == first
    model.set_adapter("b")
    assert trainable(model) == {name.replace("default", "b") for name in first}
    model.set_adapter("default", inference_mode=True)
    assert trainable(model) == set()


def test_disabling_restores_base_and_flags(model, method):
    x = torch.randn(5, 8)
    with torch.no_grad():
        outside = model(x, **method.call)
        flags = trainable(model)
        with model.disable_adapter():
            assert trainable(model) == set()
            with model.disable_adapter():
                inside = model(x)
            assert torch.equal(model(x), inside)
        assert trainable(model) == flags
        assert torch.equal(model(x, **method.call), outside)
        assert not torch.allclose(inside, outside)
        assert torch.equal(model.unload()(x), inside)


def test_deleting(model, method):
    randomised(model, method, "b")
    randomised(model, method, "c")
    model.delete_adapter("c")
    assert model.active_adapters == ["default"]
    with pytest.warns(
        UserWarning,
        match="Adapter default was active which is now deleted. Setting active adapter to b",
    ):
        model.delete_adapter("default")
    assert model.active_adapters == ["b"]
    assert all("b" in name for name in trainable(model))
    model.delete_adapter("b")
    assert not any(model.prefix in name for name in model.state_dict())
    model.add_adapter("again", method.config(target_modules=TARGETS))
    assert model.active_adapters == ["again"]
    assert trainable(model)


def test_saving_and_loading(model, method, tmp_path):
    x = torch.randn(5, 8)
    randomised(model, method, "b")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path)
    assert trainable(loaded) == set()
    result = loaded.load_adapter(tmp_path / "b", "b")
    assert result == ([], [])
    for name in ("default", "b"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        torch.testing.assert_close(model(x, **method.call), loaded(x, **method.call))
    again = PeftModel.from_pretrained(loaded.unload(), tmp_path, subfolder="b", is_trainable=True)
    assert trainable(again)


def test_loading_into_an_existing_adapter(model, method, tmp_path):
    model.save_pretrained(tmp_path)
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.prefix in name:
                parameter.add_(1)
    model.load_adapter(tmp_path, "default")
    restored = get_peft_model_state_dict(model)
    assert all(torch.equal(restored[key], tensor) for key, tensor in state.items())


def test_modules_to_save(method, tmp_path):
    base = mlp()
    model = get_peft_model(base, method.config(target_modules=TARGETS, modules_to_save=["4"]))
    assert "base_model.model.4.modules_to_save.default.weight" in trainable(model)
    with torch.no_grad():
        model.base_model.model[4].modules_to_save["default"].weight.zero_()
    x = torch.randn(3, 8)
    expected = model(x, **method.call)
    torch.testing.assert_close(expected, base[4].original_module.bias.expand(3, -1))
    model.save_pretrained(tmp_path)
    assert "base_model.model.4.weight" in get_peft_model_state_dict(model)
    with model.disable_adapter():
        assert not torch.allclose(model(x), expected)
    original = model.base_model.model[4].original_module
    assert model.unload()[4] is original
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(x, **method.call), expected)
    assert torch.equal(loaded.merge_and_unload(**method.merge)[4].weight, torch.zeros(8, 16))


@pytest.mark.parametrize(("autocast", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_precision_of_the_adapter(method, autocast, expected):
    model = get_peft_model(
        mlp(torch.bfloat16), method.config(target_modules=TARGETS), autocast_adapter_dtype=autocast
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    output = model(torch.randn(5, 8, dtype=torch.bfloat16), **method.call)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()


def test_low_cpu_mem_usage_is_filled_from_a_checkpoint(model, method):
    state = get_peft_model_state_dict(model)
    base = copy.deepcopy(model).unload()
    empty = get_peft_model(base, method.config(target_modules=TARGETS), low_cpu_mem_usage=True)
    assert {p.device.type for p in empty.parameters() if p.requires_grad} == {"meta"}
    result = set_peft_model_state_dict(empty, state, low_cpu_mem_usage=True)
    assert result == ([], [])
    x = torch.randn(5, 8)
    assert torch.equal(empty.eval()(x, **method.call), model(x, **method.call))


def test_copies_are_whole_and_apart(model, method):
    x = torch.randn(5, 8)
    expected = model(x, **method.call)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, **method.call), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
    assert torch.equal(model(x, **method.call), expected)


def test_new_modules_take_the_layers_mode(method):
    model = get_peft_model(mlp().eval(), method.config(target_modules=TARGETS))
    assert not any(
        module.training for module in model.modules() if isinstance(module, BaseTunerLayer)
    )
    x = torch.randn(5, 8)
    assert torch.equal(model(x, **method.call), model(x, **method.call))


def test_scale(model):
    layer = model.base_model.model[0]
    start = layer.scaling["default"]
    layer.set_scale("default", 3)
    assert layer.scaling["default"] == pytest.approx(3 * start)
    layer.scale_layer(2)
    layer.unscale_layer(2)
    assert layer.scaling["default"] == pytest.approx(3 * start)
    layer.unscale_layer()
    assert layer.scaling["default"] == start
    layer.set_scale("unknown", 2)
    for wrong in (lambda: layer.scale_layer(float("nan")), lambda: layer.unscale_layer(0)):
        with pytest.raises(ValueError, match="`scale`=(nan must be finite|0 is not a divisor)"):
            wrong()
    assert layer.scaling == {"default": start}


def test_attributes_fall_through(model):
    assert model.base_model.model[0].weight is model.base_model.model[0].base_layer.weight
    with pytest.raises(AttributeError):
        _ = model.no_such_thing
    model.get_base_model().answer = 42
    assert model.answer == 42


def test_injection_into_a_plain_model(method):
    base = mlp()
    assert inject_adapter_in_model(method.config(target_modules=TARGETS), base) is base
    state = get_peft_model_state_dict(base)
    assert state
    assert not any(key.startswith("base_model") for key in state)
    x = torch.randn(5, 8)
    expected = base(x, **method.call)
    other, kind = mlp(), method.config().peft_type
    other.load_state_dict(
        {
            k.replace(".base_layer", ""): v
            for k, v in base.state_dict().items()
            if PEFT_TYPE_TO_PREFIX_MAPPING[kind] not in k
        }
    )
    inject_adapter_in_model(method.config(target_modules=["none"]), other, state_dict=state)
    set_peft_model_state_dict(
        other, {f"base_model.model.{key}": tensor for key, tensor in state.items()}
    )
    assert torch.equal(other.eval()(x, **method.call), expected)
    inject_adapter_in_model(method.config(target_modules=TARGETS), base, adapter_name="b")
    assert set(base.peft_config) == {"default", "b"}


@pytest.mark.parametrize("build", [llama, gpt2, t5])
def test_generation_is_the_same_alone_and_in_a_batch(method, build):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D's orientation
        model = get_peft_model(build(), method.config(target_modules="all-linear")).eval()
    ids = torch.randint(3, 48, (3, 5))
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
    tasks = [torch.tensor([0, 2, 1])] if method.call else [None]
    for task_ids in tasks:
        call = {} if task_ids is None else {"task_ids": task_ids}
        together = model.generate(input_ids=ids, **call, **options)
        for i in range(3):
            alone = {} if task_ids is None else {"task_ids": task_ids[i : i + 1]}
            assert torch.equal(
                model.generate(input_ids=ids[i : i + 1], **alone, **options),
                together[2 * i : 2 * i + 2],
            )


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(method, reentrant):
    model = get_peft_model(llama(), method.config(target_modules="all-linear")).train()
    ids = torch.randint(3, 48, (3, 5))
    calls = [
        {"task_ids": torch.tensor(tasks)} if method.call else {} for tasks in ([0, 2, 1], [1, 1, 0])
    ]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        losses = [model(input_ids=ids, labels=ids, use_cache=False, **call).loss for call in calls]
        (losses[0] + 2 * losses[1]).backward()
        gradients.append(
            {
                n: p.grad.clone()
                for n, p in model.named_parameters()
                if p.grad is not None and p.requires_grad
            }
        )
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() == trainable(model)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.compile
def test_a_language_model_compiles_whole_and_once(method):
    """With a loss, tasks that change, and rows of the embedding that are trained."""
    base = llama()
    base.model.layers = base.model.layers[:1]
    config = method.config(target_modules=["q_proj", "down_proj"], trainable_token_indices=[3, 7])
    eager = get_peft_model(base, config).eval()
    model = copy.deepcopy(eager)
    ids = torch.randint(3, 9, (3, 5))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tasks in ([0, 2, 1], [1, 1, 2]):
        call = {"task_ids": torch.tensor(tasks)} if method.call else {}
        with torch._dynamo.config.patch(error_on_recompile=True):
            losses = [
                run(input_ids=ids, labels=ids, use_cache=False, **call).loss
                for run in (eager, compiled)
            ]
        torch.testing.assert_close(losses[1], losses[0])
        [loss.backward() for loss in losses]
    assert trainable(eager)
    for name in trainable(eager):
        torch.testing.assert_close(
            model.get_parameter(name).grad, eager.get_parameter(name).grad, atol=1e-4, rtol=1e-4
        )


def test_the_fused_encoder_path_does_not_bypass_adapters(method):
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2
    ).eval()
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    nested = encoder.use_nested_tensor
    model = get_peft_model(encoder, method.config(target_modules=["layers.1.linear1"])).eval()
    slow = model(x, src_key_padding_mask=padding, **method.call)
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding, **method.call)
        torch.testing.assert_close(fast[~padding], slow[~padding])
        with model.disable_adapter():
            assert not torch.allclose(
                model(x, src_key_padding_mask=padding)[~padding], slow[~padding]
            )
    plain = model.unload()
    assert plain.use_nested_tensor == nested
    assert not any(module._forward_pre_hooks for module in plain.modules())


def test_a_module_used_twice_is_adapted_in_both_places(method):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Linear(8, 8)

        def forward(self, x):
            return self.second(self.first(x))

    model = get_peft_model(Twice(), method.config(target_modules=["second"]))
    assert model.base_model.model.first is model.base_model.model.second
    assert isinstance(model.base_model.model.first, BaseTunerLayer)
    plain = model.unload()
    assert type(plain.first) is nn.Linear
    assert plain.first is plain.second


def test_counting(model, capsys):
    names = trainable(model)
    count = sum(p.numel() for n, p in model.named_parameters() if n in names)
    total = count + sum(p.numel() for p in mlp().parameters())
    assert model.get_nb_trainable_parameters() == (count, total)
    model.print_trainable_parameters()
    assert (
        capsys.readouterr().out
        == f"trainable params: {count:,d} || all params: {total:,d} || trainable%: {100 * count / total:.4f}\n"
    )


def test_the_hub_is_asked_by_id(method, model, tmp_path, monkeypatch):
    import huggingface_hub

    model.save_pretrained(tmp_path)
    asked = []

    def download(repo, name, **options):
        asked.append((repo, name, options))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    base = copy.deepcopy(model).unload()
    PeftModel.from_pretrained(base, "someone/something", revision="v1")
    assert asked == [
        ("someone/something", "adapter_config.json", {"revision": "v1"}),
        ("someone/something", "adapter_model.safetensors", {"revision": "v1"}),
    ]


def test_a_checkpoint_for_other_modules_than_the_config_means(method):
    """The checkpoint decides; that the config means others is said."""
    first = inject_adapter_in_model(method.config(target_modules=TARGETS), mlp())
    state = get_peft_model_state_dict(first)
    config = method.config(target_modules=["2", "4"])
    with (
        pytest.warns(
            RuntimeWarning, match=r"PEFT config contained these additional target modules: \['4'\]"
        ),
        pytest.warns(
            RuntimeWarning, match=r"state_dict contained these additional target modules: \['0'\]"
        ),
    ):
        second = inject_adapter_in_model(config, mlp(), state_dict=state)
    assert get_peft_model_state_dict(second).keys() == state.keys()
    plain = mlp()
    with pytest.raises(
        peft.NoMatchingPeftModuleError, match="no parameters of a .* for modules of this model"
    ):
        inject_adapter_in_model(
            config, plain, state_dict={f"elsewhere.{key}": value for key, value in state.items()}
        )
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())


@pytest.mark.compile
def test_a_checkpoint_is_injected_into_a_compiled_model(method):
    state = get_peft_model_state_dict(
        inject_adapter_in_model(method.config(target_modules=TARGETS), mlp())
    )
    model = inject_adapter_in_model(
        method.config(target_modules=TARGETS), torch.compile(mlp()), state_dict=state
    )
    assert get_peft_model_state_dict(model).keys() == state.keys()


def test_the_model_tells_what_was_targeted(method):
    model = get_peft_model(mlp(), method.config(target_modules=["4"]))
    model.add_adapter("b", method.config(target_modules=["0", "4"]))
    assert model.targeted_module_names == model.base_model.targeted_module_names == ["4", "0"]
    matched = inspect_matched_modules(model, "b")
    assert matched["matched"] == ["0", "4"] and "2" in matched["unmatched"]
    with pytest.raises(ValueError, match="Adapter c not found"):
        inspect_matched_modules(model, "c")
    assert BaseTuner.get_model_config(model.get_base_model()) == {"model_type": "custom"}


def test_warnings_of_what_may_be_a_mistake(method):
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[method.config().peft_type]
    with pytest.warns(
        UserWarning,
        match=f"Adapter name '{prefix[:-1]}' should not be contained in the prefix '{prefix}'",
    ):
        get_peft_model(mlp(), method.config(target_modules=TARGETS), adapter_name=prefix[:-1])
    base = mlp()
    base.name_or_path = "here"
    with pytest.warns(
        UserWarning, match="`base_model_name_or_path` was renamed from 'there' to 'here'"
    ):
        get_peft_model(base, method.config(target_modules=TARGETS, base_model_name_or_path="there"))


def test_keys_of_patterns_that_mean_nothing_are_named():
    config = peft.LoraConfig(
        target_modules=TARGETS, rank_pattern={"0": 2, "typo": 3}, alpha_pattern={"0": 2}
    )
    with pytest.warns(
        RuntimeWarning,
        match=r"`rank_pattern` has keys that did not match any targeted module .*: 'typo'",
    ) as caught:
        get_peft_model(mlp(), config)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("indices", "pattern", "path", "meant"),
    [
        ([1], None, "layers.1.mlp.experts.0.up_proj", True),
        ([0], None, "layers.1.mlp.experts.0.up_proj", False),
        ([1], ["layers"], "layers.1.layers.0.up_proj", True),
        ([0], ["layers"], "layers.1.layers.0.up_proj", False),
        ([0], [r"\d+\.layers"], "layers.1.layers.0.up_proj", True),
        ([1], None, "model.layers.1.mlp.experts.0.up_proj", True),
        ([0], None, "model.layers.1.mlp.experts.0.up_proj", False),
    ],
)
def test_the_outermost_list_is_the_layers(indices, pattern, path, meant):
    """Also where the model itself begins with it."""
    config = peft.LoraConfig(
        target_modules=["up_proj"], layers_to_transform=indices, layers_pattern=pattern
    )
    assert check_target_module_exists(config, path) is meant
