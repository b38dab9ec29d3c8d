# SPDX-License-Identifier: Apache-2.0
"""How transformers loads adapters into its own models: by the rules of `build_peft_weight_mapping`."""

import logging

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import llama
from safetensors.torch import load_file

import peft
from peft.utils.transformers_weight_conversion import build_peft_weight_mapping

transformers = pytest.importorskip("transformers")
loading = pytest.importorskip("transformers.core_model_loading")

IDS = torch.tensor([[1, 2, 3, 4]])
VARIANTS = [(name, {}) for name in sorted(METHODS)] + [("VBLORA", {"save_only_topk_weights": True})]


@pytest.fixture(params=VARIANTS, ids=lambda v: v[0] + "".join(f"-{k}" for k in v[1]))
def variant(request):
    name, fields = request.param
    return METHODS[name], METHODS[name].config(target_modules=["q_proj", "v_proj"], **fields)


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


def base(dtype=torch.float32):
    torch.manual_seed(0)
    return llama().to(dtype)


def own_rules():
    return [loading.WeightRenaming("LayerNorm.gamma", "LayerNorm.weight")]


def renamed(key, rules):
    renamings = [rule for rule in rules if type(rule) is loading.WeightRenaming]
    converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    return loading.rename_source_key(key, renamings, converters)[0]


def test_the_rules_of_the_interface(method):
    config = method.config()
    rules = own_rules()
    found = build_peft_weight_mapping(rules, "x", peft_config=config)
    patterns = [
        (rule.source_patterns, rule.target_patterns)
        for rule in found
        if type(rule) is loading.WeightRenaming
    ]
    prefix = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    assert patterns[:2] == [
        (["base_model.model.model."], ["model."]),
        (["base_model.model."], [""]),
    ]
    assert ([rf"({prefix}[^\.]*)"], [r"\1.x"]) in patterns
    assert found[-1] is rules[0]
    assert (
        build_peft_weight_mapping(None, "x", config)
        == build_peft_weight_mapping([], "x", config)
        == []
    )


@pytest.mark.parametrize("configured", [True, False])
def test_every_key_of_a_checkpoint_becomes_a_parameters_name(method, configured, tmp_path):
    config = method.config(target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base(), config)
    model.save_pretrained(tmp_path)
    native = base()
    native.add_adapter(method.config(target_modules=["q_proj", "v_proj"]), "x")
    rules = build_peft_weight_mapping(own_rules(), "x", peft_config=config if configured else None)
    names = {renamed(key, rules) for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {name for name, _ in native.named_parameters() if "x" in name.split(".")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_loads_from_either_kind_of_model(variant, dtype, tmp_path):
    method, config = variant
    wrapped = peft.get_peft_model(base(), config).eval()
    wrapped.save_pretrained(tmp_path / "wrapped")
    native = base(dtype)
    info = native.load_adapter(tmp_path / "wrapped", "x")
    assert not info.missing_keys
    assert not info.unexpected_keys
    native.save_pretrained(tmp_path / "native")
    first, second = (
        load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("wrapped", "native")
    )
    assert {key.removeprefix("base_model.").removeprefix("model.") for key in first} == {
        key.removeprefix("base_model.").removeprefix("model.") for key in second
    }
    again = base()
    again.load_adapter(tmp_path / "native", "y")
    expected = wrapped(IDS, **method.call).logits
    torch.testing.assert_close(again(IDS, **method.call).logits, expected)
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "native").eval()
    torch.testing.assert_close(back(IDS, **method.call).logits, expected)
    if dtype == torch.float32:
        torch.testing.assert_close(native(IDS, **method.call).logits, expected)


def test_a_form_that_is_for_inference_is_not_loaded_for_training(tmp_path):
    method = METHODS["VBLORA"]
    model = peft.get_peft_model(
        base(), method.config(target_modules=["q_proj"], save_only_topk_weights=True)
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        base().load_adapter(tmp_path, is_trainable=True)


def test_rules_for_stacks_of_experts():
    """Patterns may be expressions. The layer of the last stack of a module is the outermost."""
    experts, join = r"mlp\.experts", [loading.MergeModulelist(dim=0), loading.Concatenate(dim=1)]
    sources = [f"{experts}.*.{name}.weight" for name in ("w1", "w3", "w2")]
    own = [
        loading.WeightConverter(sources[:2], f"{experts}.gate_up_proj", join),
        loading.WeightConverter(sources[2:], f"{experts}.down_proj", join[:1]),
        loading.WeightConverter([r"other\.*.w2.weight"], r"other\.down_proj", join[:1]),
    ]
    for targets, around in (
        (["w1", "w2", "w3"], 1), (["mlp.experts.0.w2"], 1), (["w1", "w3"], 0), (r".*\.(w1|w2)", 1),
        (r".*\.(w1|w3|w22)", 0), (["2"], 0),
    ):  # fmt: skip
        config = peft.LoraConfig(target_modules=targets)
        found = build_peft_weight_mapping(own, "x", config)
        made = [rule for rule in found if isinstance(rule, loading.WeightConverter)][:-3]
        ends = ("lora_A.x.weight", "lora_B.x.weight")
        assert [rule.target_patterns for rule in made] == [
            [f"mlp.experts{'.base_layer' * around}.{end}" for end in ends],
            [f"mlp.experts.{end}" for end in ends],
            [f"other.{end}" for end in ends],
        ]
        assert [rule.source_patterns for rule in made] == [
            [f"mlp.experts.*.{name}.{end}" for name in ("w1", "w3") for end in ends],
            [f"mlp.experts.*.w2.{end}" for end in ends],
            [f"other.*.w2.{end}" for end in ends],
        ]
