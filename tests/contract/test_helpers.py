# SPDX-License-Identifier: Apache-2.0
"""`peft.helpers` for every method."""

import copy
import inspect
import pickle

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import TARGETS, llama, mlp

import peft
from peft.helpers import (
    check_if_peft_model,
    disable_input_dtype_casting,
    rescale_adapter_scale,
    update_forward_signature,
    update_generate_signature,
    update_signature,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter


def adapter_layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def test_a_folder_with_an_adapter_is_one(model, tmp_path):
    assert not check_if_peft_model(tmp_path)
    assert not check_if_peft_model(tmp_path / "missing")
    model.save_pretrained(tmp_path)
    assert check_if_peft_model(tmp_path)
    assert check_if_peft_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert not check_if_peft_model(tmp_path)


@pytest.mark.parametrize("multiplier", [2, 0.5, 0, -1.0])
def test_rescaling_multiplies_what_the_adapter_adds(method, multiplier):
    """On one layer, where the output is the base's plus the adapter's part."""
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(8, 8)), method.config(target_modules=["0"])
    ).eval()
    x = torch.randn(4, 8)
    full = model(x, **method.call)
    with model.disable_adapter():
        base = model(x, **method.call)
    before, held = (
        [dict(layer.scaling) for layer in adapter_layers(model)],
        [layer.scaling for layer in adapter_layers(model)],
    )
    with rescale_adapter_scale(model, multiplier):
        assert before == held and (
            multiplier == 1 or held != [layer.scaling for layer in adapter_layers(model)]
        )
        torch.testing.assert_close(model(x, **method.call), base + multiplier * (full - base))
        with rescale_adapter_scale(model, 3):
            torch.testing.assert_close(
                model(x, **method.call), base + 3 * multiplier * (full - base)
            )
    assert [dict(layer.scaling) for layer in adapter_layers(model)] == before
    assert torch.equal(model(x, **method.call), full)


def test_rescaling_ends_with_an_error_too(model):
    layers = adapter_layers(model)
    before = [dict(layer.scaling) for layer in layers]
    with pytest.raises(RuntimeError, match="stop"), rescale_adapter_scale(model, 5):
        raise RuntimeError("stop")
    assert [dict(layer.scaling) for layer in layers] == before


def test_an_adapter_that_is_replaced_while_rescaled_keeps_its_own_scale(tmp_path):
    torch.manual_seed(0)
    for alpha in (1, 6):
        config = peft.LoraConfig(lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)
        peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config).save_pretrained(
            tmp_path / f"{alpha}"
        )
    base = torch.nn.Sequential(torch.nn.Linear(8, 8))
    expected = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "6")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "1")
    half, double = rescale_adapter_scale(model, 0.5), rescale_adapter_scale(model, 2)
    x = torch.randn(4, 8)
    with half:
        hotswap_adapter(model, tmp_path / "6", "default")
        double.__enter__()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model(x), expected(x))
    double.__exit__(None, None, None)
    torch.testing.assert_close(model(x), expected(x))


def test_rescaling_works_on_a_model_with_injected_adapters(method):
    model = peft.inject_adapter_in_model(method.config(target_modules=TARGETS), mlp()).eval()
    with rescale_adapter_scale(model, 0):
        x = torch.randn(2, 8)
        y = model(x, **method.call)
    for layer in adapter_layers(model):
        layer.enable_adapters(False)
    torch.testing.assert_close(model(x, **method.call), y)


def test_rescaling_refuses_what_has_no_meaning(model, method):
    with (
        pytest.raises(TypeError, match="multiplier should be of type float, got <class 'str'>"),
        rescale_adapter_scale(model, "2"),
    ):
        pass
    with pytest.raises(ValueError, match="no adapters"), rescale_adapter_scale(mlp(), 2):
        pass
    model.merge_adapter(**method.merge)
    with pytest.raises(ValueError, match="merged"), rescale_adapter_scale(model, 2):
        pass


