# SPDX-License-Identifier: Apache-2.0
"""The documented interface to the letter: what the methods' pages say of names, orders, signatures
and shapes, a test a statement.
"""

import dataclasses
import inspect
import json

import pytest
import torch
from torch import nn

from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftType,
    PolyConfig,
    VBLoRAConfig,
    get_peft_model,
)
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.poly.layer import Linear, PolyLayer
from peft.tuners.vblora.layer import VBLoRALayer

COMMON = [
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
]
# The interface's fields and their defaults, in the order of positional arguments.
FIELDS = {
    PolyConfig: """r=8 target_modules=None exclude_modules=None modules_to_save=None init_weights=True poly_type='poly' n_tasks=1
        n_skills=4 n_splits=1""",
    VBLoRAConfig: """r=4 num_vectors=256 vector_length=256 topk=2 target_modules=None exclude_modules=None
        save_only_topk_weights=False vblora_dropout=0.0 fan_in_fan_out=False bias='none' modules_to_save=None
        init_vector_bank_bound=0.02 init_logits_std=0.1 layers_to_transform=None layers_pattern=None""",
    LoKrConfig: """rank_pattern={} alpha_pattern={} r=8 alpha=8 rank_dropout=0.0 module_dropout=0.0 use_effective_conv2d=False
        decompose_both=False decompose_factor=-1 rank_dropout_scale=False target_modules=None exclude_modules=None
        init_weights=True layers_to_transform=None layers_pattern=None modules_to_save=None""",
    LoHaConfig: """rank_pattern={} alpha_pattern={} r=8 alpha=8 rank_dropout=0.0 module_dropout=0.0 use_effective_conv2d=False
        target_modules=None exclude_modules=None init_weights=True layers_to_transform=None layers_pattern=None
        modules_to_save=None""",
}


@pytest.mark.parametrize("config_cls", FIELDS, ids=lambda c: c.__name__)
def test_fields_of_configs_stand_in_the_documented_order_with_their_defaults(config_cls):
    documented = [entry.split("=") for entry in FIELDS[config_cls].split()]
    names = [*COMMON, *(name for name, _ in documented)]
    assert [field.name for field in dataclasses.fields(config_cls)][: len(names)] == names
    config = config_cls()
    assert [repr(getattr(config, name)) for name, _ in documented] == [
        default for _, default in documented
    ]


def test_configs_take_their_fields_by_position():
    config = PolyConfig(
        "CAUSAL_LM",
        None,
        None,
        None,
        "base",
        None,
        True,
        4,
        ["q"],
        ["k"],
        ["head"],
        False,
        "poly",
        3,
        2,
        1,
    )
    assert (config.r, config.target_modules, config.exclude_modules, config.modules_to_save) == (
        4,
        {"q"},
        {"k"},
        ["head"],
    )
    assert (config.init_weights, config.n_tasks, config.n_skills, config.inference_mode) == (
        False,
        3,
        2,
        True,
    )
    assert LoraConfig(*[None] * 6, False, 4, ["q"], None, 16).lora_alpha == 16


@pytest.mark.parametrize("config_cls", FIELDS, ids=lambda c: c.__name__)
def test_lists_of_names_become_sets_and_strings_stay(config_cls):
    config = config_cls(target_modules=["q", "v"], exclude_modules=["k"])
    assert (config.target_modules, config.exclude_modules) == ({"q", "v"}, {"k"})
    assert config.peft_type == PeftType[config_cls.__name__.removesuffix("Config").upper()]
    assert config_cls(target_modules=".*(q|v)$").target_modules == ".*(q|v)$"


def test_a_stored_config_has_the_documented_fields(tmp_path):
    documented = json.loads("""{"peft_type": "POLY", "r": 8, "target_modules": ["q_proj", "v_proj"], "exclude_modules": null,
        "modules_to_save": null, "init_weights": true, "poly_type": "poly", "n_tasks": 10, "n_skills": 4, "n_splits": 1}""")
    PolyConfig(
        r=8, target_modules=["q_proj", "v_proj"], n_tasks=10, n_skills=4, n_splits=1
    ).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name: stored[name] for name in documented} == documented
    assert set(stored) == {*documented, *COMMON}


# --- layers
# -----------------------------------------------------------------------------------------------------------
#
#

