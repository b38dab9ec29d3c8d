# SPDX-License-Identifier: Apache-2.0
"""Adapters of transformers 4, which had a linear layer for each projection of each expert, on the
stacks of transformers 5.
"""

import copy
import json

import pytest
import torch
from helpers.experts import mixture, tokens, with_deltas
from safetensors.torch import load_file, save_file

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import (
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)

ROUNDED = {"rtol": 1e-4, "atol": 1e-5}
# Names in transformers 4: of the module around the experts, of its gate, up and down projection,
# and of the router, which was a linear layer.
OLD = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), "gate"),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), "gate"),
}
FIELDS = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"}


def former(kind, base, folder, parts=(0, 1, 2), experts=range(4), **fields):
    """Write an adapter as transformers 4 had it; return the deltas that it means."""
    block, names, router = OLD[kind]
    ranks = fields.get("rank_pattern", {})
    scales = fields.get("alpha_pattern", {})
    state, deltas = {}, {}
    parameters = dict(base.named_parameters())

    def factors(path, name, shape):
        r, alpha = ranks.get(name, 3), scales.get(name, 5)
        A, B = torch.randn(r, shape[1]), torch.randn(shape[0], r)
        state[f"base_model.model.{path}.lora_A.weight"] = A
        state[f"base_model.model.{path}.lora_B.weight"] = B
        return B @ A * alpha / (r**0.5 if fields.get("use_rslora") else r)

    for i in range(base.config.num_hidden_layers):
        start, now = f"model.layers.{i}.{block}", f"model.layers.{i}.mlp"
        stack = {
            key: torch.zeros_like(parameters[f"{now}.experts.{key}"])
            for key in ("gate_up_proj", "down_proj")
        }
        half = stack["gate_up_proj"].shape[1] // 2
        rows = (slice(0, half), slice(half, None), slice(None))
        for part in parts:
            for e in experts:
                own = stack["down_proj" if part == 2 else "gate_up_proj"][e, rows[part]]
                path = f"{start}.experts.{e}.{names[part]}"
                own += factors(path, names[part], own.shape)
        deltas |= {f"{now}.experts.{key}": delta for key, delta in stack.items()}
        gate = f"{now}.gate.weight"
        deltas[gate] = factors(f"{start}.{router}", router, parameters[gate].shape)
        q = f"model.layers.{i}.self_attn.q_proj"
        deltas[f"{q}.weight"] = factors(q, "q_proj", parameters[f"{q}.weight"].shape)
    targets = [*(names[part] for part in parts), router, "q_proj"]
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors")
    config = {**FIELDS, "target_modules": targets, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mixtral", {}),
        ("mixtral", {"fields": {"use_rslora": True, "rank_pattern": {"w3": 2, "gate": 1}}}),
        ("mixtral", {"fields": {"alpha_pattern": {"w1": 2, "w2": 7}}, "experts": [0, 2]}),
        ("mixtral", {"parts": (1,)}),
        ("qwen3_moe", {}),
    ],
)
def test_an_adapter_of_single_experts_is_loaded_onto_stacks(kind, options, tmp_path):
    base, ids = mixture(kind), tokens()
    options = {**{k: v for k, v in options.items() if k != "fields"}, **options.get("fields", {})}
    deltas = former(kind, base, tmp_path / "old", **options)
    expected = with_deltas(base, deltas, input_ids=ids)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "old")
    torch.testing.assert_close(model(ids).logits, expected, **ROUNDED)
    # What is saved is an adapter of stacks, which loads as such.
    model.save_pretrained(tmp_path / "new")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "new")
    torch.testing.assert_close(again(ids).logits, expected, **ROUNDED)
    assert model.peft_config["default"].target_modules == {"q_proj"}


