# SPDX-License-Identifier: Apache-2.0
"""Defaults, remedies and rare ways of saving, loading and switching."""

import contextlib
import json
import os
import re
import shutil

import huggingface_hub
import pytest
import torch
from helpers.adapted import adapted, base
from helpers.models import TARGETS
from safetensors.torch import load_file, save_file
from torch import nn

from peft import (
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PolyConfig,
    get_peft_model,
)
from peft.checkpoint import checks
from peft.core import loading
from peft.utils.error import (
    CheckpointError,
    PeftRuntimeError,
    PeftTypeError,
    PeftValueError,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.linspace(-1, 1, 16).reshape(2, 8)


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# --- saving ------------------------------------------------------------------------------------


def test_a_save_is_in_safetensors_and_has_all_adapters(tmp_path):
    model = adapted()
    model.add_adapter("other", LoraConfig(r=3, target_modules=TARGETS))
    model.save_pretrained(tmp_path / "a")
    assert {CONFIG, WEIGHTS, "other"} <= set(os.listdir(tmp_path / "a"))
    assert set(os.listdir(tmp_path / "a" / "other")) == {CONFIG, WEIGHTS}
    model.save_pretrained(tmp_path / "b", selected_adapters=["other"])
    assert not (tmp_path / "b" / WEIGHTS).exists() and (tmp_path / "b" / "other" / WEIGHTS).exists()
    saved = json.loads((tmp_path / "a" / "other" / CONFIG).read_text())
    assert saved["r"] == 3 and saved["inference_mode"] is True
    assert model.peft_config["other"].inference_mode is False
    for selected, kind, message in (
        ("other", PeftTypeError, r"`selected_adapters`='other' must be a list.*\['other'\]"),
        ([], PeftValueError, "names no adapter; leave it out for all"),
        (["othr"], PeftValueError, r"\['default', 'other'\] - got \['othr'\].*'other'"),
    ):
        with pytest.raises(kind, match=message):
            model.save_pretrained(tmp_path / "c", selected_adapters=selected)
    model.delete_adapter("other")
    model.delete_adapter("default")
    with pytest.raises(PeftValueError, match="The model has no adapters to save"):
        model.save_pretrained(tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("is_main", [True, False])
def test_only_the_main_process_writes(tmp_path, is_main):
    adapted().save_pretrained(tmp_path / "a", is_main_process=is_main)
    assert (tmp_path / "a").exists() == is_main


@pytest.mark.parametrize("plain", [True, False])
def test_an_adapter_that_starts_from_the_weight_is_saved_plain_on_request(tmp_path, plain):
    model = get_peft_model(
        base(), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="olora")
    ).eval()
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.normal_()
    expected = model(X)
    options = {"path_initial_model_for_weight_conversion": "x"} if plain else {}
    model.save_pretrained(tmp_path, **options)
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == (4 if plain else 2)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(loaded(X), expected, rtol=1e-4, atol=1e-4)


def test_pushing_sends_what_saving_writes(monkeypatch):
    asked = {}

    class Api:
        def __init__(self, token):
            asked["token"] = token

        def create_repo(self, repo_id, **options):
            asked["create"] = repo_id, options
            return type("Url", (), {"repo_id": "me/there"})

        def upload_folder(self, *, folder_path, **options):
            asked["files"] = set(os.listdir(folder_path))
            asked["upload"] = options
            return "commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    common = {"commit_description": None, "revision": None}
    assert adapted().push_to_hub("there") == "commit"
    assert asked == {
        "token": None,
        "create": ("there", {"private": None, "exist_ok": True}),
        "files": {CONFIG, WEIGHTS, "README.md"},
        "upload": common
        | {"repo_id": "me/there", "commit_message": "Upload adapter", "create_pr": False},
    }
    adapted().push_to_hub(
        "there", commit_message="mine", private=True, token="t", create_pr=True,
        safe_serialization=False,
    )  # fmt: skip
    assert asked["token"] == "t" and asked["create"][1]["private"] is True
    assert asked["files"] == {CONFIG, "adapter_model.bin", "README.md"}
    assert asked["upload"]["commit_message"] == "mine" and asked["upload"]["create_pr"] is True


# --- loading -----------------------------------------------------------------------------------


def test_a_loaded_adapter_is_frozen_in_evaluation_and_called_default(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base().train(), tmp_path)
    assert model.active_adapter == "default" and not trainable(model) and not model.training
    assert model.peft_config["default"].inference_mode is True
    model.load_adapter(tmp_path, "second")
    assert not trainable(model) and model.peft_config["second"].inference_mode is True
    model.load_adapter(tmp_path, "third", is_trainable=True)
    assert trainable(model) and all(".third." in name for name in trainable(model))
    model = PeftModel.from_pretrained(base().train(), tmp_path, is_trainable=True)
    assert len(trainable(model)) == 4 and model.training


def test_an_adapter_of_a_16_bit_model_is_in_float32_unless_told(tmp_path):
    adapted().save_pretrained(tmp_path)
    for options, dtype in (
        ({}, torch.float32),
        ({"autocast_adapter_dtype": False}, torch.bfloat16),
    ):
        model = PeftModel.from_pretrained(base().bfloat16(), tmp_path, **options)
        model.load_adapter(tmp_path, "second", **options)
        for name in ("default", "second"):
            assert model.base_model.model[0].lora_A[name].weight.dtype == dtype


@pytest.mark.parametrize("load", ["from_pretrained", "load_adapter", "into"])
def test_what_does_not_fit_is_refused_unless_allowed(tmp_path, load):
    source = adapted()
    source.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    keys = sorted(state)

    def loaded(**options):
        if load == "from_pretrained":
            return PeftModel.from_pretrained(base(), tmp_path, **options)
        model = adapted(seed=5, name="default" if load == "into" else "first")
        model.load_adapter(tmp_path, "default", **options)
        model.set_adapter("default")
        return model

    save_file({**state, keys[0]: torch.zeros(5, 5)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="size mismatch.*`ignore_mismatched_sizes=True`"):
        loaded()
    with pytest.warns(UserWarning, match="Not loaded, because you passed"):
        loaded(ignore_mismatched_sizes=True)
    save_file({key: state[key] for key in keys[1:]} | {"x": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(
        CheckpointError,
        match=re.escape(f"Missing keys: {keys[0]}.") + ".*Pass `strict=False` to load the rest.$",
    ):
        loaded()
    with pytest.warns(UserWarning, match="`strict=False`") as told:
        model = loaded(strict=False)
    text = next(str(w.message) for w in told if "`strict=False`" in str(w.message))
    name = keys[0].replace(".weight", ".default.weight")
    assert keys[0] in text or name in text
    assert "In the file, and without a place in the adapter: x." in text
    inside = dict(model.named_parameters())
    for key in keys[1:]:
        assert torch.equal(inside[key.replace(".weight", ".default.weight")], state[key])
    save_file({"x": torch.ones(1)}, tmp_path / WEIGHTS)
    for options, remedy in (
        ({}, r"Unexpected keys: x\.$"),
        ({"strict": False}, "No key fits, so `strict=False` has nothing to load"),
    ):
        with pytest.raises(CheckpointError, match=remedy):
            loaded(**options)


def test_a_given_config_is_a_config(tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(PeftValueError, match="The input config must be a PeftConfig, got .*str"):
        PeftModel.from_pretrained(base(), tmp_path, config="r=2")
    given = LoraConfig(r=2, target_modules=TARGETS)
    model = PeftModel.from_pretrained(base(), tmp_path, config=given)
    assert model.peft_config["default"] is given and given.inference_mode is True
    other = PeftModel.from_pretrained(base(), tmp_path, config=given)  # another model has it
    assert other.peft_config["default"] is not given


def test_the_order_of_model_and_path(tmp_path):
    with pytest.raises(PeftTypeError, match="The model comes first"):
        PeftModel.from_pretrained(tmp_path, base())


def test_a_size_as_large_as_the_file_is_none_too_large():
    config = LoraConfig(r=8)
    most = 8 * 2 * 2
    loading.check_sizes(config, 4, "x")
    config.r = most
    loading.check_sizes(config, 4, "x")
    config.r = most + 1
    with pytest.raises(CheckpointError, match=f"`r`={most + 1}, and the weights have 4 bytes"):
        loading.check_sizes(config, 4, "x")
    config = LoraConfig(r=8, rank_pattern={"0": most + 1})
    with pytest.raises(CheckpointError, match=re.escape(f"`rank_pattern['0']`={most + 1}")):
        loading.check_sizes(config, 4, "x")


def test_the_subfolder_of_an_adapters_name(tmp_path):
    model = adapted(name="mine")
    model.save_pretrained(tmp_path)
    expected = model(X)
    other = adapted(name="mine", seed=7)
    other.save_pretrained(tmp_path / "else")
    shutil.copytree(tmp_path / "else" / "mine", tmp_path / "theirs")
    target = adapted(name="mine", seed=3)
    target.load_adapter(tmp_path, "mine")
    torch.testing.assert_close(target(X), expected)
    target.load_adapter(tmp_path, "mine", subfolder="theirs")  # what is asked for comes first
    torch.testing.assert_close(target(X), other(X))
    default = adapted()
    default.save_pretrained(tmp_path / "plain")
    adapted(seed=9).save_pretrained(tmp_path / "plain" / "default")
    target = adapted(seed=3)
    target.load_adapter(tmp_path / "plain", "default")  # "default" is in the folder itself
    torch.testing.assert_close(target(X), default(X))


def test_an_adapter_gets_new_values_from_the_hub(tmp_path, monkeypatch):
    adapted().save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, **_: tmp_path / name)
    model = adapted(seed=3, name="mine")
    model.load_adapter("me/adapter", "mine")
    torch.testing.assert_close(model(X), adapted()(X))


def test_a_load_during_a_save_in_a_subfolder_is_of_one_save(tmp_path, monkeypatch):
    old = LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS)
    new = LoraConfig(r=2, lora_alpha=64, target_modules=TARGETS)
    adapted(old).save_pretrained(tmp_path / "sub")
    model, saves, real = adapted(new, seed=2), [1], loading.load_peft_weights

    def interrupted(*args, **options):
        while saves:
            saves.pop()
            model.save_pretrained(tmp_path / "sub")
        return real(*args, **options)

    monkeypatch.setattr(loading, "load_peft_weights", interrupted)
    loaded = PeftModel.from_pretrained(base(), tmp_path, subfolder="sub")
    torch.testing.assert_close(loaded(X), model(X))


def test_other_settings_of_the_same_tensors_are_not_loaded_over_an_adapter(tmp_path):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, alpha_pattern={"^0": 8})
    adapted(config).save_pretrained(tmp_path / "same")
    same = adapted(config, seed=2)
    same.load_adapter(tmp_path / "same", "default")
    torch.testing.assert_close(same(X), adapted(config)(X))
    for fields, message in (
        ({"lora_alpha": 5}, r"`lora_alpha`=5, the adapter has 4; load it under a new name"),
        ({"alpha_pattern": {"^0": 9}}, r"`alpha_pattern`=\{.*9\}, the adapter has \{.*8\}"),
        ({"lora_dropout": 0.5}, None),  # says nothing of what is computed now
    ):
        changed = {"lora_alpha": 4, "alpha_pattern": {"^0": 8}} | fields
        adapted(LoraConfig(r=2, target_modules=TARGETS, **changed)).save_pretrained(tmp_path / "x")
        before = same(X)
        with pytest.raises(PeftValueError, match=message) if message else contextlib.nullcontext():
            same.load_adapter(tmp_path / "x", "default")
        torch.testing.assert_close(same(X), before)
    adapted(LoKrConfig(r=2, target_modules=TARGETS)).save_pretrained(tmp_path / "y")
    with pytest.raises(
        PeftValueError, match="adapters with different peft types. Found .*LORA.*LOKR"
    ):
        same.load_adapter(tmp_path / "y", "default")


def test_task_names_come_with_the_values(tmp_path):
    def config(*names):
        return PolyConfig(r=2, n_tasks=2, n_skills=2, task_names=[*names], target_modules=TARGETS)

    adapted(config("a", "b")).save_pretrained(tmp_path)
    model = adapted(config("c", "d"), seed=2)
    dropout = model.peft_config["default"].r
    model.load_adapter(tmp_path, "default")
    assert list(model.peft_config["default"].task_names) == ["a", "b"]
    assert model.peft_config["default"].inference_mode is False  # its own
    assert model.peft_config["default"].r == dropout


@pytest.mark.parametrize("names", [["mine", "default", "x"], ["default", "x"], ["x"]])
def test_a_models_own_names_load_without_strictness(tmp_path, names):
    """Keys with the adapter's name, of this one, else of "default", else of the only one."""
    adapted().save_pretrained(tmp_path)
    values = {}
    for seed, name in enumerate(names):
        values[name] = {
            k: torch.full_like(v, 1.0 + seed) for k, v in load_file(tmp_path / WEIGHTS).items()
        }
    state = {
        key.replace(".weight", f".{name}.weight"): tensor
        for name, tensors in values.items()
        for key, tensor in tensors.items()
    }
    save_file(state, tmp_path / WEIGHTS)
    with (
        pytest.warns(UserWarning, match="without a place")
        if len(names) > 1
        else contextlib.nullcontext()
    ):
        model = PeftModel.from_pretrained(base(), tmp_path, "mine", strict=False)
    assert model.base_model.model[0].lora_A["mine"].weight.unique().tolist() == [1.0]


def test_of_two_other_names_none_is_meant(tmp_path):
    adapted().save_pretrained(tmp_path)
    state = {
        key.replace(".weight", f".{name}.weight"): tensor.clone()
        for key, tensor in load_file(tmp_path / WEIGHTS).items()
        for name in ("x", "y")
    }
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="No key fits"):
        PeftModel.from_pretrained(base(), tmp_path, "mine", strict=False)


# --- checks ------------------------------------------------------------------------------------


def test_values_that_are_none_are_told(tmp_path):
    model = adapted()
    with torch.no_grad():
        model.base_model.model[0].lora_A["default"].weight[0, 0] = torch.nan
        model.base_model.model[2].lora_B["default"].weight[0, 0] = 1e6
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="NaN or infinite") as told:
        PeftModel.from_pretrained(base().half(), tmp_path, autocast_adapter_dtype=False)
    texts = [str(w.message) for w in told]
    assert any("NaN or infinite" in t and "0.lora_A" in t and "lora_B" not in t for t in texts)
    assert any("infinite in the dtype" in t and "2.lora_B.weight (1e+06)" in t for t in texts)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float64])
