# SPDX-License-Identifier: Apache-2.0
"""Routed models do all that models do: generate with caches and beams, train, compile."""

import pytest
import torch
from helpers import models
from helpers.routed import saved_adapters

import peft

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "t5": ["q", "wo"]}
IDS = torch.tensor([[3, 3, 3, 20, 31, 7], [11, 40, 9, 33, 5, 22]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def base(kind):
    torch.manual_seed(0)
    model = getattr(models, kind)()
    with torch.no_grad():  # so that adapters change the output
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    methods = ["LOKR", "LORA", "POLY"]
    folder = tmp_path_factory.mktemp("libraries")
    return {
        kind: saved_adapters(base(kind), folder / kind, targets, methods)[0]
        for kind, targets in TARGETS.items()
    }


def routed(libraries, kind, **options):
    model = peft.get_routed_model(base(kind), libraries[kind], **options).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for layer in model.base_model.tuner_layers():
            for parameter in layer.routed_gate.parameters():
                parameter.normal_()
    return model


@pytest.mark.parametrize("level", ["token", "sample", "sequence"])
@pytest.mark.parametrize("kind", TARGETS)
def test_cached_decoding_agrees_with_whole_prompts(libraries, kind, level):
    model = routed(libraries, kind, routing="input", routing_level=level, top_k=2, temperature=0.3)
    for beams in (1, 3):
        options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
        found = model.generate(input_ids=IDS, attention_mask=MASK, **options)
        plain = model.generate(input_ids=IDS, attention_mask=MASK, use_cache=False, **options)
        assert torch.equal(found, plain)
        alone = model.generate(input_ids=IDS[:1, 3:], **options)
        start = 0 if kind == "t5" else 3
        assert torch.equal(found[0, start:], alone[0])
    with model.disable_adapter():
        off = model.generate(input_ids=IDS, attention_mask=MASK, **options)
    assert found.shape != off.shape or not torch.equal(found, off)


def test_task_names_in_generate(libraries):
    model = routed(libraries, "llama", routing="task")
    found = model(input_ids=IDS, attention_mask=MASK, task_ids=["LOKR", "POLY.task_1"]).logits
    for row, name in enumerate(["LOKR", "POLY.task_1"]):
        own = peft.PeftModel.from_pretrained(base("llama"), libraries["llama"][name.split(".")[0]])
        task = {"task_ids": 1} if "." in name else {}
        right = own(input_ids=IDS[row : row + 1], attention_mask=MASK[row : row + 1], **task).logits
        torch.testing.assert_close(found[row : row + 1], right)
    out = model.generate(input_ids=IDS, task_ids=["LOKR", "LORA"], max_new_tokens=2)
    assert out.shape == (2, 8)


def test_the_answer_routes_a_sequence_and_not_a_sample(libraries):
    labels = IDS.clone()
    labels[:, :4] = -100
    for level in ("sample", "sequence"):
        options = {"routing": "input", "routing_level": level, "temperature": 0.1}
        model = routed(libraries, "llama", **options)
        found = model(input_ids=IDS, attention_mask=MASK, labels=labels).logits
        prompt = torch.where(labels == -100, MASK, 0) if level == "sample" else MASK
        right = model(input_ids=IDS, attention_mask=MASK, routing_mask=prompt).logits
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("routing", ["phatgoose", "input", "learned"])
def test_gradients_with_checkpointing(libraries, routing):
    call = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    call |= {"task_ids": ["LORA", "LOKR"]} if routing == "phatgoose" else {}
    found = []
    for checkpointing in (False, True):
        level = {"routing_level": "sample", "top_k": 2} if routing == "input" else {}
        model = routed(libraries, "llama", routing=routing, **level).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**call).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert all("routed_" in name for name in found[-1])
    assert found[0].keys() == found[1].keys() and len(found[0]) == 4
    for name, gradient in found[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(found[1][name], gradient)


def test_transformers_loads_a_routed_adapter_by_itself(libraries, tmp_path):
    base("llama").save_pretrained(tmp_path / "base")
    own = models.llama().from_pretrained(tmp_path / "base")
    model = peft.get_routed_model(own, libraries["llama"], top_k=2, task_type="CAUSAL_LM").eval()
    model.save_pretrained(tmp_path / "routed")
    right = model(input_ids=IDS).logits
    native = models.llama().from_pretrained(tmp_path / "base")
    native.load_adapter(str(tmp_path / "routed"))
    torch.testing.assert_close(native.eval()(input_ids=IDS).logits, right)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "routed")
    torch.testing.assert_close(auto.eval()(input_ids=IDS).logits, right)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(libraries, autocast):
    full = routed(libraries, "llama", routing="arrow", top_k=2)
    model = peft.get_routed_model(
        base("llama").bfloat16(), libraries["llama"], top_k=2, autocast_adapter_dtype=autocast
    ).eval()
    layer = next(model.base_model.tuner_layers())
    expected = torch.float32 if autocast else torch.bfloat16
    assert layer.factors("default").down.dtype == expected
    logits = model(input_ids=IDS).logits
    assert logits.dtype == torch.bfloat16
    right = full(input_ids=IDS).logits
    assert (logits.float() - right).abs().mean() < 0.3 * right.abs().mean()


def test_a_trainer_trains_gates(libraries, tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": IDS[i], "labels": IDS[i], "task_ids": 1 + i} for i in (0, 1)]
    model = routed(libraries, "llama", routing="phatgoose", top_k=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        learning_rate=0.1, save_steps=2,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows * 2).train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("routed_gate" in name for name in changed)
    again = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "checkpoint-2")
    torch.testing.assert_close(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


@pytest.mark.compile
def test_compiled_as_one_graph(libraries):
    model = routed(libraries, "llama", routing="arrow", top_k=2)
    right = model(input_ids=IDS, attention_mask=MASK).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found, right)