def test_factors_of_another_size_are_refused(tmp_path):
    former("mixtral", mixture("mixtral", hidden_size=24), tmp_path)
    base = mixture("mixtral")
    with pytest.raises(RuntimeError, match=r"experts.0.w1`: its factors \[3, 24\].* do not fit"):
        PeftModel.from_pretrained(base, tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    start = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1."
    more = {**state, f"{start}lora_magnitude_vector": torch.ones(24)}
    del state[f"{start}lora_B.weight"]
    for changed in (state, more):
        save_file(changed, tmp_path / "adapter_model.safetensors")
        with pytest.raises(RuntimeError, match="experts.0.w1`: an adapter of a single expert is"):
            PeftModel.from_pretrained(base, tmp_path)
    assert not any("lora" in name for name, _ in base.named_modules())


def test_beside_other_adapters_and_with_dropout(tmp_path):
    base, ids = mixture("mixtral"), tokens()
    deltas = former("mixtral", base, tmp_path, lora_dropout=0.1)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["v_proj"]), "first")
    with pytest.warns(UserWarning, match="`lora_dropout`=0.1 becomes 0"):
        model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    expected = with_deltas(base, deltas, input_ids=ids)
    torch.testing.assert_close(model(ids).logits, expected, **ROUNDED)


def test_a_new_config_with_former_names():
    base = mixture("mixtral", num_hidden_layers=1)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["w1", "w2", "w3", "q_proj"])
    model = get_peft_model(copy.deepcopy(base), config)
    state = get_peft_model_state_dict(model)
    shapes = {key.split("layers.0.")[1]: tuple(t.shape) for key, t in state.items()}
    assert shapes["mlp.experts.base_layer.lora_A.weight"] == (4 * 6, 16)
    assert shapes["mlp.experts.lora_A.weight"] == (4 * 3, 24)
    own = copy.deepcopy(config)
    convert_peft_config_for_transformers(own, base, get_model_conversion_mapping(base))
    assert own.target_modules == {"q_proj"}
    assert own.target_parameters == ["experts.down_proj", "experts.gate_up_proj"]
    name = "experts.gate_up_proj"
    assert (own.rank_pattern[name], own.alpha_pattern[name]) == (6, 10)
    # Names of modules that the model has mean these.
    dense = LoraConfig(target_modules=["q_proj"])
    convert_peft_config_for_transformers(dense, base, None)
    assert dense.target_parameters is None


def test_an_expression_for_former_names():
    """It means what the names mean that it matches; without any it stays as it is."""
    names = get_peft_model(mixture("qwen3_moe"), LoraConfig(target_modules=["q_proj", "up_proj"]))
    pattern = r".*\.(q_proj|up_proj)"
    model = get_peft_model(mixture("qwen3_moe"), LoraConfig(target_modules=pattern))
    for field in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        found, expected = (getattr(m.peft_config["default"], field) for m in (model, names))
        assert found == expected
    assert model.state_dict().keys() == names.state_dict().keys()
    plain = get_peft_model(mixture("qwen3_moe"), LoraConfig(target_modules=r".*\.q_proj"))
    assert plain.peft_config["default"].target_modules == r".*\.q_proj"
    assert not plain.peft_config["default"].target_parameters


@pytest.mark.parametrize(
    ("parts", "targets"),
    [
        ((0, 1, 2), None),
        ((0, 1), None),
        ((2,), None),
        ((0, 1, 2), r".*\.(q_proj|gate|w1|w2|w3)"),
        ((0, 1), r".*\.(q_proj|gate|w1|w3)"),
        ((0, 1, 2), r".*\.(q_proj|gate|w[123])"),
        ((0, 1, 2), r"model\.layers\.\d+\..*\.(q_proj|gate|w\d)"),
    ],
)
def test_transformers_own_loading(parts, targets, tmp_path):
    """Of a stack, or of two of one module, by names and by an expression."""
    base, ids = mixture("mixtral"), tokens()
    fields = {} if targets is None else {"target_modules": targets}
    deltas = former("mixtral", base, tmp_path, parts=parts, **fields)
    model = copy.deepcopy(base)
    found = model.load_adapter(str(tmp_path))
    assert not found.missing_keys and not found.unexpected_keys
    expected = with_deltas(base, deltas, input_ids=ids)
    torch.testing.assert_close(model(ids).logits, expected, **ROUNDED)
