# SPDX-License-Identifier: Apache-2.0
"""Every method on parameters: a stack of experts computes what as many linear layers compute."""

import copy
import itertools

import pytest
import torch
from helpers.experts import TARGETS, Outer, mixture, tokens, with_deltas
from torch import nn

import peft
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

CONFIGS = {
    "lora": peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False),
    "loha": peft.LoHaConfig(r=2, alpha=3, init_weights=False),
    "loha, dense": peft.LoHaConfig(r=4, alpha=3, init_weights=False),
    "lokr": peft.LoKrConfig(r=2, alpha=3, init_weights=False),
    "lokr, all low": peft.LoKrConfig(
        r=1, alpha=3, decompose_both=True, use_scalar=True, init_weights=False
    ),
    "lokr, full": peft.LoKrConfig(full_matrix=True, decompose_factor=4, init_weights=False),
    "vblora": peft.VBLoRAConfig(r=2, num_vectors=9, vector_length=4),
    "vblora, gate": peft.VBLoRAConfig(
        r=2, num_vectors=9, vector_length=5, pad_last_tile=True, output_gate=True
    ),
    "poly": peft.PolyConfig(r=2, n_tasks=3, n_skills=2, alpha=4, init_weights=False),
    "poly, splits": peft.PolyConfig(
        r=2, n_tasks=3, n_skills=3, n_splits=2, alpha=4, task_rank=2, init_weights=False
    ),
}
# Stored `[experts, out, in]`, `[experts, in, out]`, and read by a function of its own.
KINDS = ["mixtral", "gpt_oss", "mixtral", "gpt_oss", "llama4"]
EXACT = {"rtol": 1e-9, "atol": 1e-9}
ROUNDED = {"rtol": 1e-4, "atol": 1e-5}


def adapted(base, name, targets=TARGETS, adapter="default", **options):
    config = copy.deepcopy(CONFIGS[name])
    vars(config).update(target_parameters=targets, target_modules=[], **options)
    torch.manual_seed(3)
    model = get_peft_model(base, config, adapter)
    spread(model)
    return model


def spread(model):
    """Move parameters away from starts that have no effect, and gates away from equal weights."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.split(".")[-1] not in ("weight",) and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def wrappers(model):
    return [layer for layer in model.modules() if hasattr(layer, "parameter_name")]


def of_one_expert(layer, e, adapter="default"):
    """Tensors of one expert by container, from the layouts that the classes document."""
    E, found = layer.num_experts, {}
    kind = type(layer).__module__.split(".")[-2]
    for name in layer.container_names:
        if adapter not in (container := getattr(layer, name)):
            continue
        entry = container[adapter]
        if isinstance(entry, nn.Module) and kind != "lora":
            continue
        tensor = entry.weight if kind == "lora" else entry
        if not layer.is_stacked:
            found[name] = tensor
        elif kind == "lora":
            r = layer.r[adapter]
            found[name] = tensor[e * r : (e + 1) * r] if name == "lora_A" else tensor[:, e::E]
        elif kind in ("loha", "lokr"):
            found[name] = tensor[e]
        elif name != "vblora_gate":
            dim = {"vblora_logits_A": 0, "vblora_logits_B": 1, "poly_lora_A": 3, "poly_lora_B": 2}
            found[name] = tensor.unflatten(dim[name], (E, -1)).select(dim[name], e)
        else:
            found[name] = tensor
    return found


def textbook(layer, task=None, adapter="default"):
    """The delta of a parameter from the papers' formulas, one expert after the other."""
    kind = type(layer).__module__.split(".")[-2]
    deltas = [
        FORMULAS[kind](layer, of_one_expert(layer, e, adapter), e, task, adapter)
        for e in range(layer.num_experts)
    ]
    turned = layer.is_stacked and getattr(layer.get_base_layer(), "is_transposed", False)
    deltas = [delta.T if turned else delta for delta in deltas]
    return torch.stack(deltas) if layer.is_stacked else deltas[0]