def test_extremes_of_all_dtypes(dtype):
    state = {
        "a": torch.tensor([1.0, -2.0]).to(dtype),
        "int": torch.ones(2, dtype=torch.int8),
        "none": torch.empty(0, dtype=dtype),
        "b": torch.tensor([[3.0]]).to(dtype),
        "meta": torch.ones(2, dtype=dtype, device="meta"),
        "other": nn.Parameter(torch.tensor([5.0])),
    }
    assert checks._extremes(state) == {"a": (-2, 1), "b": (3, 3), "other": (5, 5)}


def test_merged_weights_are_not_written():
    model = adapted()
    layers = model.base_model.model
    checks.check_unmerged(model)
    layers[0].merge()
    with pytest.raises(PeftRuntimeError, match="`.*0`: default is merged into the weight"):
        checks.check_unmerged(model)
    with pytest.raises(PeftRuntimeError, match="default is merged"):
        checks.check_unmerged(model, [layers[0].base_layer.weight])
    checks.check_unmerged(model, [layers[2].base_layer.weight, layers[4].weight])
    with pytest.raises(PeftRuntimeError, match="Adapter default is merged; call"):
        checks.check_adapter_unmerged(model, "default")
    checks.check_adapter_unmerged(model, "other")


def test_the_largest_value_of_a_dtype_is_none_too_large(tmp_path, recwarn):
    model = adapted()
    with torch.no_grad():
        for sign in (0, 1):
            largest = torch.finfo(torch.float16).max * (-1) ** sign
            model.base_model.model[0].lora_A["default"].weight[0, sign] = largest
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(base().half(), tmp_path, autocast_adapter_dtype=False)
    assert not recwarn.list


def test_a_pattern_for_one_module_is_not_one_for_all_below_it(tmp_path):
    config = LoraConfig(r=2, target_modules=TARGETS, alpha_pattern={"^0": 8})
    adapted(config).save_pretrained(tmp_path)
    text = (tmp_path / CONFIG).read_text()
    assert r'"^0(\\..*)?"' in text
    (tmp_path / CONFIG).write_text(text.replace(r'"^0(\\..*)?"', '"^0"'))
    with pytest.raises(PeftValueError, match=r"`alpha_pattern`=\{'\^0': 8\}, the adapter has"):
        adapted(config).load_adapter(tmp_path, "default")


def test_a_base_model_renames_the_modules_of_its_former_versions(tmp_path):
    source = adapted()
    source.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    old = {key.replace("model.0.", "model.former."): tensor for key, tensor in state.items()}
    save_file(old, tmp_path / WEIGHTS)
    model = base()
    model._checkpoint_conversion_mapping = {"^former": "0"}
    torch.testing.assert_close(PeftModel.from_pretrained(model, tmp_path)(X), source(X))
