# SPDX-License-Identifier: Apache-2.0
"""Adapters on layers whose weight is one of torchao's quantised tensors.

The oracle is a plain model with the same numbers in full precision, and `quantize_` itself applied
to what merging should give.
"""

import copy

import pytest
import torch
import torchao.quantization as ao
from helpers.methods import METHODS
from torch import nn

from peft import LoKrConfig, PeftModel, get_peft_model
from peft.core.weights import dense_weight, is_quantized

TARGETS = ["0", "2"]
CONFIGS = {
    "int8-row": lambda: ao.Int8WeightOnlyConfig(),
    "int8-tensor": lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()),
    "int8-group": lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(16)),
    "float8": lambda: ao.Float8WeightOnlyConfig(),
    "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
    "int4-asymmetric": lambda: ao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=ao.PerGroup(32), mapping_type=ao.MappingType.ASYMMETRIC
    ),
}
# These quantise their inputs too, through which no gradient passes.
INFERENCE = {
    "int8-dynamic": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
    "int4-dynamic": lambda: ao.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=ao.PerGroup(32)
    ),
}
EVERY = {**CONFIGS, **INFERENCE}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param]


def plain_mlp(dtype=torch.float32):
    torch.manual_seed(3)
    return (
        nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        .to(dtype)
        .requires_grad_(False)
    )


def quantise(module, kind):
    ao.quantize_(module, EVERY[kind]())
    return module


def quantised_mlp(kind, dtype=torch.float32):
    return quantise(plain_mlp(dtype), kind)


def full_mlp(kind, dtype=torch.float32):
    """The same numbers, not quantised."""
    model, layers = plain_mlp(dtype), quantised_mlp(kind, dtype)
    for i in (0, 2):
        model[i].weight.data = layers[i].weight.dequantize()
    return model


def parts(weight):
    """The plain tensors that a quantised one consists of."""
    names, _ = weight.__tensor_flatten__()
    return {name: getattr(weight, name) for name in names}


def assert_same_weight(actual, expected):
    assert type(actual) is type(expected)
    assert actual.dtype == expected.dtype
    assert actual.block_size == expected.block_size
    assert parts(actual).keys() == parts(expected).keys()
    for name, tensor in parts(expected).items():
        assert torch.equal(parts(actual)[name], tensor), name


def weights(model):
    return [copy.deepcopy(model.base_model.model[i].base_layer.weight) for i in (0, 2)]


