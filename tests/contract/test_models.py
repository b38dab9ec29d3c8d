# SPDX-License-Identifier: Apache-2.0
"""Every method on models people have: classifiers of texts and images, decoders, encoder-decoders,
convolutions, blocks in blocks.
"""

import copy

import pytest
import torch
from helpers.models import gpt2, llama, t5
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft
from peft import PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=48,
        num_labels=4,
    )
    return BertForSequenceClassification(config).eval()


def tagger():
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=48,
        num_labels=4,
    )
    return BertForTokenClassification(config).eval()


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=4,
    )
    return ViTForImageClassification(config).eval()


def texts(**more):
    return {
        "input_ids": torch.randint(3, 48, (3, 5)),
        "attention_mask": torch.ones(3, 5, dtype=torch.long),
        **more,
    }


CASES = {
    "llama": (llama, "CAUSAL_LM", lambda: texts(), peft.PeftModelForCausalLM),
    "gpt2": (gpt2, "CAUSAL_LM", lambda: texts(), peft.PeftModelForCausalLM),
    "t5": (
        t5,
        "SEQ_2_SEQ_LM",
        lambda: texts(decoder_input_ids=torch.randint(3, 48, (3, 4))),
        peft.PeftModelForSeq2SeqLM,
    ),
    "bert": (bert, "SEQ_CLS", lambda: texts(), peft.PeftModelForSequenceClassification),
    "tagger": (tagger, "TOKEN_CLS", lambda: texts(), peft.PeftModelForTokenClassification),
    "features": (
        lambda: bert().bert,
        "FEATURE_EXTRACTION",
        lambda: texts(),
        peft.PeftModelForFeatureExtraction,
    ),
    "vit": (vit, None, lambda: {"pixel_values": torch.randn(3, 3, 8, 8)}, PeftModel),
}


def output(model, inputs, **call):
    result = model(**inputs, **call)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_life_of_an_adapter(method, name, tmp_path):
    """Default targets, training, disabling, saving, loading, merging."""
    build, task_type, make_inputs, model_cls = CASES[name]
    base, inputs = build(), make_inputs()
    with torch.no_grad():  # attention has other kernels where gradients are kept
        plain = output(base, inputs)
    weights = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = get_peft_model(base, method.config(task_type=task_type)).train()
    assert isinstance(model, model_cls) and type(model).__name__ == model_cls.__name__
    assert isinstance(model.peft_config["default"].target_modules, set)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output(model, inputs, **method.call).square().mean().backward()
    optimiser.step()
    model.eval()
    with torch.no_grad():
        expected = output(model, inputs, **method.call)
        with model.disable_adapter():
            torch.testing.assert_close(output(model, inputs), plain, rtol=0, atol=0)
        assert not torch.allclose(expected, plain, atol=1e-4)
        model.save_pretrained(tmp_path)
        model.unload()
        assert all(torch.equal(tensor, weights[key]) for key, tensor in base.state_dict().items())
        loaded = PeftModel.from_pretrained(base, tmp_path)
        assert type(loaded) is type(model)
        torch.testing.assert_close(output(loaded, inputs, **method.call), expected)
        merged = loaded.merge_and_unload(**method.merge)
        assert merged is base
        torch.testing.assert_close(output(merged, inputs), expected, atol=1e-5, rtol=1e-4)
    assert not any(
        part in key for key in merged.state_dict() for part in ("base_layer", "modules_to_save")
    )


@pytest.mark.parametrize(("name", "head"), [("bert", "classifier"), ("tagger", "classifier")])
def test_heads_of_classifiers_are_trained_and_saved(method, name, head, tmp_path):
    build, task_type, make_inputs, _ = CASES[name]
    model = get_peft_model(build(), method.config(task_type=task_type))
    assert head in model.modules_to_save
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {f"base_model.model.{head}.weight", f"base_model.model.{head}.bias"} <= keys
    assert not any("modules_to_save" in key or "original_module" in key for key in keys)
    output(model.train(), make_inputs(), **method.call).sum().backward()
    assert (
        getattr(model.base_model.model, head).modules_to_save["default"].weight.grad.abs().sum() > 0
    )
    assert getattr(model.base_model.model, head).original_module.weight.grad is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_all_linear_leaves_the_head_alone(method, name):
    build, task_type, _, _ = CASES[name]
    base = build()
    heads = {"lm_head", "classifier"}
    linear = {
        path
        for path, module in base.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    }
    model = get_peft_model(base, method.config(target_modules="all-linear", task_type=task_type))
    adapted = {path for path, module in base.named_modules() if hasattr(module, "base_layer")}
    assert adapted == linear - heads
    assert model.peft_config["default"].target_modules == adapted


