# SPDX-License-Identifier: Apache-2.0
"""Which tensors belong to an adapter, and their keys: tables written by hand."""

from types import SimpleNamespace

import pytest
from helpers.adapted import adapted
from helpers.experts import mixture
from helpers.models import llama
from torch import nn

from peft import LoraConfig, VBLoRAConfig, get_peft_model
from peft.base.errors import PeftValueError
from peft.checkpoint.format import ModuleShape
from peft.checkpoint.fused_modules import FusedModule, fused_modules, stacks_rows
from peft.checkpoint.key_groups import group_keys, module_shapes
from peft.checkpoint.keys import (
    adapter_config,
    adapter_tensors,
    checkpoint_key,
    checkpoint_keys,
    companion_tensors,
    in_view,
    is_embedding,
    tied_embeddings,
)
from peft.checkpoint.renamed_modules import ModuleNames, plain_modules, plain_path, split_key

FACTORS = ["lora_A", "lora_B"]
# By the name in the model, the key of adapter "x" whose layers share "bank".
KEYS = {
    "m.q.lora_A.x.weight": "m.q.lora_A.weight",
    "m.q.lora_B.x": "m.q.lora_B",
    "lora_B.x": "lora_B",
    "m.x.lora_A.x.weight": "m.x.lora_A.weight",  # in a module of the adapter's name
    "m.x.q.lora_A.y.weight": None,
    "m.q.lora_A.xx.weight": None,
    "m.q.lora_A.weight": None,
    "m.q.lora_C.x.weight": None,
    "m.q.base_layer.lora_A.x.weight": "m.q.lora_A.weight",
    "m.q.base_layer.base_layer.lora_B.x": "m.q.lora_B",
    "m.head.modules_to_save.x.out.weight": "m.head.out.weight",
    "bank.x": "bank",
    "m.q.bank.x": "bank",
    "base_model.m.bank.x": "base_model.bank",
}


def test_a_key_is_the_name_without_that_of_the_adapter():
    for name, key in KEYS.items():
        assert checkpoint_key(name, "x", FACTORS, ["bank"]) == key, name


def test_layers_around_one_module_are_told_apart():
    """By how many of the adapter's own layers are around them, those of others do not count."""
    levels = {"": "", ".base_layer": ".base_layer", ".base_layer" * 3: ".base_layer" * 2}
    expected = {
        f"m.experts{name}.lora_{c}.x": f"m.experts{key}.lora_{c}"
        for name, key in levels.items()
        for c in "AB"
    }
    expected |= {
        "m.other.base_layer.lora_A.x.weight": "m.other.lora_A.weight",
        "m.head.modules_to_save.x.weight": "m.head.weight",
    }
    assert checkpoint_keys([*expected, "m.experts.lora_A.y"], "x", FACTORS, []) == expected


NAMES = {
    "base_model.model.a.base_layer.weight": None,
    "base_model.model.a.base_layer.bias": "layers",
    "base_model.model.a.lora_A.x.weight": "own",
    "base_model.model.a.lora_B.x.weight": "own",
    "base_model.model.a.lora_B.x.bias": "own",
    "base_model.model.a.lora_A.y.weight": None,
    "base_model.model.b.base_layer.bias": "layers",  # which "y" alone adapts
    "base_model.model.b.lora_B.y.bias": None,
    "base_model.model.c.bias": "all",
    "base_model.model.c.bias_scale": None,
    "base_model.model.head.original_module.bias": None,
    "base_model.model.head.modules_to_save.x.bias": "beside",
    "base_model.model.head.modules_to_save.y.bias": None,
    "base_model.model.e.token_adapter.trainable_tokens_delta.x": "beside",
    "base_model.model.e.token_adapter.base_layer.bias": "layers",
    "base_model.model.f.token_adapter.trainable_tokens_delta.y": None,
    "base_model.model.f.token_adapter.base_layer.bias": "layers",
    "base_model.model.embed_tokens.weight": "embedding",
    "base_model.model.lm_head.base_layer.weight": "head",
}


def keys(*kinds):
    parts = (".modules_to_save.x", ".lora_A.x", ".lora_B.x", "_delta.x")
    found = [name for name, kind in NAMES.items() if kind in kinds]
    for other in (".b.base_layer", ".f.token_adapter.base_layer"):  # of "y"
        found = [name.replace(other, other[:2]) for name in found]
    for part in parts:
        plain = part.removesuffix(".x").removeprefix(".modules_to_save")
        found = [name.replace(part, plain) for name in found]
    return set(found)


