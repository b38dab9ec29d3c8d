# SPDX-License-Identifier: Apache-2.0
"""Activated LoRA: the adapter acts on the tokens from its last invocation on.

The oracle is the base model in float64 with a hook on each linear layer that adds the textbook
delta to the tokens that a search in Python finds; it has no cache.
"""

import copy
import pickle

import pytest
import torch
from helpers.models import gpt2, llama, t5
from torch import nn

import peft
from peft import LoraConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True`", "ignore:fan_in_fan_out")

INVOCATION = [5, 6]
# An invocation in the middle, one that comes twice, none, one at the end, padding on the left.
IDS = torch.tensor(
    [
        [9, 5, 6, 7, 8, 9, 10, 11],
        [5, 6, 7, 8, 5, 6, 9, 12],
        [9, 8, 7, 6, 5, 9, 8, 7],
        [9, 8, 7, 5, 8, 9, 5, 6],
        [0, 0, 0, 9, 5, 6, 11, 12],
    ]
)
MASK = (IDS != 0).long()


def activated(base=None, targets=("q_proj", "v_proj", "down_proj"), name="default", **options):
    torch.manual_seed(0)
    options = {"alora_invocation_tokens": INVOCATION, "init_lora_weights": False, "r": 2, **options}
    config = LoraConfig(target_modules=list(targets), **options)
    base = llama() if base is None else base
    return get_peft_model(base.double(), config, name, autocast_adapter_dtype=False).eval()


def start(row, invocation):
    """Where the last invocation begins in a list of ids, by search; None without one."""
    k = len(invocation)
    found = [i for i in range(len(row) - k + 1) if row[i : i + k] == invocation]
    return found[-1] if found else None


def oracle(model, ids, mask=None, starts=None, adapters=None):
    """The logits of the base model with hooks, without a cache."""
    plain, handles = copy.deepcopy(model).unload(), []
    adapters = adapters or ["default"] * len(ids)
    configs = model.peft_config
    if starts is None:
        starts = [
            0
            if name in configs and configs[name].alora_invocation_tokens is None
            else start(row, configs[name].alora_invocation_tokens)
            if name in configs
            else None
            for row, name in zip(ids.tolist(), adapters, strict=True)
        ]
    for path, layer in model.base_model.named_tuner_layers():

        def add(module, args, output, layer=layer):
            output = output.clone()
            for i, (first, name) in enumerate(zip(starts, adapters, strict=True)):
                if first is not None:
                    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
                    # A head may be asked for the last tokens only.
                    first = max(first - (ids.shape[1] - output.shape[1]), 0)
                    delta = args[0][i, first:] @ A.T @ B.T * layer.scaling[name]
                    output[i, first:] += delta
            return output

        handles.append(plain.get_submodule(path).register_forward_hook(add))
    return plain(input_ids=ids, attention_mask=mask).logits


def logits_of(generated):
    return torch.stack(generated.logits, 1)  # in single precision, as `generate` returns them


@pytest.mark.parametrize(
    ("make", "targets"),
    [(llama, ("q_proj", "v_proj", "down_proj", "lm_head")), (gpt2, ("c_attn", "mlp.c_proj"))],
)
def test_the_adapter_acts_from_the_last_invocation_on(make, targets):
    model = activated(make(), targets)
    found = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found, oracle(model, IDS, MASK))
    with model.disable_adapter():
        plain = model(input_ids=IDS, attention_mask=MASK).logits
    same = (found == plain).all(-1)
    assert same.sum(1).tolist() == [1, 4, 8, 6, 4]
    last = model(input_ids=IDS, attention_mask=MASK, logits_to_keep=3).logits
    torch.testing.assert_close(last, found[:, -3:])


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"lora_dropout": 0.5}])
def test_training_reaches_active_tokens_only(options):
    model = activated(**options).train()
    torch.manual_seed(1)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    own = [p for n, p in model.named_parameters() if "lora_" in n]
    assert all(p.grad.abs().sum() > 0 for p in own)
    if not options:
        logits = oracle(model, IDS)[:, :-1]
        expected = nn.functional.cross_entropy(logits.flatten(0, 1).float(), IDS[:, 1:].flatten())
        for parameter, gradient in zip(own, torch.autograd.grad(expected, own), strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
    # A text without an invocation leaves no gradient at all.
    model.zero_grad()
    model(input_ids=IDS[2:3], labels=IDS[2:3]).loss.backward()
    assert all(p.grad.abs().sum() == 0 for p in own)


def test_gradient_checkpointing_computes_the_same():
    gradients = []
    for checkpoints in (False, True):
        model = activated().train()
        if checkpoints:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        gradients.append([p.grad for n, p in model.named_parameters() if "lora_" in n])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}],
)
def test_generate(options):
    model = activated(targets=("q_proj", "v_proj", "lm_head"))
    made = model.generate(
        input_ids=IDS,
        attention_mask=MASK,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        disable_compile=True,
        **options,
    )
    ids = made.sequences
    mask = torch.cat([MASK, torch.ones(5, 4, dtype=torch.long)], 1)
    starts = [start(row, INVOCATION) for row in IDS.tolist()]
    expected = oracle(model, ids, mask, starts)[:, 7:-1]
    torch.testing.assert_close(logits_of(made), expected.float())


def test_beams_have_the_state_of_their_sample():
    model = activated()
    made = model.generate(
        input_ids=IDS[:3],
        max_new_tokens=3,
        num_beams=2,
        num_return_sequences=2,
        output_scores=True,
        return_dict_in_generate=True,
    )
    starts = [start(row, INVOCATION) for row in IDS[:3].tolist() for _ in range(2)]
    scores = oracle(model, made.sequences, None, starts)[:, 7:-1].log_softmax(-1)
    scores = scores.gather(2, made.sequences[:, 8:, None]).sum((1, 2))
    torch.testing.assert_close(made.sequences_scores, scores.float() / 3)


def test_the_cache_of_the_base_model_stays_valid():
    """The base model reads the prompt; two activated adapters and a loop go on from its cache."""
    model = activated()
    model.add_adapter(
        "other",
        LoraConfig(
            target_modules=["q_proj", "v_proj"],
            alora_invocation_tokens=[11],
            init_lora_weights=False,
        ),
    )
    prompt = torch.tensor([[9, 8, 7, 10], [10, 7, 8, 9]])
    with model.disable_adapter():
        cache = model(input_ids=prompt, use_cache=True).past_key_values
    for name, words in (("default", INVOCATION), ("other", [11, 12])):
        model.set_adapter(name)
        ids = torch.cat([prompt, torch.tensor([words, words])], 1)
        options = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
        shared = model.generate(input_ids=ids, past_key_values=copy.deepcopy(cache), **options)
        alone = model.generate(input_ids=ids, **options)
        torch.testing.assert_close(logits_of(shared), logits_of(alone))
        assert shared.sequences.tolist() == alone.sequences.tolist()
        # A loop of one's own: each step has one token, and the cache tells that it is active.
        own, logits = copy.deepcopy(cache), []
        for part in (ids[:, 4:], alone.sequences[:, 6:7], alone.sequences[:, 7:8]):
            logits.append(model(input_ids=part, past_key_values=own).logits[:, -1].float())
        torch.testing.assert_close(torch.stack(logits, 1), logits_of(alone))
        # Cropped to the prompt, the cache is the base model's again.
        own.crop(-4)
        found = model(input_ids=torch.full((2, 1), 30), past_key_values=own).logits
        with model.disable_adapter():
            copied = copy.deepcopy(cache)
            plain = model(input_ids=torch.full((2, 1), 30), past_key_values=copied).logits
        torch.testing.assert_close(found, plain)


def test_each_sample_with_its_own_adapter():
    model = activated(name="one")
    model.add_adapter("two", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    three = LoraConfig(
        target_modules=["q_proj", "v_proj", "down_proj"],
        alora_invocation_tokens=[8],
        init_lora_weights=False,
    )
    model.add_adapter("three", three)
    model.double()
    names = ["one", "three", "__base__", "two", "one"]
    adapted = oracle_by_layer(model, IDS, MASK, names)
    found = model(input_ids=IDS, attention_mask=MASK, adapter_names=names).logits
    torch.testing.assert_close(found, adapted)
    made = model.generate(
        input_ids=IDS,
        attention_mask=MASK,
        adapter_names=names,
        max_new_tokens=3,
        num_beams=2,
        num_return_sequences=1,
    )
    for i, name in enumerate(names):
        own = IDS[i : i + 1, MASK[i].argmax() :]
        options = {"max_new_tokens": 3, "num_beams": 2, "adapter_names": [name]}
        assert made[i, -3:].tolist() == model.generate(input_ids=own, **options)[0, -3:].tolist()


def oracle_by_layer(model, ids, mask, names):
    """One row at a time: each sample alone with its adapter active."""
    rows = []
    for i, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else _active(model, name):
            rows.append(model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits)
    return torch.cat(rows)


class _active:
    def __init__(self, model, name):
        self.model, self.name = model, name

    def __enter__(self):
        self.model.set_adapter(self.name)

    def __exit__(self, *error):
        pass


def test_texts_packed_into_a_row():
    model = activated()
    texts = [IDS[0, :6], IDS[2, :4], IDS[1]]
    row = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    layer, places = next(model.base_model.tuner_layers()), []
    layer.register_forward_hook(
        lambda module, args, out: places.append((out != module.base_layer(*args)).any(-1)[0])
    )
    model(input_ids=row, position_ids=positions, use_cache=False)
    assert places[0].tolist() == [False, *[True] * 5, *[False] * 8, *[True] * 4]


def test_offsets_in_place_of_a_search():
    model = activated()
    offsets = [3, None, 8, 0, 1]
    found = model(input_ids=IDS, alora_offsets=offsets).logits
    starts = [8 - n if n else None for n in offsets]
    torch.testing.assert_close(found, oracle(model, IDS, None, starts))
    embedded = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(
        model(inputs_embeds=embedded, alora_offsets=torch.tensor([3, 0, 8, 0, 1])).logits, found
    )
    with pytest.warns(UserWarning, match="Cannot calculate aLoRA offsets when only inputs_embeds"):
        plain = model(inputs_embeds=embedded).logits
    torch.testing.assert_close(plain, oracle(model, IDS, None, [None] * 5))
    for wrong, error in (([1], ValueError), ([1, 1, 1, 1, -1], ValueError), ("ab", TypeError)):
        with pytest.raises(error, match="`alora_offsets`="):
            model(input_ids=IDS, alora_offsets=wrong)


def test_saved_copied_and_injected_adapters(tmp_path):
    model = activated()
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path, autocast_adapter_dtype=False)
    assert loaded.peft_config["default"].alora_invocation_tokens == INVOCATION
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(input_ids=IDS).logits, expected)
    torch.manual_seed(0)
    native = llama().double()
    native.load_adapter(tmp_path)
    torch.testing.assert_close(native(input_ids=IDS).logits, expected)
    native.delete_adapter("default")
    plain = model.unload()
    assert "forward" not in vars(plain) and "generate" not in vars(plain)
    torch.testing.assert_close(native(input_ids=IDS).logits, plain(input_ids=IDS).logits)


@pytest.mark.compile
def test_a_compiled_model():
    model = activated()
    expected = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = compiled(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    torch.testing.assert_close(found, expected)


def test_what_is_refused():
    model = activated()
    for refused in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="aLoRA does not support merging"):
            refused()
    assert not model.supports_lora_conversion()
    with pytest.raises(NotImplementedError, match="a plain LoRA acts on all tokens"):
        peft.convert_to_lora(model)
    plain = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=2)
    model.add_adapter("plain", plain)
    with pytest.raises(ValueError, match="act on different tokens"):
        model.add_weighted_adapter(["default", "plain"], [0.5, 0.5], "both", "linear")
    with pytest.raises(NotImplementedError, match="`guidance_scale`"):
        model.generate(input_ids=IDS, guidance_scale=2.0, max_new_tokens=1)
    with pytest.raises(NotImplementedError, match="for models that continue their input"):
        activated(t5(), ("q",))
    conv = nn.Sequential(nn.Conv1d(2, 2, 1))
    with pytest.raises(ValueError, match="not for convolutions"):
        activated(conv, ("0",))
    for options, message in (
        ({"alora_invocation_tokens": "ab"}, "must be a list of token ids"),
        ({"alora_invocation_tokens": ["a"]}, "must be a list of token ids"),
        ({"alora_invocation_tokens": [1], "use_dora": True}, "together with `use_dora`"),
        ({"alora_invocation_tokens": [1], "init_lora_weights": "pissa"}, "leave the base weight"),
    ):
        with pytest.raises(ValueError, match=message):
            LoraConfig(**options)


def test_the_interface_has_functions_for_offsets():
    from peft.tuners.lora.variants import (
        calculate_alora_offsets,
        get_alora_offsets_for_forward,
        get_alora_offsets_for_generate,
    )

    model = activated()
    configs = {**model.peft_config, "plain": LoraConfig()}
    assert calculate_alora_offsets(configs, "default", IDS) == [7, 4, None, 2, 4]
    assert calculate_alora_offsets(configs, "plain", IDS) == [None] * 5
    names = ["default", "plain", "default", "__base__", "default"]
    assert calculate_alora_offsets(configs, "default", IDS, names) == [7, None, None, None, 4]
    found = get_alora_offsets_for_forward(model, IDS)
    assert found["alora_offsets"] == [7, 4, None, 2, 4]
    assert get_alora_offsets_for_generate(model, input_ids=IDS)["alora_offsets"][0] == 7
    with pytest.warns(UserWarning, match="during generate"):
        none = get_alora_offsets_for_generate(model, inputs_embeds=torch.zeros(1, 2, 16))
    assert none.get("alora_offsets") is None
    assert "alora_offsets" in model.special_peft_forward_args
    assert peft.get_layer_status(model)[0].enabled
