# SPDX-License-Identifier: Apache-2.0
"""Half precision, autocast, float8 storage and gradient checkpointing: dtypes of what comes out,
values near those of float64.
"""

import copy

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import gpt2, llama, t5
from helpers.variants import CASES, Case, Model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BlipConfig, BlipForConditionalGeneration, SwinConfig, SwinModel

from peft import get_peft_model
from peft.base.registry import PEFT_TYPE_TO_TUNER_MAPPING
from peft.core.weights import dense_weight
from peft.helpers import disable_input_dtype_casting
from peft.integrations.checkpointing import require_input_gradients

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=sorted(CASES))
def case(request) -> Case:
    return CASES[request.param]


def own(model):
    """The adapter's floating-point parameters, by name."""
    return {
        n: p for n, p in model.named_parameters() if model.prefix in n and p.is_floating_point()
    }


def gradients(model):
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }


def alike(gradient, expected):
    """Whether two gradients point the same way; where there is none but for rounding, whether both
    are that small.
    """
    gradient, expected = gradient.double().flatten(), expected.double().flatten()
    if expected.norm() < 1e-8:
        return gradient.norm() < 1e-6
    return torch.nn.functional.cosine_similarity(gradient, expected, dim=0) > 0.98


@pytest.mark.parametrize("autocast", [True, False], ids=["float32 adapter", "adapter as base"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_dtypes_and_values(case, dtype, autocast):
    """The output has the base's dtype, gradients have the adapter's, and both are near those in
    double precision.
    """
    exact = get_peft_model(case.base().double(), case.config()).eval()
    model = get_peft_model(
        case.base().to(dtype), case.config(), autocast_adapter_dtype=autocast
    ).eval()
    wanted = torch.float32 if autocast and dtype in HALF else dtype
    assert {p.dtype for p in own(model).values()} == {wanted}
    with torch.no_grad():
        for parameter, other in zip(exact.parameters(), model.parameters(), strict=True):
            parameter.copy_(other)
    x, call = case.input().to(dtype), case.call(0, 2, 1)
    outputs = []
    for run, inputs in ((exact, x.double()), (model, x)):
        outputs.append(run(inputs, **call))
        outputs[-1].square().mean().backward()
    assert outputs[1].dtype == dtype
    tolerance = {
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        torch.bfloat16: 0.1,
        torch.float16: 0.02,
    }[dtype]
    torch.testing.assert_close(outputs[1].double(), outputs[0], atol=tolerance, rtol=tolerance)
    for name, gradient in gradients(model).items():
        assert gradient.dtype == wanted
        assert alike(gradient, exact.get_parameter(name).grad)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", HALF)
def test_autocast(case, dtype, training):
    """Parameters stay, products are in half precision, gradients are near those without."""
    model = case.model().train(training)
    plain = copy.deepcopy(model)
    x, call = case.input(), case.call(0, 2, 1)
    outputs = []
    for run, enabled in ((plain, False), (model, True)):
        torch.manual_seed(9)  # what training draws
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            outputs.append(run(x, **call))
        outputs[-1].float().square().mean().backward()
    assert outputs[1].dtype == dtype
    torch.testing.assert_close(outputs[1].float(), outputs[0], atol=0.1, rtol=0.1)
    expected = gradients(plain)
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert torch.isfinite(gradient).all()
        if expected[name].norm() > 1e-5:
            assert alike(gradient, expected[name])


@pytest.mark.parametrize("dtype", HALF)
def test_merging_in_half_precision_rounds_once(case, dtype):
    """The merged weight is the sum in double precision, rounded; it comes off to the bit."""
    if case.routes_by_input:
        model = case.model()
        with pytest.raises(NotImplementedError, match="routes by input"):
            model.merge_adapter()
        return
    model = get_peft_model(
        case.base().to(dtype), case.config(), autocast_adapter_dtype=False
    ).eval()
    layers = list(model.base_model.tuner_layers())
    before = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    with torch.no_grad():
        deltas = [layer.get_delta_weight("default", **case.merge) for layer in layers]
    factors = [layer.merge_factor("default", float(layer.scaling["default"])) for layer in layers]
    model.merge_adapter(**case.merge)
    for layer, weight, delta, factor in zip(layers, before, deltas, factors, strict=True):
        total = weight.double() + delta.double()
        total = (
            total if factor is None else total.float() * factor.float()
        )  # as wide as two factors need
        assert torch.equal(layer.get_base_layer().weight, total.to(dtype))
    model.unmerge_adapter()
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.get_base_layer().weight, weight)


# Float8 storage


def trains_alone(base, x):
    """Return whether a cast model without adapters runs backward: convolutions do not on processors
    where torch's own ones compute bfloat16.
    """
    try:
        base(x.clone().requires_grad_()).float().sum().backward()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("order", ["cast first", "adapt first"])
def test_weights_that_are_cast_when_used(case, storage, order):
    """diffusers' layerwise casting: float8 between calls, bfloat16 in them. Adapters keep their own
    precision, since its models pass over what adapters name.
    """
    from diffusers.hooks import apply_layerwise_casting

    base, fields = Model(case.base()), {"target_modules": ["layers.0", "layers.2"]}
    options = {"storage_dtype": storage, "compute_dtype": torch.bfloat16}
    options["skip_modules_pattern"] = PEFT_TYPE_TO_TUNER_MAPPING[
        case.config().peft_type
    ].tuner_layer_cls.adapter_layer_names
    if order == "cast first":
        apply_layerwise_casting(base, **options)
        model = get_peft_model(base, case.config(**fields)).eval()
    else:
        model = get_peft_model(base, case.config(**fields)).eval()
        apply_layerwise_casting(base, **options)
    layers = list(model.base_model.tuner_layers())
    assert all(layer.get_base_layer().weight.dtype == storage for layer in layers)
    plain = get_peft_model(Model(case.base()).to(torch.bfloat16), case.config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(model.get_parameter(name))
    x, call = case.input().to(torch.bfloat16), case.call(0, 2, 1)
    alone = Model(case.base()).requires_grad_(False)
    apply_layerwise_casting(alone, **options)
    has_gradients = trains_alone(alone, x)
    outputs = []
    for run in (plain, model):
        outputs.append(run(x, **call))
        if has_gradients:
            outputs[-1].float().square().mean().backward()
    assert outputs[1].dtype == torch.bfloat16
    torch.testing.assert_close(outputs[1], outputs[0], atol=0.01, rtol=0.05)
    for name, gradient in gradients(plain).items() if has_gradients else ():
        assert alike(gradients(model)[name], gradient)
    assert all(layer.get_base_layer().weight.dtype == storage for layer in layers)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_merging_into_float8_comes_off_to_the_bit(method, storage):
    base = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).to(storage)
    model = get_peft_model(base, method.config(target_modules=["0", "1"]))
    layers = list(model.base_model.tuner_layers())
    before = [dense_weight(layer.get_base_layer()) for layer in layers]
    with torch.no_grad():
        deltas = [layer.get_delta_weight("default", **method.merge) for layer in layers]
    model.merge_adapter(safe_merge=True, **method.merge)
    for layer, weight, delta in zip(layers, before, deltas, strict=True):
        assert layer.get_base_layer().weight.dtype == storage
        assert torch.equal(
            dense_weight(layer.get_base_layer()), (weight + delta).to(storage).float()
        )
    model.unmerge_adapter()
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(dense_weight(layer.get_base_layer()), weight)


def test_an_input_is_not_narrowed_where_that_is_switched_off(method):
    """Parameters may be stored in less than they are used in; wider ones are computed with as ever."""
    base = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).to(torch.bfloat16)
    model = get_peft_model(base, method.config(target_modules=["0", "1"])).eval()
    layer = model.base_model.model[0]
    seen = []
    original = layer._cast_input_dtype
    layer._cast_input_dtype = lambda x, dtype: (
        seen.append(original(x, dtype).dtype) or original(x, dtype)
    )
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    expected = model(x, **method.call)
    with disable_input_dtype_casting(model):
        assert torch.equal(model(x, **method.call), expected)
        assert layer._cast_input_dtype(x, torch.float8_e4m3fn).dtype == torch.bfloat16
    assert layer._cast_input_dtype(x, torch.float8_e4m3fn).dtype == torch.float8_e4m3fn
    assert set(seen[:-2]) == {torch.float32}