def of(config, *embeddings):
    return set(adapter_tensors(zip(NAMES, NAMES, strict=True), config, "x", *embeddings))


@pytest.mark.parametrize(
    ("bias", "kinds"),
    [("none", ()), ("lora_only", ("layers",)), ("all", ("layers", "all"))],
)
def test_trained_biases_are_of_the_layers_or_of_all(bias, kinds):
    config = LoraConfig(bias=bias)
    assert of(config) == keys("own", "beside", *kinds)
    companions = companion_tensors(zip(NAMES, NAMES, strict=True), config, "x")
    assert set(companions) == keys("beside", *kinds)
    # Layers without the adapter have nothing of it, but for biases.
    assert in_view(config, "x") == (("x",) if bias == "none" else None)


def test_embeddings_come_as_asked():
    plain, table = keys("own", "beside"), keys("embedding")
    assert of(LoraConfig()) == of(LoraConfig(), False) == plain
    assert of(LoraConfig(), True) == plain | table | keys("head")
    assert of(LoraConfig(), {*table, "base_model.model.c.bias"}) == plain | table


def test_wrappers_leave_no_trace_in_keys():
    name = "base_model.model._fsdp_wrapped_module.a.lora_A.x.weight"
    assert adapter_tensors([(name, 1)], LoraConfig(), "x") == {
        "base_model.model.a.lora_A.weight": 1
    }


EMBEDDINGS = {
    "wte.weight": True,
    "m.embed_tokens.weight": True,
    "m.lm_head.base_layer.weight": True,
    "m.wte.token_adapter.base_layer.weight": True,
    "m.wte.bias": False,
    "wte": False,
    "m.wte.norm.weight": False,
    "m.wte.weight.scale": False,
    "m.wtes.weight": False,
    "m.wte.original_module.weight": False,
}


def test_names_of_embeddings():
    assert {name: is_embedding(name) for name in EMBEDDINGS} == EMBEDDINGS


def test_a_tied_embedding_has_all_its_names():
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("wte", "lm_head", "other", "shared")})
    weight = model["wte"].weight
    model["lm_head"].weight = model["other"].weight = weight
    model["embed_out"] = model["wte"]
    names = {"wte.weight", "lm_head.weight", "embed_out.weight"}
    assert dict(tied_embeddings(model, [weight])) == dict.fromkeys(names, weight)


def test_a_model_without_adapters_has_no_config():
    model = nn.Linear(2, 2)
    with pytest.raises(PeftValueError, match="Adapter x not found; this model has none"):
        adapter_config(model, "x")
    model.peft_config = SimpleNamespace()  # something of another library
    with pytest.raises(PeftValueError, match="this model has none"):
        adapter_config(model, "x")
    assert adapter_config(adapted(), "default").r == 2


# Prefix, path of the module, and the rest.
SPLITS = {
    "base_model.model.a.q.lora_A.weight": ("base_model.model.", "a.q", ".lora_A.weight"),
    "a.q.lora_A.weight": ("", "a.q", ".lora_A.weight"),
    "a.q.base_layer.base_layer.lora_A": ("", "a.q", ".base_layer.base_layer.lora_A"),
    "lora_A.weight": ("", "", "lora_A.weight"),
    "base_model.bank": ("base_model.", "", "bank"),
    "a.q.bank_topk_indices": ("", "a.q", ".bank_topk_indices"),
    "a.q.bank_weight": ("", "a.q", ".bank_weight"),
    "a.bank_weight.bias": ("", "a.bank_weight", ".bias"),
    "a.e.token_adapter.base_layer.weight": ("", "a.e", ".token_adapter.base_layer.weight"),
    "a.head.modules_to_save.weight": ("", "a.head", ".modules_to_save.weight"),
    "weight": ("", "", "weight"),
}
PLAIN = {
    "": "",
    "a.q": "a.q",
    "base_layer": "",
    "a.q.base_layer.base_layer": "a.q",
    "a.e.token_adapter": "a.e",
    "a.head.original_module.out": "a.head.out",
    "a._fsdp_wrapped_module.q": "a.q",
    "a.base_layers": "a.base_layers",
}


