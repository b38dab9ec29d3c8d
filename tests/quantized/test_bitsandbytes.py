# SPDX-License-Identifier: Apache-2.0
"""Adapters on layers that bitsandbytes keeps in 8 or 4 bits; it runs on the CPU.

The oracle is a plain model with the same numbers in full precision, and the library's own
quantisation of what merging should give.
"""

import copy
import pickle

import bitsandbytes as bnb
import pytest
import torch
from helpers.methods import METHODS
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model
from peft.core.weights import dense_weight, is_quantized
from peft.tuners.tuners_utils import BaseTunerLayer

TARGETS = ["0", "2"]
CALLS = {
    "8-bit": None,
    "nf4": ("nf4", False, torch.uint8),
    "fp4-nested": ("fp4", True, torch.uint8),
    "nf4-stored-as-bf16": ("nf4", True, torch.bfloat16),
}
KINDS = sorted(CALLS)


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param]


def quantise(linear, kind):
    """What the library makes of a linear layer."""
    out_features, in_features = linear.weight.shape
    if kind == "8-bit":
        layer = bnb.nn.Linear8bitLt(in_features, out_features, has_fp16_weights=False)
    else:
        quant_type, nested, storage = CALLS[kind]
        layer = bnb.nn.Linear4bit(
            in_features,
            out_features,
            compute_dtype=torch.float32,
            quant_type=quant_type,
            compress_statistics=nested,
            quant_storage=storage,
        )
    layer.load_state_dict(copy.deepcopy(linear).state_dict())
    return layer.to("cpu").requires_grad_(False)


def quantised_mlp(kind):
    torch.manual_seed(3)
    return nn.Sequential(
        quantise(nn.Linear(64, 128), kind), nn.ReLU(), quantise(nn.Linear(128, 64), kind)
    )


def full_mlp(kind):
    """The same numbers, not quantised."""
    layers = quantised_mlp(kind)
    result = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    for i in (0, 2):
        result[i].weight.data = in_numbers(layers[i])
        result[i].bias.data = layers[i].bias.data.clone()
    return result.requires_grad_(False)


def in_numbers(layer):
    """A layer's weight, by the library's own forward of the identity in training, which multiplies
    in full precision.
    """
    layer = copy.deepcopy(layer).train()
    layer.bias = None
    with torch.no_grad():
        return layer(torch.eye(layer.in_features)).T.clone()


