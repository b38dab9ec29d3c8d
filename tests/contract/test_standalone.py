# SPDX-License-Identifier: Apache-2.0
"""Adapters loaded without their base model, and the contents of files. The oracle is the adapter in
the real base model.
"""

import json

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import llama
from safetensors.torch import save_file
from torch import nn

import peft

TARGETS = ["q_proj", "v_proj"]


IDS = torch.arange(6).view(1, 6)


def base():
    """The same base model in each call."""
    torch.manual_seed(0)
    return llama()


def saved(method, folder, **more):
    fields = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", **more}
    model = peft.get_peft_model(base(), METHODS[method].config(**fields)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter")
def test_an_adapter_alone_converts_as_in_its_model(method, tmp_path):
    model, options = saved(method, tmp_path / "a"), METHODS[method].merge
    alone = peft.load_standalone(tmp_path / "a")
    assert all(layer.get_base_layer().weight.is_meta for layer in alone.base_model.tuner_layers())
    inside = peft.save_as_lora(tmp_path / "inside", model, 2, **options)
    outside = peft.save_as_lora(tmp_path / "outside", alone, 2, **options)
    assert inside.state_dict.keys() == outside.state_dict.keys()
    for key, tensor in inside.state_dict.items():
        torch.testing.assert_close(outside.state_dict[key], tensor)
    configs = [
        json.loads((tmp_path / n / "adapter_config.json").read_text())
        for n in ("inside", "outside")
    ]
    assert configs[0] == configs[1]


def test_all_methods_in_one_become_a_poly_adapter(tmp_path):
    names = [name for name in METHODS if name != "POLY"]
    outputs = {name: saved(name, tmp_path / name)(IDS).logits for name in names}
    together = peft.load_standalone({name: tmp_path / name for name in names})
    assert isinstance(together, peft.PeftMixedModel)
    assert peft.save_as_poly(tmp_path / "poly", together, names).config.target_modules == set(
        TARGETS
    )
    model = peft.PeftModel.from_pretrained(base(), tmp_path / "poly")
    for name, output in outputs.items():
        torch.testing.assert_close(model(IDS, task_ids=name).logits, output)


@pytest.mark.parametrize(
    "fields",
    [
        {"trainable_token_indices": [1, 5]},
        {"modules_to_save": ["norm"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"layers_to_transform": [1]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": r".*\.1\..*q_proj"},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter", "ignore:Setting `save_embedding")
def test_what_is_beside_the_layers_comes_along(fields, tmp_path):
    model = saved("LORA", tmp_path / "a", **fields)
    if extra := [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]:
        torch.nn.init.normal_(extra[0])
        model.save_pretrained(tmp_path / "a")
    peft.save_as_lora(tmp_path / "b", peft.load_standalone(tmp_path / "a"))
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "b")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["0"]),
            "starts? that is computed",
        ),
        (peft.LoKrConfig(r=1, target_modules=["0"], weight_decompose=True), "weight decomposition"),
    ],
    ids=["start", "decomposed"],
)
def test_adapters_that_need_the_base_models_weights_say_so(config, message, tmp_path):
    peft.get_peft_model(nn.Sequential(nn.Linear(16, 16)), config).save_pretrained(tmp_path)
    with pytest.raises(peft.PeftError, match=message):
        peft.convert_to_lora(peft.load_standalone(tmp_path))


@pytest.mark.parametrize("method", ["LOHA", "LOKR"])
def test_the_base_models_sizes_help_where_tensors_do_not_tell(method, tmp_path):
    """A convolution with flattened factors looks like a linear layer."""

    def convolution():
        return nn.Sequential(nn.Conv1d(12, 8, 3))

    config = METHODS[method].config(target_modules=["0"], r=1)
    model = peft.get_peft_model(convolution(), config)
    model.save_pretrained(tmp_path / "a")
    with torch.device("meta"):
        base = convolution()
    alone = peft.load_standalone(tmp_path / "a", model=base)
    peft.save_as_lora(tmp_path / "b", alone)
    again = peft.PeftModel.from_pretrained(convolution(), tmp_path / "b")
    deltas = [m.base_model.model[0].get_delta_weight("default") for m in (model, again)]
    torch.testing.assert_close(*deltas)


def test_adapted_parameters_need_the_base_model(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"])
    peft.get_peft_model(nn.Sequential(nn.Linear(8, 4)), config).save_pretrained(tmp_path)
    with pytest.raises(peft.PeftError, match="`target_parameters`.*`meta_model` makes it"):
        peft.load_standalone(tmp_path)
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(8, 4))
    assert peft.load_standalone(tmp_path, model=base).peft_config["default"].r == 2


def test_adapters_of_different_base_models_are_refused(tmp_path):
    for size in (8, 16):
        config = peft.LoraConfig(r=2, target_modules=["0"])
        peft.get_peft_model(nn.Sequential(nn.Linear(size, 4)), config).save_pretrained(
            tmp_path / str(size)
        )
    with pytest.raises(
        peft.PeftError, match="`0`: the adapters are for modules of different sizes"
    ):
        peft.load_standalone({"a": tmp_path / "8", "b": tmp_path / "16"})