# Gradient checkpointing


def checked(model, run, calls):
    """Gradients of two calls and one backward, the seed fixed; recomputation restores the
    generator's state.
    """
    torch.manual_seed(3)
    losses = [run(model, **call) for call in calls]
    (losses[0] + 2 * losses[1]).backward()
    result = gradients(model)
    model.zero_grad()
    assert result
    return result


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_a_part(case, reentrant):
    """Each variant in training, with what it draws: two calls with tasks of their own, then one
    backward.
    """

    class Checkpointed(Model):
        saving = False

        def forward(self, x):
            return (
                checkpoint(self.layers, x, use_reentrant=reentrant)
                if self.saving
                else self.layers(x)
            )

    model = get_peft_model(
        Checkpointed(case.base()), case.config(target_modules=["layers.0", "layers.2"])
    ).train()
    x = case.input().requires_grad_()
    calls = [case.call(0, 2, 1), case.call(1, 1, 0)]
    expected = checked(model, lambda m, **call: m(x, **call).square().sum(), calls)
    model.get_base_model().saving = True
    for name, gradient in checked(
        model, lambda m, **call: m(x, **call).square().sum(), calls
    ).items():
        torch.testing.assert_close(gradient, expected[name])


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=48,
        hidden_dropout_prob=0.1,
    )
    return BertForSequenceClassification(config)