@pytest.mark.parametrize("build", [llama, gpt2, t5])
def test_greedy_generation_is_the_forwards_argmax(method, build):
    """With a cache and without, as token after token by hand."""
    task_type = "SEQ_2_SEQ_LM" if build is t5 else "CAUSAL_LM"
    model = get_peft_model(
        build(), method.config(target_modules="all-linear", task_type=task_type)
    ).eval()
    ids = torch.randint(3, 48, (2, 4))
    sequence = torch.zeros(2, 1, dtype=torch.long) if build is t5 else ids
    with torch.no_grad():
        for _ in range(4):
            inputs = (
                {"input_ids": ids, "decoder_input_ids": sequence}
                if build is t5
                else {"input_ids": sequence}
            )
            token = model(**inputs, **method.call).logits[:, -1].argmax(-1, keepdim=True)
            sequence = torch.cat([sequence, token], dim=1)
        for cache in (True, False):
            made = model.generate(
                input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=cache, **method.call
            )
            assert torch.equal(made, sequence)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_a_block_by_hand(method, reentrant):
    """A model that calls torch's checkpoint itself; base and adapter gradients as without."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.saving = nn.Linear(8, 16), nn.Linear(16, 8), False

        def block(self, x):
            return self.second(self.first(x).tanh())

        def forward(self, x):
            return (
                checkpoint(self.block, x, use_reentrant=reentrant) if self.saving else self.block(x)
            )

    model = get_peft_model(Model(), method.config(target_modules=["first", "second"])).train()
    gradients = []
    for saving in (False, True):
        model.get_base_model().saving = saving
        torch.manual_seed(3)
        x = torch.randn(5, 8, requires_grad=True)
        y = model(x, **method.call)
        z = model(2 * x, **method.call)
        (y.square().sum() + z.sum()).backward()
        gradients.append(
            {"x": x.grad}
            | {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )
        model.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Conv1d(8, 16, 3, stride=2, padding=1), (2, 8, 9)),
        (lambda: nn.Conv2d(8, 16, 3, groups=2, padding_mode="circular", padding=1), (2, 8, 6, 6)),
        (lambda: nn.Conv2d(8, 16, (1, 3), dilation=(1, 2), padding="same"), (2, 8, 6, 6)),
        (lambda: nn.Conv3d(8, 16, 2), (2, 8, 4, 4, 4)),
    ],
)
def test_convolutions_forward_is_the_merged_convolution(build, shape):
    """Only LoKr has convolutions; the oracle is torch's own, with the merged weight."""
    for more in ({}, {"use_effective_conv2d": True}, {"decompose_both": True}):
        torch.manual_seed(0)
        base = nn.Sequential(build())
        config = peft.LoKrConfig(r=1, alpha=2, init_weights=False, target_modules=["0"], **more)
        model = get_peft_model(base, config)
        x = torch.randn(shape)
        expected = model(x).detach()
        plain = base[0].base_layer(x)
        assert not torch.allclose(expected, plain, atol=1e-3)
        torch.testing.assert_close(model.merge_and_unload()(x), expected, atol=1e-5, rtol=1e-4)


def test_a_peft_model_inside_another_module(method):
    """The usual training wrapper: parameters, state dict, mode, copies and gradients go through it."""

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.head = inner, nn.Linear(8, 1)

        def forward(self, x, **call):
            return self.head(self.inner(x, **call))

    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    wrapper = Wrapper(get_peft_model(base, method.config(target_modules=["0", "2"])))
    x = torch.randn(3, 8)
    wrapper.eval()
    assert not any(module.training for module in wrapper.modules())
    expected = wrapper(x, **method.call)
    twin = copy.deepcopy(wrapper)
    assert torch.equal(twin(x, **method.call), expected)
    expected.sum().backward()
    assert all(p.grad is not None for p in wrapper.parameters() if p.requires_grad)
    assert all(p.grad is None for p in twin.parameters())
    assert wrapper.load_state_dict(twin.state_dict()) == ([], [])