def state(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_same_state(model, expected):
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert same_bits(actual[key], tensor), key


def assert_quantised_alike(layer, wanted):
    """The same but where rounding puts a number on the other side of the border between two codes,
    or a block's scale.
    """
    found, expected = in_numbers(layer), in_numbers(wanted)
    size = expected.abs().max()
    assert ((found - expected).abs() > 0.01 * size).float().mean() < 0.01
    torch.testing.assert_close(
        found, expected, rtol=0, atol=0.4 * size
    )  # codes are at most a third of the largest number apart


def same_bits(one, other):
    """Equal even where packed weights read as NaN."""
    return one.dtype == other.dtype and torch.equal(
        *(t.detach().flatten().view(torch.uint8) for t in (one, other))
    )


def adapted(base, method):
    torch.manual_seed(5)
    config = method.config(target_modules=TARGETS)
    if (
        config.peft_type == "LOHA"
    ):  # whose products of random numbers are small beside the rounding to four bits
        config.alpha *= 8
    return get_peft_model(base, config)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_weight_is_read_as_the_layer_computes_with_it(kind):
    layer = quantised_mlp(kind)[0]
    assert is_quantized(layer)
    weight = dense_weight(layer)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, in_numbers(layer))
    with torch.no_grad():  # which repacks 4-bit weights on some CPUs, with scales in bfloat16
        output = layer.eval()(torch.eye(64)) - layer.bias
    torch.testing.assert_close(dense_weight(layer).T, output, atol=2e-3, rtol=0)
    torch.testing.assert_close(dense_weight(layer), weight, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_over_the_same_numbers(method, kind):
    full, model = (
        adapted(full_mlp(kind), method).train(),
        adapted(quantised_mlp(kind), method).train(),
    )
    before = state(model)
    x = torch.randn(5, 64)
    for adapted_model in (full, model):
        torch.manual_seed(7)  # Poly draws in training
        adapted_model.inputs = x.clone().requires_grad_()
        adapted_model.output = adapted_model(adapted_model.inputs, **method.call)
        adapted_model.output.square().sum().backward()
    torch.testing.assert_close(model.output, full.output, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.inputs.grad, full.inputs.grad, atol=1e-3, rtol=1e-3)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert gradients
    for name, gradient in gradients.items():
        assert model.get_parameter(name).dtype == torch.float32
        torch.testing.assert_close(gradient, full.get_parameter(name).grad, atol=1e-3, rtol=1e-3)
    assert_same_state(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading(method, kind, tmp_path):
    x = torch.randn(5, 64)
    model = adapted(quantised_mlp(kind), method).eval()
    with torch.no_grad():
        expected = model(x, **method.call)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(quantised_mlp(kind), tmp_path)
        torch.testing.assert_close(loaded(x, **method.call), expected)
        torch.testing.assert_close(
            PeftModel.from_pretrained(full_mlp(kind), tmp_path)(x, **method.call),
            expected,
            atol=0.05,
            rtol=0.02,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_the_librarys_quantisation_of_the_sum_and_comes_off_to_the_bit(method, kind):
    x = torch.randn(5, 64)
    full, model = adapted(full_mlp(kind), method), adapted(quantised_mlp(kind), method)
    before = state(model)
    full.merge_adapter(**method.merge)
    model.merge_adapter(**method.merge)
    merged = state(model)
    for i in (0, 2):
        wanted = quantise(full.base_model.model[i].base_layer, kind)
        layer = model.base_model.model[i].base_layer
        assert type(layer) is type(wanted)
        assert {k: (t.dtype, t.shape) for k, t in state(layer).items()} == {
            k: (t.dtype, t.shape) for k, t in state(wanted).items()
        }
        assert_quantised_alike(layer, wanted)
        assert not layer.weight.requires_grad
        assert not torch.equal(layer.weight, before[f"base_model.model.{i}.base_layer.weight"])
        full.base_model.model[i].base_layer.weight.data = in_numbers(layer)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(x), full.train()(x), atol=1e-4, rtol=1e-4)
    assert_same_state(model, merged)
    model.unmerge_adapter()
    assert_same_state(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_between_forwards_and_disabling(method, kind):
    """Evaluation may keep the weight in another packing; it is merged and restored all the same."""
    x = torch.randn(5, 64)
    model = adapted(quantised_mlp(kind), method).eval()
    with torch.no_grad():
        expected = model(x, **method.call)
        with model.disable_adapter():
            plain = model(x)
        torch.testing.assert_close(plain, quantised_mlp(kind).eval()(x), atol=0.01, rtol=0)
        for _ in range(2):
            model.merge_adapter(safe_merge=True, **method.merge)
            merged = model(x)
            assert (merged - expected).norm() < 0.75 * (plain - expected).norm()
            with model.disable_adapter():
                assert torch.equal(model(x), plain)
            assert torch.equal(model(x, **method.call), expected)  # which has unmerged it
            model.merge_adapter(**method.merge)
            assert torch.equal(model(x), merged)
            assert torch.equal(copy.deepcopy(model)(x), merged)
            model.unmerge_adapter()
            assert torch.equal(model(x, **method.call), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluating_does_not_stop_gradients_nor_spoil_what_is_saved(method, kind, tmp_path):
    """On CPUs with bfloat16 instructions the library repacks 4-bit weights to evaluate, which by
    itself does both.
    """
    x = torch.randn(5, 64)
    base = quantised_mlp(kind).eval()
    with torch.no_grad():
        plain = base(x)
    model = adapted(base, method).eval()
    with torch.no_grad():
        expected = model(x, **method.call)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), plain, atol=0.01, rtol=0)
        before = state(model)
        model.save_pretrained(tmp_path)
        assert torch.equal(model(x, **method.call), expected)
        assert_same_state(model, before)
    inputs = x.clone().requires_grad_()
    model(inputs, **method.call).sum().backward()
    assert inputs.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    unloaded = model.unload()
    assert all(
        vars(module).keys() == vars(fresh).keys()
        for module, fresh in zip(unloaded.modules(), quantised_mlp(kind).modules(), strict=True)
    )
    with torch.no_grad():
        torch.testing.assert_close(unloaded(x), plain, atol=0.01, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload_leaves_the_librarys_layers(method, kind):
    model = adapted(quantised_mlp(kind), method)
    merged = copy.deepcopy(model)
    merged.merge_adapter(**method.merge)
    plain = model.merge_and_unload(**method.merge)
    fresh = quantised_mlp(kind)
    assert [type(module) for module in plain.modules()] == [
        type(module) for module in fresh.modules()
    ]
    assert plain.state_dict().keys() == fresh.state_dict().keys()
    x = torch.randn(5, 64, requires_grad=True)
    output = plain.train()(x)
    assert torch.equal(output, merged.train()(x))
    output.sum().backward()
    assert x.grad.abs().sum() > 0
    assert_same_state(merged.merge_and_unload(), state(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_are_rounded_once(method, kind):
    def both():
        model = adapted(quantised_mlp(kind), method)
        model.add_adapter("b", method.config(target_modules=["2"]))
        return model

    together, apart = both(), both()
    before = state(apart)
    together.merge_adapter(["default", "b"], **method.merge)
    apart.merge_adapter(["default"], **method.merge)
    apart.merge_adapter(["b"], **method.merge)
    assert_same_state(apart, state(together))
    assert apart.base_model.merged_adapters == ["default", "b"]
    copied = copy.deepcopy(apart)
    for model in (apart, copied):
        model.unmerge_adapter()
        assert not model.base_model.merged_adapters
        assert_same_state(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_adapter_leaves_the_weights(method, kind):
    model = adapted(quantised_mlp(kind), method)
    before = state(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.prefix in name:
                parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match="nothing was merged"):
        model.merge_adapter(safe_merge=True, **method.merge)
    assert not model.base_model.merged_adapters
    after = {key: tensor for key, tensor in model.state_dict().items() if model.prefix not in key}
    assert all(same_bits(tensor, before[key]) for key, tensor in after.items())


def test_a_failure_while_quantising_leaves_the_layer(monkeypatch):
    model = adapted(quantised_mlp("nf4"), METHODS["LOKR"])
    before = state(model)
    layer = model.base_model.model[0]
    layer.merge()
    merged = state(model)
    model.add_adapter("b", METHODS["LOKR"].config(target_modules=["0"]))
    keys = [key for key in merged if "b" not in key.split(".")]
    with monkeypatch.context() as patch:
        patch.setattr(bnb.functional, "quantize_4bit", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["default"]
    assert all(torch.equal(model.state_dict()[key], merged[key]) for key in keys)
    layer.unmerge()
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in keys)


@pytest.mark.parametrize("kind", ["8-bit", "nf4"])
def test_a_decomposed_adapter_is_quantised_once_and_the_original_read_meanwhile(kind):
    """The stored weight is the library's of `m · (W + Δ) / |W + Δ|`."""
    model = get_peft_model(
        quantised_mlp(kind),
        LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    )
    before, full = state(model), full_mlp(kind)
    for i in (0, 2):
        layer = model.base_model.model[i]
        layer.lora_magnitude_vector["default"].weight.data *= 1.5
        total = full[i].weight + layer.get_delta_weight("default")
        magnitude = layer.lora_magnitude_vector["default"].weight.view(-1, 1)
        full[i].weight.data = (magnitude * total / total.norm(dim=1, keepdim=True)).detach()
    before = state(model)
    model.merge_adapter()
    for i in (0, 2):
        assert_quantised_alike(model.base_model.model[i].base_layer, quantise(full[i], kind))
    merged = state(model)
    for i in (0, 2):
        torch.testing.assert_close(
            model.base_model.model[i].unmerged_weight(), dense_weight(quantised_mlp(kind)[i])
        )
    assert_same_state(model, merged)
    model.unmerge_adapter()
    assert_same_state(model, before)


def test_a_trained_bias_is_added_to_a_quantised_layers():
    model = get_peft_model(
        quantised_mlp("8-bit"),
        LoraConfig(
            r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False, lora_bias=True
        ),
    )
    layer = model.base_model.model[0]
    before = layer.bias.clone()
    model.merge_adapter()
    expected = before + 3 * layer.lora_B["default"].bias
    torch.testing.assert_close(layer.bias, expected.to(before.dtype))
    model.unmerge_adapter()
    assert torch.equal(layer.bias, before)


def test_a_merged_state_of_quantised_weights_can_not_be_undone(method):
    model = adapted(quantised_mlp("8-bit"), method)
    model.add_adapter("b", method.config(target_modules=TARGETS))
    other = copy.deepcopy(model)
    other.merge_adapter(["default"], **method.merge)
    merged = state(other)
    model.load_state_dict(other.state_dict())
    layer = model.base_model.model[0]
    assert layer.merged_adapters == ["default"]
    for verb in (
        layer.unmerge,
        layer.unmerged_weight,
        lambda: layer.merge(False, ["b"], **method.merge),
    ):
        with pytest.raises(RuntimeError, match="default was merged in the state dict"):
            verb()
        assert_same_state(model, merged)


def test_a_merged_model_is_pickled(method):
    """The library's own parameter class does not survive that; its layers do."""
    model = adapted(quantised_mlp("nf4"), method)
    before = dense_weight(model.base_model.model[0]), dense_weight(model.base_model.model[2])
    model.merge_adapter(**method.merge)
    restored = pickle.loads(pickle.dumps(model))
    restored.unmerge_adapter()
    after = dense_weight(restored.base_model.model[0]), dense_weight(restored.base_model.model[2])
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def llama(tmp_path, **quantisation):
    """A model as transformers loads it in few bits."""
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**quantisation), dtype=torch.bfloat16
    )


QUANTISATIONS = {
    "8-bit": {"load_in_8bit": True},
    "4-bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
}


@pytest.mark.parametrize("bits", sorted(QUANTISATIONS))
def test_a_transformers_model_in_few_bits(method, bits, tmp_path):
    base = llama(tmp_path, **QUANTISATIONS[bits])
    linear = {"8-bit": bnb.nn.Linear8bitLt, "4-bit": bnb.nn.Linear4bit}[bits]
    ids = torch.randint(3, 64, (2, 6))
    model = get_peft_model(base, method.config(target_modules="all-linear", task_type="CAUSAL_LM"))
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    assert len(layers) == 14
    assert all(isinstance(layer.base_layer, linear) for layer in layers)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=ids, labels=ids, **method.call).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert sum(p.grad.abs().sum() for p in model.parameters() if p.requires_grad) > 0
    model.gradient_checkpointing_disable()
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(input_ids=ids, **method.call).logits
        assert expected.dtype == torch.bfloat16
        generated = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, **method.call)
        assert generated.shape == (2, 9)
        fresh = llama(tmp_path, **QUANTISATIONS[bits]).eval()
        plain = fresh(input_ids=ids).logits
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits, plain, atol=0.02, rtol=0.02)
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
        torch.testing.assert_close(
            loaded(input_ids=ids, **method.call).logits, expected, atol=0.06, rtol=0.06
        )
        merged = loaded.merge_and_unload(**method.merge)
        assert sum(isinstance(module, linear) for module in merged.modules()) == 14
        difference = merged(input_ids=ids).logits - expected
        assert difference.norm() < 0.7 * (plain - expected).norm()
        assert merged.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (2, 9)


@pytest.mark.parametrize("kind", ["8-bit", "nf4-stored-as-bf16"])
def test_names_that_programs_ask_for(kind):
    from peft.tuners import lora
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
    from peft.utils.integrations import dequantize_module_weight, get_bnb_param_type

    plain = nn.Linear(32, 64).bfloat16()
    base = quantise(plain, kind)
    bits, own, other = (
        ("8bit", Linear8bitLt, Linear4bit)
        if kind == "8-bit"
        else ("4bit", Linear4bit, Linear8bitLt)
    )
    assert get_bnb_param_type(base.weight) == bits and not get_bnb_param_type(plain.weight)
    if kind == "8-bit":
        expected = bnb.functional.int8_vectorwise_dequant(base.weight.data, base.weight.SCB)
    else:
        expected = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    found = dequantize_module_weight(base)
    torch.testing.assert_close(found, expected.view(64, 32))
    assert dequantize_module_weight(plain) is plain.weight
    model = get_peft_model(nn.Sequential(base, nn.Linear(64, 8)), LoraConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    assert isinstance(layer, own) and isinstance(layer, lora.Linear)
    assert not isinstance(layer, other) and repr(layer).startswith(f"lora.{own.__name__}(")
    by_hand = own(quantise(plain, kind), "default", LoraConfig(), r=4, lora_alpha=16)
    assert (
        by_hand.scaling == {"default": 4.0}
        and by_hand(torch.randn(2, 32).bfloat16()).isfinite().all()
    )
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is own