def lora(layer, own, e, task, adapter):
    return own["lora_B"] @ own["lora_A"] * 3 / 2


def loha(layer, own, e, task, adapter):
    one, two = (own[f"hada_w{i}_a"] @ own[f"hada_w{i}_b"] for i in (1, 2))
    return one * two * 3 / own["hada_w1_a"].shape[1]


def lokr(layer, own, e, task, adapter):
    W1 = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    W2 = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
    full = layer.full_matrix[adapter]
    scale = 1 if full else 3 / layer.r[adapter]
    return torch.kron(W1, W2) * scale * own.get("lokr_scalar", 1)


def vblora(layer, own, e, task, adapter):
    bank = layer.bank(adapter)

    def tile(logits):
        values, chosen = logits.topk(2)
        return (values.softmax(0)[:, None] * bank[chosen]).sum(0)

    A = torch.stack([torch.cat([tile(t) for t in row]) for row in own["vblora_logits_A"]])
    B = torch.cat([torch.stack([tile(t) for t in tiles], 1) for tiles in own["vblora_logits_B"]])
    delta = B[: layer.out_features] @ A[:, : layer.in_features]
    return delta * own.get("vblora_gate", 1)


def poly(layer, own, e, task, adapter):
    A, B = own["poly_lora_A"], own["poly_lora_B"]
    gates = layer.router(adapter).module_logits[task].view(A.shape[:2]).sigmoid()
    w = gates / gates.sum(1, keepdim=True)
    q_s = [(q, range(A.shape[1])) for q in range(A.shape[0])]
    A_w = torch.cat([sum(w[q, s] * A[q, s] for s in skills) for q, skills in q_s])
    B_w = torch.cat([sum(w[q, s] * B[q, s] for s in skills) for q, skills in q_s], 1)
    delta = A_w @ B_w * 4 / 2
    if adapter in layer.poly_task_skills:
        skills = layer.poly_task_skills[adapter]
        left, right = skills.A.values[task], skills.B.values[task]
        own_A = left.unflatten(1, (layer.num_experts, -1))[:, e]
        own_B = right.unflatten(0, (layer.num_experts, -1))[e]
        delta = delta + own_A @ own_B * 4 / 2
    return delta.T


FORMULAS = {"lora": lora, "loha": loha, "lokr": lokr, "vblora": vblora, "poly": poly}


def textbook_deltas(model, task=None, adapter="default"):
    """The deltas of a whole model by the plain model's names of parameters."""
    found = {}
    for path, layer in model.base_model.model.named_modules():
        if hasattr(layer, "parameter_name") and adapter in layer.scaling:
            owner = ".".join(part for part in path.split(".") if part != "base_layer")
            found[f"{owner}.{layer.parameter_name}"] = textbook(layer, task, adapter)
    return found


def arguments(name, task=1):
    return {"task_ids": [task] * 3} if name.startswith("poly") else {}