def test_a_key_is_split_at_its_module():
    for key, expected in SPLITS.items():
        assert split_key(key, ["lora_A", "bank"]) == expected
    assert {path: plain_path(path) for path in PLAIN} == PLAIN


def test_modules_by_plain_path_are_the_outermost():
    base = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    base.append(base[0])
    model = get_peft_model(base, LoraConfig(target_modules=["0"])).get_base_model()
    found = plain_modules(model)
    assert found["0"] is model[0] and found["2"] is model[2] and found[""] is model
    assert [ModuleNames(model).now(path) for path in ("0", "2", "3")] == ["0", "2", None]


def test_keys_of_any_program_by_module():
    deep = ".".join("abcdefgh")
    found = group_keys([
        "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight",
        f"{deep}.lora.down.weight", f"{deep}.alpha", f"{deep}.gamma", "alpha", "x.alpha",
        "vblora_vector_bank", "base_model.vblora_vector_bank", "head.weight",
    ])  # fmt: skip
    start = "base_model.model.q"
    assert found.modules == {
        start: {f"lora_{c}.weight": f"{start}.lora_{c}.weight" for c in "AB"},
        deep: {"lora_A.weight": f"{deep}.lora.down.weight", "alpha": f"{deep}.alpha"},
    }
    assert found.methods == {start: "LORA", deep: "LORA"}
    assert found.shared == ["vblora_vector_bank", "base_model.vblora_vector_bank"]
    assert found.others == [f"{deep}.gamma", "alpha", "x.alpha", "head.weight"]


def test_sizes_of_modules_by_their_tensors():
    config = VBLoRAConfig(r=3, num_vectors=12, vector_length=4, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)
    shapes = {
        key.replace(".default", ""): tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
        if "default" in key
    }
    shapes |= {"te.lora_down.weight": (4,), "te.lora_up.weight": (8, 4)}  # an axis is missing
    found = module_shapes(group_keys(shapes), shapes)
    assert found == {"base_model.model.0": ModuleShape(16, 8, 3), "te": None}


def test_former_modules_and_the_stacks_that_they_are_in():
    old, now = "model.layers.{}.block_sparse_moe.experts.{}.{}", "model.layers.{}.mlp.experts"
    parts = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}
    expected = {
        old.format(i, e, name): FusedModule(now.format(i), parameter, part, e)
        for i in range(2)
        for e in range(4)
        for name, (parameter, part) in parts.items()
    }
    base = mixture("mixtral")
    assert fused_modules(base) == expected
    assert expected[old.format(1, 2, "w3")].key == "model.layers.1.mlp.experts.gate_up_proj"
    outer = nn.ModuleDict({"inner": base})
    config = LoraConfig(target_modules=[], target_parameters=["experts.down_proj"])
    assert fused_modules(get_peft_model(outer, config).get_base_model()) == {
        f"inner.{path}": place._replace(module=f"inner.{place.module}")
        for path, place in expected.items()
    }
    assert fused_modules(llama()) == {}


def operation(name, **fields):
    return type(name, (), fields)()


STACK, JOIN = operation("MergeModulelist"), operation("Concatenate", dim=1)
RULES = [
    (["e.*.w1"], ["up"], [STACK], True),
    (["e.*.w1", "e.*.w2"], ["up"], [STACK, JOIN], True),
    (["e.*.w1", "e.*.w2"], ["up"], [STACK, operation("Concatenate", dim=0)], False),
    (["e.*.w1", "e.*.w2"], ["up"], [STACK], False),
    (["e.*.w1", "e.*.w2"], ["up"], [JOIN, STACK], False),
    (["e.*.w1"], ["up"], [operation("Transpose")], False),
    (["e.*.w1", "e.w2"], ["up"], [STACK, JOIN], False),
    (["e.*.w1"], ["up", "down"], [STACK], False),
    (["e.w1"], ["up"], [STACK], False),
    (["e.*.w1"], ["up"], None, False),
]


@pytest.mark.parametrize(("sources", "targets", "operations", "expected"), RULES)
def test_rules_that_stack_rows(sources, targets, operations, expected):
    rule = SimpleNamespace(source_patterns=sources, target_patterns=targets)
    if operations is not None:
        rule.operations = operations
    assert stacks_rows(rule) is expected