@pytest.mark.parametrize("method", METHODS)
def test_the_contents_of_a_file_are_those_of_the_adapter(method, tmp_path):
    model = saved(method, tmp_path, modules_to_save=["model.norm"])
    contents = peft.inspect_adapter(tmp_path)
    state = peft.get_peft_model_state_dict(model)
    assert contents.methods == [method] and contents.problems == []
    assert contents.parameters == sum(tensor.numel() for tensor in state.values())
    assert contents.file_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    size = contents.file_bytes - contents.header_bytes
    assert size == sum(tensor.nbytes for tensor in state.values())
    layers = dict(model.base_model.named_tuner_layers())
    assert {module.path for module in contents.modules} == set(layers)
    for module in contents.modules:
        geometry = layers[module.path].geometry
        assert module.shape[:2] == (geometry.out_features, geometry.in_features)
    assert list(contents.companions) == ["base_model.model.model.norm.weight"]
    assert "model.layers.*.self_attn.q_proj (2x)" in str(contents)
    assert json.loads(json.dumps(contents.to_dict()))["methods"] == [method]


def test_files_of_other_programs(tmp_path):
    tensors = {
        "lora_down.weight": torch.ones(4, 16),
        "lora_up.weight": torch.ones(8, 4),
        "alpha": torch.tensor(2.0),
    }
    state = {
        f"lora_unet_mid_block_attn_to_q.{name}": tensor.half() for name, tensor in tensors.items()
    }
    file = tmp_path / "style.safetensors"
    save_file(state, file, {"ss_network_module": "networks.lora"})
    contents = peft.inspect_adapter(file)
    (module,) = contents.modules
    assert contents.writer == "sd-scripts with networks.lora" and contents.dtypes == {"float16": 97}
    assert (module.component, module.path) == ("lora_unet", "mid_block_attn_to_q")
    assert (module.method, *module.shape[:3]) == ("LORA", 8, 16, 4)
    save_file({"x.weight": torch.ones(3)}, file)
    assert "No tensor belongs to a method" in str(peft.inspect_adapter(file))


def test_damage_is_named(tmp_path):
    saved("LORA", tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    problems = peft.inspect_adapter(tmp_path).problems
    assert any("'IA3' is not provided by this package" in problem for problem in problems)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(peft.PeftError, match="not a readable weights file"):
        peft.inspect_adapter(weights)
    with pytest.raises(peft.PeftError, match="did you mean"):
        peft.inspect_adapter(str(tmp_path) + "x")


@pytest.mark.parametrize("alone", [False, True], ids=["in the base model", "alone"])
def test_a_sum_of_adapters_of_all_methods_is_one_lora_adapter(alone, tmp_path):
    weights = {"LOHA": 0.5, "LOKR": -1.0, "LORA": 2.0, "VBLORA": 0.25, "POLY": 1.0}
    dense = 0.0
    for name, weight in weights.items():
        layer = saved(name, tmp_path / name).base_model.model.model.layers[1].self_attn.v_proj
        delta = layer.get_delta_weight("default", **METHODS[name].merge)
        dense = dense + weight * delta.detach().double()
    model = peft.load_standalone({name: tmp_path / name for name in weights})
    if not alone:
        first, *others = weights
        model = peft.PeftMixedModel.from_pretrained(base(), tmp_path / first, first)
        for name in others:
            model.load_adapter(tmp_path / name, name)
    exact = peft.convert_to_lora(model, adapter_name=weights, task_id=1)
    path = "model.layers.1.self_attn.v_proj"
    loaded = peft.load_standalone(exact).base_model.model.get_submodule(path)
    torch.testing.assert_close(
        loaded.get_delta_weight("default").double(), dense, atol=1e-5, rtol=1e-4
    )
    assert exact.error == 0 and exact.config.target_modules == set(TARGETS)
    values = torch.linalg.svdvals(dense)
    small = peft.save_as_lora(tmp_path / "sum", model, 2, weights, task_id=1)
    assert small.errors[path] == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-3)
    assert peft.inspect_adapter(tmp_path / "sum").ranks == {2: 4}


def test_a_sum_says_what_is_wrong(tmp_path):
    for name in "ab":
        model = saved("LORA", tmp_path / name, modules_to_save=["norm"])
        norm = model.base_model.model.model.norm.modules_to_save["default"]
        torch.nn.init.constant_(norm.weight, float(ord(name)))
        model.save_pretrained(tmp_path / name)
    model = peft.load_standalone({name: tmp_path / name for name in "ab"})
    for weights, message in (
        ({}, "`adapter_name` is empty"),
        ({"a": 1.0, "c": 1.0}, "Adapter c not found"),
        ({"a": float("nan")}, "`the weight of a`=nan must be a finite number"),
        ({"a": 1.0, "b": 1.0}, "each train a copy of .*`heads`"),
    ):
        with pytest.raises(peft.PeftError, match=message):
            peft.convert_to_lora(model, adapter_name=weights)
    mean = peft.convert_to_lora(model, adapter_name={"a": 1.0, "b": 3.0}, heads="mean")
    norms = [
        peft.load_peft_weights(tmp_path / name)["base_model.model.model.norm.weight"]
        for name in "ab"
    ]
    torch.testing.assert_close(
        mean.state_dict["base_model.model.model.norm.weight"], (norms[0] + 3 * norms[1]) / 4
    )