@pytest.mark.parametrize(("name", "kind"), zip(CONFIGS, itertools.cycle(KINDS), strict=False))
def test_outputs_and_gradients_are_those_of_the_formula(name, kind):
    base, ids = mixture(kind, dtype=torch.float64, num_hidden_layers=1), tokens()
    model = adapted(copy.deepcopy(base), name).eval()
    found = model(input_ids=ids, **arguments(name)).logits
    expected = with_deltas(base, textbook_deltas(model, 1), input_ids=ids)
    assert (found - base(ids).logits).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, **EXACT)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn(found.shape, dtype=found.dtype)
    wanted = torch.autograd.grad((expected * weights).sum(), trained, allow_unused=True)
    got = torch.autograd.grad((found * weights).sum(), trained, allow_unused=True)
    for own, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(own, torch.zeros_like(own) if other is None else other, **EXACT)
    assert any(gradient.abs().max() > 0 for gradient in got)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_module_that_reads_parameters_in_its_own_way(name):
    base, x = Outer(inner=6, outer=10, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    options = {"vector_length": 2, "pad_last_tile": False} if name.startswith("vb") else {}
    model = adapted(copy.deepcopy(base), name, ["up", "first.weight"], **options).eval()
    parameters = dict(base.named_parameters())
    for key, delta in textbook_deltas(model, 1).items():
        parameters[key] = parameters[key] + delta
    expected = torch.func.functional_call(base, parameters, (x,))
    torch.testing.assert_close(model(x, **arguments(name)), expected, **EXACT)


@pytest.mark.parametrize("name", CONFIGS)
def test_merging_saving_and_loading(name, tmp_path):
    base, ids = mixture("qwen3_moe", num_hidden_layers=1), tokens()
    model = adapted(copy.deepcopy(base), name).eval()
    expected = model(ids, **arguments(name)).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(ids, **arguments(name)).logits, expected, **ROUNDED)
    before = {key: p.clone() for key, p in model.named_parameters()}
    task = {"task_id": 1} if name.startswith("poly") else {}
    model.merge_adapter(**task)
    torch.testing.assert_close(model(ids, **arguments(name)).logits, expected, **ROUNDED)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    plain = model.merge_and_unload(**task)
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    torch.testing.assert_close(plain(ids).logits, expected, **ROUNDED)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", ["lora", "lokr", "vblora", "poly, splits"])
def test_each_token_has_its_samples_adapter(name, implementation):
    dtype = torch.float64 if implementation == "eager" else torch.float32
    base, ids = mixture("mixtral", implementation, dtype, num_hidden_layers=1), tokens()
    model = adapted(copy.deepcopy(base), name).eval()
    other = copy.deepcopy(model.peft_config["default"])
    other.target_parameters = ["down_proj"]
    model.add_adapter("other", other)
    spread(model)
    names = ["other", "__base__", "default"]
    found = model(ids, adapter_names=names, **arguments(name)).logits
    for i, own in enumerate(names):
        deltas = {} if own == "__base__" else textbook_deltas(model, 1, own)
        expected = with_deltas(base, deltas, input_ids=ids[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], expected, **ROUNDED)


def test_each_token_has_its_samples_task():
    base, ids = mixture("deepseek_v3", dtype=torch.float64, num_hidden_layers=1), tokens(4)
    for name in ("poly", "poly, splits"):
        model = adapted(copy.deepcopy(base), name).eval()
        tasks = [2, 0, 1, 2]
        found = model(ids, task_ids=tasks).logits
        for i, task in enumerate(tasks):
            deltas = textbook_deltas(model, task)
            expected = with_deltas(base, deltas, input_ids=ids[i : i + 1])
            torch.testing.assert_close(found[i : i + 1], expected, **ROUNDED)
        generated = model.generate(input_ids=ids, task_ids=tasks, max_new_tokens=3, do_sample=False)
        for i, task in enumerate(tasks):
            alone = model.generate(
                input_ids=ids[i : i + 1], task_ids=[task], max_new_tokens=3, do_sample=False
            )
            assert torch.equal(generated[i : i + 1], alone)


def test_modules_that_read_a_parameter_once_take_one_adapter_and_task():
    model = adapted(Outer(), "lora", ["up"]).eval()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    with pytest.raises(ValueError, match="does not support mixed adapter batches.*Loop reads `up`"):
        model(torch.randn(2, 6), adapter_names=["default", "other"])
    alone = model(torch.randn(2, 6), adapter_names=["other", "other"])
    assert alone.shape == (2, 4)
    poly = adapted(Outer(), "poly", ["up"]).eval()
    with pytest.raises(ValueError, match="Give all samples of a call the same task"):
        poly(torch.randn(2, 6), task_ids=[0, 1])


