# SPDX-License-Identifier: Apache-2.0
"""Bad input gets an error of its own, and model, config, files and random state are as they were."""

import copy
import pickle
import re
import warnings
from functools import partial

import numpy
import pytest
import torch
from helpers.methods import METHODS
from helpers.models import TARGETS, mlp
from helpers.states import assert_unchanged, snapshot
from safetensors.torch import load_file, save_file
from torch import nn

import peft
from peft import (
    LoKrConfig,
    PeftModel,
    PolyConfig,
    VBLoRAConfig,
    get_peft_config,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.utils import set_base_model_state_dict
from peft.utils.hotswap import hotswap_adapter

pytestmark = pytest.mark.quick
CONFIGS = [
    (PolyConfig, {"r": 0}, "`r`=0 must be an integer of at least 1"),
    (PolyConfig, {"r": True}, "`r`=True must be an integer"),
    (PolyConfig, {"r": 2.5}, "`r`=2.5 must be an integer"),
    (PolyConfig, {"n_tasks": 0}, "`n_tasks`=0"),
    (PolyConfig, {"n_skills": -1}, "`n_skills`=-1"),
    (PolyConfig, {"n_splits": 0}, "`n_splits`=0"),
    (PolyConfig, {"poly_type": "x"}, "`poly_type`='x' must be one of 'poly', 'mope'"),
    (PolyConfig, {"init_weights": "no"}, "`init_weights`='no'"),
    (PolyConfig, {"routing_level": "word"}, "`routing_level`='word'"),
    (PolyConfig, {"task_names": ["a"], "n_tasks": 2}, "`task_names` must be 2 different names"),
    (PolyConfig, {"task_type": "FOO"}, "Invalid task type: 'FOO'"),
    (PolyConfig, {"target_modules": "(["}, "not a valid regular expression"),
    (PolyConfig, {"target_modules": 3}, "`target_modules`=3"),
    (PolyConfig, {"modules_to_save": "head"}, "`modules_to_save`='head' must be a list"),
    (
        PolyConfig,
        {"modules_to_save": ["head", ""]},
        "`modules_to_save`=['head', ''] has an empty name",
    ),
    (VBLoRAConfig, {"r": 0}, "`r`=0"),
    (VBLoRAConfig, {"num_vectors": 0}, "`num_vectors`=0"),
    (VBLoRAConfig, {"vector_length": 0}, "`vector_length`=0"),
    (VBLoRAConfig, {"topk": 0}, "`topk`=0"),
    (
        VBLoRAConfig,
        {"topk": 5, "num_vectors": 4},
        "`topk`=5 must not be larger than `num_vectors`=4",
    ),
    (VBLoRAConfig, {"bias": "foo"}, "`bias`='foo'"),
    (VBLoRAConfig, {"vblora_dropout": 1.0}, "`vblora_dropout`=1.0 must be a probability"),
    (
        VBLoRAConfig,
        {"init_vector_bank_bound": 0},
        "`init_vector_bank_bound`=0 must be a positive finite number",
    ),
    (VBLoRAConfig, {"init_logits_std": -1}, "`init_logits_std`=-1 must not be negative"),
    (VBLoRAConfig, {"layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
    (LoKrConfig, {"r": "8"}, "`r`='8'"),
    (LoKrConfig, {"alpha": "x"}, "`alpha`='x' must be a finite number"),
    (LoKrConfig, {"rank_dropout": 2}, "`rank_dropout`=2 must be a probability"),
    (LoKrConfig, {"decompose_factor": 0}, "`decompose_factor`=0"),
    (LoKrConfig, {"decompose_both": 1}, "`decompose_both`=1 must be True or False"),
    (LoKrConfig, {"init_weights": "bad"}, "`init_weights`='bad'"),
    (LoKrConfig, {"rank_pattern": {"a": 0}}, "`rank_pattern['a']`=0"),
    (LoKrConfig, {"rank_pattern": ["a"]}, "`rank_pattern`=['a'] must be a dictionary"),
    (LoKrConfig, {"layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
    (LoKrConfig, {"layers_to_transform": [0]}, "`layers_pattern` must also be specified"),
    (
        LoKrConfig,
        {"layers_to_transform": [-1], "layers_pattern": "h"},
        "`layers_to_transform`=[-1]",
    ),
]


@pytest.mark.parametrize(
    ("config_cls", "fields", "message"), CONFIGS, ids=lambda value: str(value)[:40]
)
def test_configs(config_cls, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_cls(**fields)


def test_all_offences_are_in_one_message():
    with pytest.raises(peft.PeftError, match="`r`=0.*`n_tasks`=0.*`poly_type`='x'"):
        PolyConfig(r=0, n_tasks=0, poly_type="x")


def test_a_config_spoilt_later_is_refused_at_injection(method):
    config = method.config(target_modules=TARGETS)
    config.r = -1
    with pytest.raises(ValueError, match="`r`=-1"):
        get_peft_model(mlp(), config)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({}, ValueError, "no `peft_type`"),
        ({"peft_type": "IA3"}, ValueError, "LOHA, LOKR, LORA, POLY, ROUTED, VBLORA"),
    ],
)
def test_configs_of_other_methods(content, error, message):
    with pytest.raises(error, match=message):
        get_peft_config(content)


MODELS = [
    (
        {"target_modules": ["lin"]},
        "default",
        ValueError,
        "Target modules {'lin'} not found in the base model",
    ),
    (
        {"target_modules": ["1", "3"]},
        "default",
        TypeError,
        "`1`: Target module ReLU.*`3`: Target module ReLU",
    ),
    ({"target_modules": []}, "default", ValueError, "`target_modules` is empty"),
    ({}, "default", ValueError, "Please specify `target_modules` in `peft_config`"),
    (
        {"target_modules": ["0"], "exclude_modules": ["0"]},
        "default",
        ValueError,
        "No modules were targeted",
    ),
    ({"target_modules": ["0"]}, "a.b", ValueError, "'a.b' must be a non-empty string without dots"),
    ({"target_modules": ["0"]}, "keys", ValueError, "'keys' is an attribute of torch's containers"),
    ({"target_modules": ["0"]}, "users/" + "é" * 128, ValueError, "at most 255 bytes"),
    ({"target_modules": ["0"]}, "a\0b", ValueError, "none of them zero"),
]


@pytest.mark.parametrize(
    ("fields", "name", "error", "message"), MODELS, ids=lambda value: str(value)[:40]
)
def test_targets_and_names(method, fields, name, error, message):
    model, config = mlp(), method.config(**fields)
    before, written = snapshot(model), dict(vars(config))
    with pytest.raises(error, match=message.replace("{", r"\{")):
        get_peft_model(model, config, adapter_name=name)
    assert_unchanged(before, model)
    assert vars(config) == written


def test_near_misses_are_named():
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})
    with pytest.raises(peft.NoMatchingPeftModuleError, match="Did you mean.*'q_proj'"):
        get_peft_model(model, LoKrConfig(target_modules=["q_prj"]))


def test_sizes_that_do_not_divide_are_all_named():
    model = nn.Sequential(nn.Linear(10, 16), nn.Linear(16, 6))
    with pytest.raises(
        ValueError,
        match=r"`0`: `in_features`=10 is not divisible by `n_splits`=4; choose 1, 2, 5 or 10\..*`1`: `out_features`=6",
    ):
        get_peft_model(model, PolyConfig(n_splits=4, target_modules=["0", "1"]))
    message = (
        r"`0`: `in_features` 10 must be divisible by `vector_length` 8\. `1`: `out_features` 6 .*"
        r"Lengths that divide all targeted sizes are 1, 2; or set `pad_last_tile=True`"
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, VBLoRAConfig(vector_length=8, target_modules=["0", "1"]))


def test_a_bypassed_layer_is_refused_by_name(method):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    with pytest.raises(
        TypeError, match=r"`attention.out_proj`: nn.MultiheadAttention reads this layer's weight"
    ):
        get_peft_model(model, method.config(target_modules=["out_proj", "linear"]))
    with pytest.warns(UserWarning, match=r"leaves out `attention.out_proj`"):
        get_peft_model(model, method.config(target_modules="all-linear"))


def test_names_of_adapters(model, method):
    before = snapshot(model)
    for call, message in [
        (
            lambda: model.add_adapter("default", method.config(target_modules=TARGETS)),
            "Adapter with name 'default' already exists",
        ),
        (lambda: model.set_adapter("zz"), "Adapter zz not found"),
        (lambda: model.set_adapter(["default", "zz"]), "Adapter zz not found"),
        (lambda: model.delete_adapter("zz"), "Adapter zz does not exist"),
        (lambda: model.merge_adapter(adapter_names=["zz"]), "Adapter zz not found"),
        (
            lambda: model.save_pretrained("x", selected_adapters=["zz"]),
            "invalid `selected_adapters`",
        ),
        (lambda: set_peft_model_state_dict(model, {}, adapter_name="zz"), "Adapter zz not found"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
        assert_unchanged(before, model)


def test_another_method_on_the_same_model(model):
    other = next(m for m in METHODS.values() if m.config().peft_type != model.peft_type)
    before = snapshot(model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("b", other.config(target_modules=TARGETS))
    assert_unchanged(before, model)


def test_arguments_that_cannot_be_honoured(model, method):
    x = torch.zeros(2, 8)
    with pytest.raises(TypeError):
        model(x, no_such_argument=1, **method.call)
    with pytest.raises(TypeError, match="must be a PeftConfig"):
        get_peft_model(mlp(), {"r": 1})
    with (
        pytest.warns(UserWarning, match="unexpected keyword arguments: foo; they"),
        pytest.raises(FileNotFoundError),
    ):
        model.load_adapter("somewhere", "b", foo=1, torch_dtype=torch.float16, device_map="auto")
    with pytest.raises(ValueError, match="PeftModel already"):
        PeftModel(model, method.config(target_modules=TARGETS))
    with pytest.raises(
        NotImplementedError,
        match="AdaLoraConfig is not provided by this package; it provides LOHA, LOKR, LORA",
    ):
        peft.AdaLoraConfig(r=8)


def test_a_broken_adapter_is_not_merged(model, method):
    with torch.no_grad():
        last = [p for n, p in model.named_parameters() if ".2." in n and p.requires_grad]
        for parameter in last:
            parameter.fill_(float("nan"))
    before = snapshot(model)
    with pytest.raises(
        ValueError,
        match="NaNs detected in the merged weights. The adapter default seems to be broken",
    ):
        model.merge_adapter(safe_merge=True, **method.merge)
    assert_unchanged(before, model)
    assert not any(layer.merged for layer in model.base_model.tuner_layers())


def _spoil(file, how):
    content, state = file.read_bytes(), load_file(file)
    first = sorted(state)[0]
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "foreign":
        file.write_bytes(b"not a checkpoint")
    elif how == "empty":
        file.write_bytes(b"")
    else:
        if how == "missing key":
            del state[first]
        elif how == "extra key":
            state["something"] = torch.zeros(2)
        elif how == "other shape":
            state[first] = torch.zeros(3, 5)
        elif how == "other kind":
            state[first] = state[first].to(torch.int32)
        save_file(state, file)


@pytest.mark.parametrize(
    "how",
    ["truncated", "foreign", "empty", "missing key", "extra key", "other shape", "other kind"],
)
def test_checkpoints_that_do_not_fit(model, tmp_path, how):
    model.save_pretrained(tmp_path)
    _spoil(tmp_path / "adapter_model.safetensors", how)
    base = mlp()
    for target, load in [
        (base, lambda: PeftModel.from_pretrained(base, tmp_path)),
        (model, lambda: model.load_adapter(tmp_path, "new")),
        (model, lambda: model.load_adapter(tmp_path, "default")),
    ]:
        before = snapshot(target)
        with pytest.raises(RuntimeError, match="adapter|checkpoint|weights"):
            load()
        assert_unchanged(before, target)
    assert list(model.peft_config) == ["default"]


STRAY = [
    "base_model.model.0.rotary_emb.inv_freq",
    "base_model.model.0.base_layer.weight",
    "base_model.model.4.bias",
    "something",
]


def test_what_has_no_place_is_left_out_on_request(method, tmp_path):
    """The rest is loaded and what is left is named; a tensor that the file lacks stays as it
    starts, or as it is.
    """
    base, x = mlp(), torch.randn(3, 8)
    model = get_peft_model(copy.deepcopy(base), method.config(target_modules=TARGETS)).eval()
    expected = model(x, **method.call)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    save_file({**state, **{key: torch.zeros(2) for key in STRAY}}, file)
    with pytest.raises(
        RuntimeError, match="Unexpected keys: .*something.*Pass `strict=False` to load the rest"
    ):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.warns(
        UserWarning,
        match=f"loaded with `strict=False`. In the file, and without a place in the adapter: .*{STRAY[0]}",
    ):
        loaded = PeftModel.from_pretrained(base, tmp_path, strict=False)
    torch.testing.assert_close(loaded(x, **method.call), expected)
    for name in ("new", "default"):
        with pytest.warns(UserWarning, match="strict=False"):
            result = loaded.load_adapter(tmp_path, name, strict=False)
        assert (result.missing_keys, sorted(result.unexpected_keys)) == ([], sorted(STRAY))
    loaded.set_adapter("new")
    torch.testing.assert_close(loaded(x, **method.call), expected)

    first = next(key for key in sorted(state) if "vector_bank" not in key)
    lacking = {key: tensor for key, tensor in state.items() if key != first}
    save_file(lacking, file)
    before = {name: p.detach().clone() for name, p in loaded.named_parameters() if ".new" in name}
    for name in ("more", "new"):
        with pytest.warns(UserWarning, match=f"Missing, and left as they were: {re.escape(first)}"):
            result = loaded.load_adapter(tmp_path, name, strict=False)
        assert not result.unexpected_keys and len(result.missing_keys) == 1
        assert torch.isfinite(loaded.get_parameter(result.missing_keys[0])).all()
    assert torch.equal(loaded.get_parameter(result.missing_keys[0]), before[result.missing_keys[0]])
    save_file({"other": torch.zeros(2)}, file)
    with pytest.raises(
        RuntimeError,
        match="does not hold this adapter's weights; nothing .*No key fits, so `strict=False` has",
    ):
        PeftModel.from_pretrained(base, tmp_path, strict=False)
    save_file({**state, first: torch.zeros(3, 5)}, file)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    for name in ("another", "new"):
        with pytest.raises(
            RuntimeError,
            match="nothing was loaded. size mismatch .* `ignore_mismatched_sizes=True` leaves these",
        ):
            loaded.load_adapter(tmp_path, name, strict=False)
    after = loaded.state_dict()
    assert after.keys() == before.keys() and all(
        torch.equal(after[name], before[name]) for name in before
    )


def test_names_of_a_models_own_tensors_are_understood_on_request(method, tmp_path):
    """As in the state dict of a whole model, which programs write by themselves."""
    base, x = mlp(), torch.randn(3, 8)
    model = get_peft_model(
        copy.deepcopy(base), method.config(target_modules=TARGETS, modules_to_save=["4"])
    ).eval()
    model.add_adapter("other", method.config(target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    state = {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=r"without a place in the adapter: .*base_layer\.weight"):
        loaded = PeftModel.from_pretrained(base, tmp_path, strict=False)
    torch.testing.assert_close(loaded(x, **method.call), model(x, **method.call))


def test_a_state_dict_of_other_shapes(model):
    state = {key: torch.zeros(3, 5) for key in peft.get_peft_model_state_dict(model)}
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(model, state)
    assert_unchanged(before, model)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        result = set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
    assert len(result.missing_keys) == len(state)
    assert set(result.missing_keys) <= set(dict(model.named_parameters()))
    assert_unchanged(before, model)


LOADING = ["is_trainable", "strict", "ignore_mismatched_sizes", "autocast_adapter_dtype"]
SWITCHES = {
    "from_pretrained": (
        lambda model, path, base: partial(PeftModel.from_pretrained, base, path),
        LOADING,
    ),
    "load_adapter": (lambda model, path, base: partial(model.load_adapter, path, "new"), LOADING),
    "load_adapter again": (
        lambda model, path, base: partial(model.load_adapter, path, "default"),
        LOADING,
    ),
    "Auto": (
        lambda model, path, base: partial(peft.AutoPeftModel.from_pretrained, path),
        LOADING[:3],
    ),
    "save_pretrained": (
        lambda model, path, base: partial(model.save_pretrained, path / "new"),
        ["safe_serialization", "is_main_process", "save_embedding_layers"],
    ),
    "get state": (
        lambda model, path, base: partial(peft.get_peft_model_state_dict, model),
        ["save_embedding_layers"],
    ),
    "set state": (
        lambda model, path, base: partial(set_peft_model_state_dict, model, {}),
        ["ignore_mismatched_sizes"],
    ),
    "set base": (
        lambda model, path, base: partial(set_base_model_state_dict, model, {}),
        ["strict"],
    ),
    "add_adapter": (
        lambda model, path, base: partial(
            model.add_adapter, "new", copy.deepcopy(model.peft_config["default"])
        ),
        ["low_cpu_mem_usage", "autocast_adapter_dtype"],
    ),
    "get_peft_model": (
        lambda model, path, base: partial(
            get_peft_model, base, copy.deepcopy(model.peft_config["default"])
        ),
        ["mixed", "low_cpu_mem_usage", "autocast_adapter_dtype"],
    ),
    "inject": (
        lambda model, path, base: partial(
            peft.inject_adapter_in_model, copy.deepcopy(model.peft_config["default"]), base
        ),
        ["low_cpu_mem_usage"],
    ),
    "load_lokr_file": (
        lambda model, path, base: partial(peft.load_lokr_file, base, {}),
        ["is_trainable", "ignore_unplaced"],
    ),
    "copy_adapter": (
        lambda model, path, base: partial(model.copy_adapter, "default", "new"),
        ["reference"],
    ),
}


@pytest.mark.parametrize("where", SWITCHES)
def test_switches_are_true_or_false(where, tmp_path):
    model = get_peft_model(mlp(), LoKrConfig(r=2, target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    base = mlp()
    before = snapshot(model), snapshot(base)
    make, names = SWITCHES[where]
    for name in names:
        for value in (None, "no", 2, []):
            with pytest.raises(
                TypeError, match=re.escape(f"`{name}`={value!r} must be True or False")
            ):
                make(model, tmp_path, base)(**{name: value})
    assert_unchanged(before[0], model)
    assert_unchanged(before[1], base)
    assert list(model.peft_config) == ["default"] and not (tmp_path / "new").exists()


def test_numbers_and_numpys_are_as_good_as_true_and_false(tmp_path):
    model = get_peft_model(mlp(), LoKrConfig(r=2, target_modules=TARGETS))
    model.save_pretrained(tmp_path, is_main_process=numpy.array(1) > 0)
    for value in (0, numpy.array(1) > 2, False):
        assert not PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=value).training


def test_files_that_are_not_there(model, tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
            PeftModel.from_pretrained(mlp(), path)
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{broken")
    with pytest.raises(ValueError, match="not valid JSON"):
        PeftModel.from_pretrained(mlp(), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"foo": 1}')
    with pytest.raises(TypeError, match="missing required keys: {'peft_type'}"):
        PeftModel.from_pretrained(mlp(), tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(tmp_path / "README.md")


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was run')",))


def test_a_legacy_file_can_not_run_code(model, method, tmp_path):
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    x = torch.randn(3, 8)
    torch.manual_seed(0)
    assert loaded(x, **method.call).shape == (3, 8)
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"x": Bomb()}))
    with pytest.raises(RuntimeError, match="not a readable weights file"):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_unknown_keys_in_a_config_are_named_and_ignored(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("{", '{"from_the_future": 1,', 1))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['from_the_future'\]"):
        PeftModel.from_pretrained(mlp(), tmp_path)


@pytest.mark.parametrize(
    "container",
    [nn.ModuleList([nn.Linear(2, 2)]), nn.ParameterDict({"a": nn.Parameter(torch.zeros(1))})],
)
def test_containers_are_no_modules_to_save(method, container):
    model = mlp()
    model.add_module("some", container)
    before = snapshot(model)
    with pytest.raises(
        TypeError,
        match=r"modules_to_save cannot be applied to modules of type <class 'torch.*'> \(`some`\)",
    ):
        get_peft_model(model, method.config(target_modules=TARGETS, modules_to_save=["some"]))
    assert_unchanged(before, model)


def test_everything_is_excluded(method):
    with pytest.raises(ValueError, match="All modules were excluded"):
        get_peft_model(mlp(), method.config(target_modules=TARGETS, exclude_modules=".*"))


def test_another_revision_is_said(method):
    config = method.config(target_modules=TARGETS, revision="a")
    with pytest.warns(
        UserWarning, match="already set base model revision to a, overwriting with revision b"
    ):
        model = get_peft_model(mlp(), config, revision="b")
    assert (config.revision, model.peft_config["default"].revision) == ("a", "b")


def test_active_adapters_are_named_once(method):
    model = peft.get_peft_model(mlp(), method.config(target_modules=TARGETS))
    before = snapshot(model)
    with pytest.raises(peft.PeftError, match="names an adapter twice"):
        model.set_adapter(["default", "default"])
    for call in (
        model.set_adapter,
        model.base_model.set_adapter,
        partial(peft.functional.set_adapter, model),
    ):
        with pytest.raises(peft.PeftError, match=r"=\[\] names no adapter.*`disable_adapter\(\)`"):
            call([])
    assert_unchanged(before, model)
    assert model.active_adapters == ["default"]


def test_the_name_for_no_adapter_is_taken(method):
    model = peft.get_peft_model(mlp(), method.config(target_modules=TARGETS))
    before = snapshot(model)
    with pytest.raises(peft.PeftError, match="means no adapter"):
        model.add_adapter("__base__", method.config(target_modules=TARGETS))
    assert_unchanged(before, model)


READERS = {
    "from_pretrained": lambda model, base, folder, state: PeftModel.from_pretrained(base, folder),
    "a new adapter": lambda model, base, folder, state: model.load_adapter(folder, "new"),
    "an adapter there": lambda model, base, folder, state: model.load_adapter(folder, "default"),
    "strict=False": lambda model, base, folder, state: model.load_adapter(
        folder, "new", strict=False
    ),
    "a state dict": lambda model, base, folder, state: set_peft_model_state_dict(model, state),
    "hotswap": lambda model, base, folder, state: hotswap_adapter(model, folder, "default"),
}


@pytest.mark.parametrize("reader", READERS)
def test_values_of_a_run_that_diverged_are_loaded_and_named(method, reader, tmp_path):
    base = mlp()
    model = get_peft_model(copy.deepcopy(base), method.config(target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    first, *_, last = keys = [key for key in sorted(state) if state[key].is_floating_point()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        READERS[reader](model, copy.deepcopy(base), tmp_path, state)
    state[first].view(-1)[-1], state[last].view(-1)[0] = torch.nan, torch.inf
    save_file(state, file)
    with pytest.warns(
        UserWarning,
        match=f"has values that are NaN or infinite.*{re.escape(first)}, {re.escape(last)}. It",
    ):
        loaded = READERS[reader](copy.deepcopy(model), copy.deepcopy(base), tmp_path, state)
    if reader == "from_pretrained":
        assert sum(int(not p.isfinite().all()) for p in loaded.parameters()) == 2 <= len(keys)
    parts = nn.ModuleList([model, base])
    before = snapshot(parts)
    with warnings.catch_warnings():  # told before anything is changed
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="NaN or infinite"):
            READERS[reader](model, base, tmp_path, state)
    assert_unchanged(before, parts)


def test_values_that_the_adapters_dtype_does_not_hold_are_named():
    fields = {"target_modules": ["0"], "r": 2}
    wide = get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(**fields))
    wide.base_model.model[0].lora_A["default"].weight.data[1, 2] = -7e4
    state = peft.get_peft_model_state_dict(wide)
    half = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)).half(),
        peft.LoraConfig(**fields),
        autocast_adapter_dtype=False,
    )
    with pytest.warns(
        UserWarning,
        match=r"infinite in the dtype of the adapter in the model: .*lora_A.weight \(7e\+04\)",
    ):
        set_peft_model_state_dict(half, state)


def test_minus_infinity_is_a_logit(tmp_path):
    fields = {"target_modules": ["0"], "r": 2, "num_vectors": 6, "vector_length": 4}
    compact = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), VBLoRAConfig(**fields, save_only_topk_weights=True)
    )
    compact.save_pretrained(tmp_path)
    logits = VBLoRAConfig(**fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), tmp_path, config=logits)
    assert model.base_model.model[0].vblora_logits_A["default"].isneginf().any()
    state = peft.get_peft_model_state_dict(model)
    next(tensor for key, tensor in state.items() if key.endswith("logits_A"))[0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="NaN or infinite.*logits_A. It"):
        set_peft_model_state_dict(model, state)


@pytest.mark.parametrize("wrong", [[1], {"0.weight": 1.0}, None])
def test_base_weights_must_be_a_dictionary_of_tensors(wrong):
    model = get_peft_model(mlp(), METHODS["LORA"].config(target_modules=["0"]))
    with pytest.raises(TypeError, match="must be a (dictionary of tensors|tensor)"):
        set_base_model_state_dict(model, wrong)