# As Hugging Face PEFT 0.21.2 has them; those of Poly as its page does.
ATTRIBUTES = {
    PolyLayer: ("poly_lora_A poly_lora_B poly_router", "r n_tasks n_skills n_splits"),
    VBLoRALayer: ("vblora_logits_A vblora_logits_B vblora_vector_bank", "r topk vblora_dropout"),
    LoKrLayer: (
        "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2",
        "r alpha scaling rank_dropout rank_dropout_scale module_dropout",
    ),
    LoHaLayer: (
        "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2",
        "r alpha scaling rank_dropout rank_dropout_scale module_dropout",
    ),
    LoraLayer: (
        "lora_A lora_B lora_embedding_A lora_embedding_B lora_magnitude_vector",
        "r lora_alpha scaling lora_dropout use_dora use_rslora lora_bias",
    ),
}


@pytest.mark.parametrize("layer_cls", ATTRIBUTES, ids=lambda c: c.__name__)
def test_layers_list_their_attributes_as_the_interface_does(layer_cls):
    names, values = ATTRIBUTES[layer_cls]
    assert (layer_cls.adapter_layer_names, layer_cls.other_param_names) == (
        tuple(names.split()),
        tuple(values.split()),
    )


def test_every_attribute_that_a_layer_lists_is_there_by_adapter_name(model):
    layer = next(model.base_model.tuner_layers())
    listed = [
        getattr(layer, name) for name in (*layer.adapter_layer_names, *layer.other_param_names)
    ]
    assert any("default" in entry for entry in listed)
    model.delete_adapter("default")
    assert not any("default" in entry for entry in listed)


def parameters_of(function):
    return [
        (p.name, p.kind.name, p.default) for p in inspect.signature(function).parameters.values()
    ]


def test_signatures_of_poly_layers():
    empty, plain = inspect.Parameter.empty, "POSITIONAL_OR_KEYWORD"
    found = parameters_of(PolyLayer.update_layer)
    assert [(name, default) for name, _, default in found[:4]] == [
        ("self", empty),
        ("adapter_name", empty),
        ("poly_config", empty),
        ("inference_mode", False),
    ]
    assert found[-1][1] == "VAR_KEYWORD"
    assert [name for name, *_ in parameters_of(PolyLayer.reset_poly_parameters)] == [
        "self",
        "adapter_name",
        "init_weights",
    ]
    assert [(name, kind) for name, kind, _ in parameters_of(Linear.forward)] == [
        ("self", plain),
        ("x", plain),
        ("args", "VAR_POSITIONAL"),
        ("task_ids", "KEYWORD_ONLY"),
        ("kwargs", "VAR_KEYWORD"),
    ]


def test_update_layer_passes_over_options_of_other_methods():
    layer = Linear(nn.Linear(8, 8), "default", PolyConfig(r=2))
    layer.update_layer(
        "other", PolyConfig(r=4, n_skills=3), inference_mode=True, use_dora=False, use_rslora=False
    )
    assert layer.poly_lora_A["other"].shape == (1, 3, 8, 4)
    assert not any(p.requires_grad for p in layer.adapter_parameters("other"))


def gates(logits, n_splits):
    """Weights of logits `[rows, n_splits·n_skills]` in evaluation: sigmoids that are divided by
    their sum over the skills.
    """
    opened = 1 / (1 + torch.exp(-logits.double())).unflatten(-1, (n_splits, -1))
    return (opened / opened.sum(-1, keepdim=True)).float()


@pytest.mark.parametrize("granularity", ["linear", "model"])
def test_a_router_is_called_with_task_ids_and_input_ids(granularity):
    fields = {"r": 2, "n_tasks": 3, "n_skills": 3, "n_splits": 2, "router_granularity": granularity}
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = get_peft_model(base, PolyConfig(target_modules=["0", "1"], **fields)).eval()
    first, second = model.base_model.tuner_layers()
    first.poly_router["default"].module_logits.data.normal_()
    for router in (
        first.poly_router["default"],
        *([second.poly_router["default"]] if granularity == "model" else []),
    ):
        ids, x = torch.tensor([2, 0, 2, 1]), torch.randn(4, 5, 8)
        expected = gates(first.poly_router["default"].module_logits[ids], 2)
        for weights in (
            router(ids, x),
            router(task_ids=ids, input_ids=x),
            router(ids),
            router([2, 0, 2, 1], input_ids=x),
        ):
            torch.testing.assert_close(weights, expected)
        assert router(task_ids=1, input_ids=x).shape == (1, 2, 3)
        for wrong in (None, [3], [-1]):
            with pytest.raises(
                ValueError,
                match="task_ids should not be None|Only 3 tasks available. Found task id = (3|-1)",
            ):
                router(task_ids=wrong, input_ids=x)