def adapted(base, method):
    torch.manual_seed(5)
    return get_peft_model(base, method.config(target_modules=TARGETS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", sorted(EVERY))
def test_a_quantised_weight_is_read_as_numbers(kind, dtype):
    layer = quantised_mlp(kind, dtype)[0]
    assert is_quantized(layer)
    assert not is_quantized(plain_mlp(dtype)[0])
    weight = dense_weight(layer)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, layer.weight.dequantize().float())
    if kind in CONFIGS:
        output = layer(torch.eye(64, dtype=dtype)) - layer.bias
        torch.testing.assert_close(output.T.float(), weight, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_output_and_gradients_are_those_over_the_same_numbers(method, kind):
    full, model = (
        adapted(full_mlp(kind), method).train(),
        adapted(quantised_mlp(kind), method).train(),
    )
    x = torch.randn(5, 64)
    for adapted_model in (full, model):
        torch.manual_seed(7)
        adapted_model.inputs = x.clone().requires_grad_()
        adapted_model.output = adapted_model(adapted_model.inputs, **method.call)
        adapted_model.output.square().sum().backward()
    close = {"atol": 0.05, "rtol": 0.02} if kind == "float8" else {"atol": 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(model.output, full.output, **close)
    torch.testing.assert_close(model.inputs.grad, full.inputs.grad, **close)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, full.get_parameter(name).grad, **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", sorted(EVERY))
def test_saving_loading_and_precision(method, kind, dtype, tmp_path):
    x = torch.randn(5, 64, dtype=dtype)
    model = adapted(quantised_mlp(kind, dtype), method).eval()
    assert {p.dtype for n, p in model.named_parameters() if model.prefix in n} == {torch.float32}
    with torch.no_grad():
        expected = model(x, **method.call)
        assert expected.dtype == dtype
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(quantised_mlp(kind, dtype), tmp_path)
        torch.testing.assert_close(loaded(x, **method.call), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", sorted(EVERY))
def test_merging_is_the_librarys_quantisation_of_the_sum_and_comes_off_to_the_bit(
    method, kind, dtype
):
    x = torch.randn(5, 64, dtype=dtype)
    model = adapted(quantised_mlp(kind, dtype), method).eval()
    before = weights(model)
    with torch.no_grad():
        expected = model(x, **method.call)
        deltas = [
            model.base_model.model[i].get_delta_weight("default", **method.merge) for i in (0, 2)
        ]
    model.merge_adapter(safe_merge=True, **method.merge)
    for i, weight, old, delta in zip((0, 2), weights(model), before, deltas, strict=True):
        wanted = plain_mlp(dtype)[i : i + 1]
        wanted[0].weight.data = (old.dequantize().float() + delta).to(dtype)
        assert_same_weight(weight, quantise(wanted, kind)[0].weight)
        assert not weight.requires_grad
        layer = model.base_model.model[i].base_layer
        with torch.no_grad():
            inputs = torch.randn(3, layer.in_features, dtype=dtype)
            torch.testing.assert_close(layer(inputs), wanted[0](inputs))
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(x), quantised_mlp(kind, dtype)(x))
    for weight, old in zip(weights(model), before, strict=True):
        assert_same_weight(weight, old)
    with torch.no_grad():
        assert torch.equal(model(x, **method.call), expected)


@pytest.mark.parametrize("kind", sorted(EVERY))
def test_merge_and_unload_leaves_plain_layers_with_the_librarys_weights(method, kind):
    model = adapted(quantised_mlp(kind), method)
    merged = copy.deepcopy(model)
    merged.merge_adapter(**method.merge)
    x = torch.randn(5, 64)
    plain = model.merge_and_unload(**method.merge)
    assert [type(module) for module in plain.modules()] == [
        nn.Sequential,
        nn.Linear,
        nn.ReLU,
        nn.Linear,
    ]
    assert plain.state_dict().keys() == quantised_mlp(kind).state_dict().keys()
    with torch.no_grad():
        assert torch.equal(plain(x), merged(x))
        assert not torch.allclose(plain(x), quantised_mlp(kind)(x), atol=1e-3)


@pytest.mark.parametrize("kind", ["int8-row", "int4-asymmetric", "float8"])
def test_two_adapters_are_rounded_once(method, kind):
    def both():
        model = adapted(quantised_mlp(kind), method)
        model.add_adapter("b", method.config(target_modules=["2"]))
        return model

    together, apart = both(), both()
    before = weights(apart)
    together.merge_adapter(["default", "b"], **method.merge)
    apart.merge_adapter(["default"], **method.merge)
    apart.merge_adapter(["b"], **method.merge)
    for weight, other in zip(weights(apart), weights(together), strict=True):
        assert_same_weight(weight, other)
    copied = copy.deepcopy(apart)
    for model in (apart, copied):
        model.unmerge_adapter()
        for weight, old in zip(weights(model), before, strict=True):
            assert_same_weight(weight, old)


def test_a_scaled_input_is_refused_before_anything_is_merged():
    """AWQ and SmoothQuant multiply inputs before they meet the weight, which is then not the
    layer's map.
    """
    model = adapted(quantised_mlp("int8-row"), METHODS["LOKR"])
    last = model.base_model.model[2].base_layer
    last.weight.act_pre_scale = torch.ones(128)
    before = weights(model)
    with pytest.raises(
        NotImplementedError, match="quantized storage format that an adapter can't be merged into"
    ):
        model.merge_adapter()
    assert not model.base_model.merged_adapters
    for weight, old in zip(weights(model), before, strict=True):
        assert_same_weight(weight, old)


def test_scaled_float8_weights_are_quantised_and_bare_ones_are_not():
    """A float8 weight with a scale beside it is codes; without one it is a way to store numbers."""
    bare = nn.Linear(8, 8).to(torch.float8_e4m3fn)
    assert not is_quantized(bare)
    assert torch.equal(dense_weight(bare), bare.weight.float())
    scaled = nn.Linear(8, 8).to(torch.float8_e4m3fn)
    scaled.weight_scale_inv = nn.Parameter(torch.ones(1))
    assert is_quantized(scaled)
    model = get_peft_model(nn.Sequential(scaled), LoKrConfig(target_modules=["0"]))
    with pytest.raises(NotImplementedError, match="quantized storage format"):
        model.merge_adapter()


def test_a_transformers_model_in_few_bits(method, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=48,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)

    def load():
        quantisation = TorchAoConfig(ao.Int8WeightOnlyConfig())
        return LlamaForCausalLM.from_pretrained(
            tmp_path, quantization_config=quantisation, dtype=torch.bfloat16
        ).eval()

    ids = torch.randint(3, 48, (2, 6))
    model = get_peft_model(
        load(), method.config(target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    model(input_ids=ids, labels=ids, **method.call).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(input_ids=ids, **method.call).logits
        plain = load()(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter")
        torch.testing.assert_close(loaded(input_ids=ids, **method.call).logits, expected)
        expected = loaded(input_ids=ids, **method.call).logits
        assert loaded.generate(
            input_ids=ids, max_new_tokens=3, do_sample=False, **method.call
        ).shape == (2, 9)
        loaded.merge_adapter(**method.merge)
        merged = loaded(input_ids=ids).logits
        assert (merged - expected).norm() < 0.3 * (plain - expected).norm()
        loaded.unmerge_adapter()
        assert torch.equal(loaded(input_ids=ids, **method.call).logits, expected)