def test_casting_of_inputs_can_be_left_to_others(method):
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(8, 8)), method.config(target_modules=["0"])
    ).eval()
    x = torch.randn(4, 8, dtype=torch.float64)
    layer = adapter_layers(model)[0]
    layer.base_layer.to(torch.float64)
    assert model(x, **method.call).dtype == torch.float64
    with disable_input_dtype_casting(model):
        assert not layer.cast_input_dtype_enabled
        with pytest.raises(RuntimeError, match="dtype|scalar type"):
            model(x, **method.call)
    assert model(x, **method.call).dtype == torch.float64
    with disable_input_dtype_casting(model, active=False):
        assert layer.cast_input_dtype_enabled
    layer.cast_input_dtype_enabled = False
    with disable_input_dtype_casting(model):
        pass
    assert not layer.cast_input_dtype_enabled


# --- signatures
# -------------------------------------------------------------------------------------------------------
#
#


@pytest.fixture
def language_model(method):
    return peft.get_peft_model(
        llama(), method.config(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )


def test_a_model_shows_its_base_models_signatures(language_model, method):
    base = type(language_model.get_base_model())
    update_signature(language_model)
    for name in ("forward", "generate"):
        own, shown = getattr(base, name), getattr(language_model, name)
        expected = [p for p in inspect.signature(own).parameters if p not in ("self", "kwargs")]
        parameters = list(inspect.signature(shown).parameters)
        assert parameters[: len(expected)] == expected
        assert set(method.call) <= set(parameters)
        assert shown.__doc__ == own.__doc__
        assert shown.__self__ is language_model


def test_a_model_with_a_shown_signature_works_as_before(language_model, method):
    ids = torch.tensor([[1, 2, 3, 4]])
    expected = language_model(ids, **method.call).logits
    tokens = language_model.generate(
        input_ids=ids, max_new_tokens=2, do_sample=False, **method.call
    )
    update_signature(language_model)
    for model in (
        language_model,
        copy.deepcopy(language_model),
        pickle.loads(pickle.dumps(language_model)),
    ):
        assert torch.equal(model(ids, **method.call).logits, expected)
        assert torch.equal(
            model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, **method.call), tokens
        )
    again = copy.deepcopy(language_model)
    assert again.forward.__self__ is again


@pytest.mark.parametrize(
    ("update", "name"),
    [(update_forward_signature, "forward"), (update_generate_signature, "generate")],
)
def test_either_signature_can_be_updated(language_model, update, name):
    update(language_model)
    assert name in vars(language_model)
    assert {"forward", "generate"} - {name} - set(vars(language_model))


def test_a_base_without_generate_keeps_the_models_own(model):
    update_signature(model)
    assert "generate" not in vars(model)
    assert "input" in inspect.signature(model.forward).parameters


def test_signatures_of_other_things_are_refused(model):
    with pytest.raises(ValueError, match="'x' is not supported; choose one of"):
        update_signature(model, "x")
    with pytest.raises(TypeError, match="got <class 'torch.nn"):
        update_signature(mlp())


@pytest.mark.parametrize(
    "name",
    ["KappaTuneSelector", "MontecloraTrainerMixin", "find_kappa_target_modules"],
)
def test_what_is_not_provided_says_so(name):
    with pytest.raises(NotImplementedError, match=f"{name} is not provided.*{sorted(METHODS)[0]}"):
        getattr(peft.helpers, name)()
    with pytest.raises(AttributeError, match=r"module 'peft.helpers' has no attribute 'nothing'"):
        _ = peft.helpers.nothing


def test_helpers_for_weights_elsewhere():
    """Empty weights, weights that no engine has sharded, and the targets of "all-linear"."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
    from peft.utils.integrations import gather_params_ctx, init_empty_weights

    for include_buffers, device in ((None, "cpu"), (True, "meta")):
        with init_empty_weights(include_buffers):
            layer = torch.nn.BatchNorm1d(2)
        assert layer.weight.is_meta and layer.running_mean.device.type == device
    weight = torch.nn.Linear(2, 2).weight
    with gather_params_ctx(weight), gather_params_ctx([weight], modifier_rank=None):
        assert weight.shape == (2, 2)
    config = peft.LoraConfig(target_modules="all-linear")
    assert _maybe_include_all_linear_layers(config, llama()) is config
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear"))
    assert config.target_modules == set(model.targeted_module_names)
    named = peft.LoraConfig(target_modules=["q_proj"])
    assert _maybe_include_all_linear_layers(named, llama()).target_modules == {"q_proj"}