@pytest.mark.parametrize("name", ["loha", "lokr, all low", "vblora", "poly, splits"])
def test_training(name):
    options = {"rank_dropout": 0.5} if name[:2] == "lo" else {}
    model = adapted(mixture("mixtral", num_hidden_layers=1), name, **options).train()
    one, two = (model(tokens(), **arguments(name)).logits for _ in range(2))
    assert torch.equal(one, two) == (name == "vblora")  # it has neither dropout nor gates here
    (one.sum() + two.sum()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoKrConfig(weight_decompose=True), "`weight_decompose` is for modules"),
        (peft.VBLoRAConfig(num_vectors=9, vector_length=5), "must be divisible by `vector_length`"),
        (peft.PolyConfig(poly_type="mope"), "sees no input to route by"),
        (peft.PolyConfig(n_splits=5), "is not divisible by `n_splits`"),
    ],
)
def test_options_that_parameters_do_not_have(config, message):
    base = mixture("mixtral", num_hidden_layers=1)
    config.target_parameters, config.target_modules = TARGETS, []
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        ("lora", "gpt_oss", torch.bfloat16),
        ("poly", "mixtral", torch.float32),
    ],
)
def test_compiling_breaks_no_graph(name, kind, dtype):
    torch._dynamo.reset()
    base, ids = mixture(kind, "grouped_mm", dtype, num_hidden_layers=1), tokens()
    model = adapted(base, name).eval()
    expected = model(ids, **arguments(name)).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    limits = ROUNDED if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(compiled(ids, **arguments(name)).logits, expected, **limits)


@pytest.mark.parametrize("name", ["poly", "poly, splits"])
def test_tasks_and_skills_of_experts(name):
    base, ids = mixture("mixtral", dtype=torch.float64, num_hidden_layers=1), tokens()
    model = adapted(base, name, task_names=["a", "b", "c"]).eval()
    expected = model(ids, task_ids=["a", "b", "c"]).logits
    model.add_tasks(["d"])
    model.add_skills(2)
    found = model(ids, task_ids=["a", "b", "c"]).logits
    torch.testing.assert_close(found, expected, **ROUNDED)
    model.extract_tasks("some", ["c", "b"])
    model.set_adapter("some")
    found = model(ids, task_ids=["b", "b", "c"]).logits
    torch.testing.assert_close(found[1:], expected[1:], **ROUNDED)
    model.set_adapter("default")
    if name == "poly":
        model.extract_tasks("one", {"b": 1.0})
        model.set_adapter("one")
        torch.testing.assert_close(model(ids).logits[1], expected[1], **ROUNDED)
    else:
        with pytest.raises(NotImplementedError, match="can't be taken out of a stack"):
            model.extract_tasks("one", {"b": 1.0})


def test_two_methods_on_one_parameter():
    base, ids = mixture("mixtral", dtype=torch.float64, num_hidden_layers=1), tokens()
    config = copy.deepcopy(CONFIGS["lora"])
    vars(config).update(target_parameters=TARGETS, target_modules=[])
    model = get_peft_model(copy.deepcopy(base), config, "a", mixed=True)
    other = copy.deepcopy(CONFIGS["lokr"])
    vars(other).update(target_parameters=["down_proj"], target_modules=[])
    model.add_adapter("b", other)
    spread(model)
    model.set_adapter(["a", "b"])
    a, b = (textbook_deltas(model, adapter=name) for name in "ab")
    expected = with_deltas(base, {key: a[key] + b.get(key, 0) for key in a}, input_ids=ids)
    torch.testing.assert_close(model(ids).logits, expected, **EXACT)
    before = {key: p.clone() for key, p in model.named_parameters()}
    model.merge_adapter(["b"])
    model.merge_adapter(["a"])
    torch.testing.assert_close(model(ids).logits, expected, **EXACT)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    assert torch.equal(model.unload()(ids).logits, base(ids).logits)