@pytest.mark.parametrize("level", ["sample", "token"])
def test_an_input_router_by_itself_gives_a_weight_for_each_sample(level):
    layer = Linear(
        nn.Linear(8, 8),
        "default",
        PolyConfig(r=2, n_skills=3, n_splits=2, poly_type="mope", routing_level=level),
    ).eval()
    router, x = layer.poly_router["default"], torch.randn(4, 5, 2, 8)
    router.weight.data.normal_()
    for given in (x, x[:, 0], x[:, 0, 0]):
        pooled = given.double().reshape(4, -1, 8).mean(1)
        expected = gates(pooled @ router.weight.double().T, 2)
        for weights in (
            router(None, given),
            router(task_ids=None, input_ids=given),
            router(torch.tensor([0]), given),
        ):
            assert weights.shape == (4, 2, 3)
            torch.testing.assert_close(weights, expected)
    with pytest.raises(TypeError, match="needs `input_ids`"):
        router(task_ids=torch.tensor([0]))


@pytest.mark.parametrize(
    "fields", [{}, {"poly_type": "mope"}, {"task_rank": 2}], ids=["task", "input", "own skills"]
)
def test_resetting_draws_skills_and_routers_anew(fields):
    layer = Linear(nn.Linear(8, 8), "default", PolyConfig(r=2, n_tasks=1000, n_skills=3, **fields))
    before = {
        name: p.detach().clone() for name, p in layer.named_parameters() if "base_layer" not in name
    }
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "base_layer" not in name:
                parameter.fill_(7.0)
    layer.reset_poly_parameters("default", init_weights=True)
    for name, old in before.items():
        new = layer.get_parameter(name).detach()
        assert new.abs().max() < 1 and bool((new == old).all()) == bool((old == 0).all()), name
        if "poly_router" in name:
            assert new.abs().max() <= 1e-3 and new.numel() * new.std() > 0
    layer.reset_poly_parameters("default", init_weights=False)
    assert all(layer.get_parameter(name).count_nonzero() > 0 for name in before)


def test_resetting_reaches_rows_that_train_by_themselves():
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), PolyConfig(r=2, n_tasks=3, target_modules=["0"])
    )
    model.train_only(tasks=[1])
    layer = model.base_model.model[0]
    row = layer.poly_router["default"].rows[0]
    row.data.fill_(7.0)
    layer.reset_poly_parameters("default", True)
    assert row.abs().max() <= 1e-3 and layer.poly_router["default"].opened == [1]


# --- what is printed
# --------------------------------------------------------------------------------------------------


def test_printing_an_adapter_shows_sizes():
    from peft.tuners.vblora import VectorBank

    fields = {"r": 2, "n_tasks": 3, "n_splits": 2, "target_modules": ["0"]}
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), PolyConfig(task_rank=1, **fields))
    assert "(default): TaskRouter(n_tasks=3, n_splits=2, n_skills=4)\n" in repr(model)
    assert "(A): _Factor(3, 8, 1)" in repr(model)
    model.train_only(tasks=[0, 2])
    assert "n_skills=4, open=[0, 2])" in repr(model)
    by_input = get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), PolyConfig(**{**fields, "poly_type": "mope"})
    )
    assert "InputRouter(in_features=8, n_splits=2, n_skills=4)" in repr(by_input)
    assert (
        repr(VectorBank(torch.zeros(3, 2)))
        == "VectorBank(num_vectors=3, vector_length=2, dtype=float32)"
    )


def test_printing_compact_adapters_shows_sizes(tmp_path):
    from peft import PeftModel

    fields = {
        "r": 2,
        "num_vectors": 6,
        "vector_length": 4,
        "target_modules": ["0"],
        "save_only_topk_weights": True,
    }
    get_peft_model(nn.Sequential(nn.Linear(8, 8)), VBLoRAConfig(**fields)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 8)), tmp_path)
    assert "(vblora_logits_A_topk_indices): PackedTensors(default: " in repr(
        model
    ) and "[2, 2, 2])" in repr(model)
    for i in range(9):
        model.load_adapter(tmp_path, f"a{i}")
    assert "a6: " in repr(model) and "a7: " not in repr(model) and "… 2 more)" in repr(model)