MODELS = {
    "llama": (llama, "CAUSAL_LM", ["q_proj", "down_proj"]),
    "gpt2": (gpt2, "CAUSAL_LM", ["c_attn", "c_fc"]),
    "t5": (t5, "SEQ_2_SEQ_LM", ["q", "v", "wo"]),
    "bert": (bert, "SEQ_CLS", ["query", "value"]),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("variant", [*METHODS, "POLY by sample"])
def test_checkpointing_transformers_models(variant, name, reentrant):
    """In training, dropout of the model included."""
    case = CASES[variant]
    build, task_type, targets = MODELS[name]
    model = get_peft_model(
        build(), case.config(target_modules=targets, task_type=task_type)
    ).train()
    ids = torch.randint(3, 48, (3, 5))
    labels = torch.tensor([0, 1, 0]) if name == "bert" else ids
    calls = [
        {"input_ids": ids, "labels": labels, **case.call(*tasks)}
        for tasks in ((0, 2, 1), (1, 1, 0))
    ]

    def run(m, **call):
        return m(**call).loss

    expected = checked(model, run, calls)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for key, gradient in checked(model, run, calls).items():
        torch.testing.assert_close(gradient, expected[key])


def swin():
    """Return a model whose embedding returns a tuple, its targets and an input."""
    sizes = {"image_size": 8, "patch_size": 1, "window_size": 2, "embed_dim": 8, "depths": [2]}
    base = SwinModel(SwinConfig(**sizes, num_heads=[2], drop_path_rate=0.0))
    return base, ["q_proj", "fc1"], {"pixel_values": torch.randn(2, 3, 8, 8)}


def blip():
    """Return a model that changes its embedding's output in place, its targets and an input."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    image = {**sizes, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    text = {**sizes, "num_hidden_layers": 2, "encoder_hidden_size": 16, "vocab_size": 40}
    text |= {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    base = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=image))
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    return base, ["query", "value"], inputs


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("make", [swin, blip])
def test_checkpointing_of_unusual_embeddings(make, reentrant):
    """The hooks that let gradients through are there once, and leave when told to."""
    torch.manual_seed(0)
    base, targets, inputs = make()
    model = get_peft_model(base, METHODS["LORA"].config(target_modules=targets))
    found = []
    for on in (False, True):
        if on:
            for _ in range(2):
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train().zero_grad()
        model(**inputs)[0].square().sum().backward()
        found.append(gradients(model))
    assert found[0] and found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)
    embeddings = base.get_input_embeddings()
    assert len(embeddings._forward_hooks) == 1
    model.disable_input_require_grads()
    assert not embeddings._forward_hooks


def test_hooks_of_older_versions_of_transformers():
    """They keep one handle, and fail to disable what was never enabled."""

    class Older(nn.Sequential):
        def enable_input_require_grads(self):
            hook = lambda module, inputs, output: output.requires_grad_(True)  # noqa: E731
            self._require_grads_hook = self[0].register_forward_hook(hook)

        def disable_input_require_grads(self):
            self._require_grads_hook.remove()

    class Embed(nn.Linear):
        def forward(self, x):
            return super().forward(x), x.shape

    base = Older(Embed(8, 8)).requires_grad_(False)
    for _ in range(2):
        require_input_gradients(base)
        assert base(torch.randn(2, 8))[0].requires_grad
        assert len(base[0]._forward_hooks) == 1
    base.disable_input_require_grads()
    assert not base(torch.randn(2, 8))[0].requires_grad
    require_input_gradients(base)
    assert len(base[0]._forward_hooks) == 1


def test_checkpointing_under_autocast(case):
    """The recomputation runs in the same precision."""
    model = get_peft_model(
        Model(case.base()), case.config(target_modules=["layers.0", "layers.2"])
    ).train()
    x = case.input().requires_grad_()

    def run(m, saving=False, **call):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = (
                checkpoint(lambda x: m(x, **call), x, use_reentrant=False)
                if saving
                else m(x, **call)
            )
        return y.float().square().sum()

    calls = [case.call(0, 2, 1), case.call(1, 1, 0)]
    expected = checked(model, run, calls)
    for name, gradient in checked(model, run, [{"saving": True, **call} for call in calls]).items():
        torch.testing.assert_close(gradient, expected[name])
