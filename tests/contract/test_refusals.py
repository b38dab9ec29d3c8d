# SPDX-License-Identifier: Apache-2.0
"""More input that can't be honoured: refused with a message of its own; model, config, random state
and files stay as they were.
"""

import copy
import os
import pickle
import re

import numpy as np
import pytest
import torch
from helpers.methods import METHODS
from helpers.models import TARGETS, gpt2, llama, mlp
from helpers.states import assert_unchanged, snapshot
from safetensors.torch import save_file
from torch import nn

import peft
from peft import (
    LoKrConfig,
    PeftConfig,
    PeftModel,
    PolyConfig,
    VBLoRAConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.utils.hotswap import hotswap_adapter


def everything(model, *configs, folder=None):
    """The snapshot, with hooks, configs and files."""
    hooks = {
        n: (list(m._forward_pre_hooks), list(m._forward_hooks)) for n, m in model.named_modules()
    }
    fields = [copy.deepcopy(vars(config)) for config in configs]
    files = (
        {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} if folder else {}
    )
    known = {name: copy.deepcopy(vars(c)) for name, c in getattr(model, "peft_config", {}).items()}
    return snapshot(model), (hooks, fields, files, known)


def assert_same(before, model, *configs, folder=None):
    assert_unchanged(before[0], model)
    assert everything(model, *configs, folder=folder)[1] == before[1]


WRONG = [
    (PolyConfig, {"n_tasks": 1.0}, "n_tasks"),
    (PolyConfig, {"n_tasks": True}, "n_tasks"),
    (PolyConfig, {"n_skills": "4"}, "n_skills"),
    (PolyConfig, {"n_splits": None}, "n_splits"),
    (PolyConfig, {"r": None}, "r"),
    (PolyConfig, {"poly_type": None}, "poly_type"),
    (PolyConfig, {"init_weights": 1}, "init_weights"),
    (PolyConfig, {"exclude_modules": "(["}, "exclude_modules"),
    (PolyConfig, {"modules_to_save": [1]}, "modules_to_save"),
    (PolyConfig, {"target_modules": ["a", 1]}, "target_modules"),
    (PolyConfig, {"inference_mode": "no"}, "inference_mode"),
    (VBLoRAConfig, {"topk": True}, "topk"),
    (VBLoRAConfig, {"topk": 1.5}, "topk"),
    (VBLoRAConfig, {"num_vectors": "60"}, "num_vectors"),
    (VBLoRAConfig, {"num_vectors": -1}, "num_vectors"),
    (VBLoRAConfig, {"vector_length": True}, "vector_length"),
    (VBLoRAConfig, {"bias": None}, "bias"),
    (VBLoRAConfig, {"bias": "lora_only"}, "bias"),
    (VBLoRAConfig, {"vblora_dropout": -0.1}, "vblora_dropout"),
    (VBLoRAConfig, {"vblora_dropout": float("nan")}, "vblora_dropout"),
    (VBLoRAConfig, {"save_only_topk_weights": "yes"}, "save_only_topk_weights"),
    (VBLoRAConfig, {"init_logits_std": float("inf")}, "init_logits_std"),
    (VBLoRAConfig, {"layers_to_transform": "0"}, "layers_to_transform"),
    (VBLoRAConfig, {"layers_to_transform": True}, "layers_to_transform"),
    (VBLoRAConfig, {"layers_to_transform": [0], "layers_pattern": ["(["]}, "layers_pattern"),
    (LoKrConfig, {"r": 0}, "r"),
    (LoKrConfig, {"r": True}, "r"),
    (LoKrConfig, {"alpha": float("nan")}, "alpha"),
    (LoKrConfig, {"alpha": True}, "alpha"),
    (LoKrConfig, {"module_dropout": "0.1"}, "module_dropout"),
    (LoKrConfig, {"rank_dropout_scale": "no"}, "rank_dropout_scale"),
    (LoKrConfig, {"use_effective_conv2d": 0}, "use_effective_conv2d"),
    (LoKrConfig, {"decompose_factor": -2}, "decompose_factor"),
    (LoKrConfig, {"decompose_factor": 2.0}, "decompose_factor"),
    (LoKrConfig, {"init_weights": 2}, "init_weights"),
    (LoKrConfig, {"rank_pattern": {"([": 4}}, "rank_pattern"),
    (LoKrConfig, {"rank_pattern": {"a": True}}, "rank_pattern"),
    (LoKrConfig, {"alpha_pattern": {"a": "x"}}, "alpha_pattern"),
    (LoKrConfig, {"task_type": 3}, "task type"),
]


@pytest.mark.parametrize(("config_cls", "fields", "name"), WRONG, ids=lambda value: str(value)[:50])
def test_config_values(config_cls, fields, name):
    value = next(iter(fields.values()))
    with pytest.raises(ValueError, match=name) as info:
        config_cls(**fields)
    assert isinstance(info.value, peft.PeftError)
    if not isinstance(
        value, (list, dict)
    ):  # of a collection, the entry that is wrong may be shown alone
        assert str(value) in str(info.value)


def test_unknown_arguments_of_a_config_are_refused(method):
    with pytest.raises(TypeError, match="no_such_field"):
        method.config(no_such_field=1)


@pytest.mark.parametrize(
    ("layer", "mention"),
    [
        (nn.EmbeddingBag(8, 8), "EmbeddingBag"),
        (nn.LayerNorm(8), "LayerNorm"),
        (nn.Bilinear(8, 8, 8), "Bilinear"),
        (nn.LSTM(8, 8), "LSTM"),
        (nn.ConvTranspose1d(8, 8, 3), "ConvTranspose1d"),
        (nn.LazyLinear(8), "LazyLinear"),
        (nn.Sequential(nn.Linear(8, 8)), "Sequential"),
        (nn.MultiheadAttention(8, 2, kdim=4), "Only same embed for query/key/value"),
        (
            nn.Linear(8, 8, dtype=torch.complex64),
            r"complex numbers \(torch.complex64\), and adapters are real",
        ),
        (nn.Conv2d(8, 8, 1, dtype=torch.complex64), "complex numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_cannot_be_adapted(method, layer, mention):
    model = nn.ModuleDict({"fine": nn.Linear(8, 8), "odd": copy.deepcopy(layer)})
    config = method.config(target_modules=["fine", "odd"])
    uninitialised = mention == "LazyLinear"  # such a parameter can't be copied into a snapshot
    before = None if uninitialised else everything(model, config)
    with pytest.raises(TypeError, match=rf"`odd`.*{mention}") as info:
        get_peft_model(model, config)
    assert isinstance(info.value, peft.PeftError)
    if uninitialised:
        assert all(p.requires_grad for p in model.parameters())
        assert type(model["fine"]) is nn.Linear
    else:
        assert_same(before, model, config)


def test_complex_layers_are_left_out_or_trained_whole(method, tmp_path):
    """A copy of a complex layer has the gradient of the layer itself."""

    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.real, self.head = nn.Linear(8, 8), nn.Linear(8, 4, dtype=torch.complex64)

        def forward(self, x):
            return self.head(self.real(x).to(torch.complex64))

    base = Spectral()
    x, head = torch.randn(3, 8), copy.deepcopy(base.head)
    with pytest.warns(
        UserWarning, match="'all-linear' leaves out `head`: its weights are complex numbers"
    ):
        model = get_peft_model(copy.deepcopy(base), method.config(target_modules="all-linear"))
    assert model.targeted_module_names == ["real"]
    model = get_peft_model(
        base, method.config(target_modules=["real"], modules_to_save=["head"])
    ).eval()
    seen = []
    base.head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(x, **method.call).abs().square().sum().backward()
    head(seen[0]).abs().square().sum().backward()
    torch.testing.assert_close(base.head.modules_to_save["default"].weight.grad, head.weight.grad)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(Spectral(), tmp_path)
    assert torch.equal(again.base_model.model.head.weight, base.head.weight)


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Conv3d"])
def test_convolutions_are_adapted_or_refused_by_name(method, kind):
    model = nn.ModuleDict({"conv": getattr(nn, kind)(8, 8, 3)})
    config = method.config(target_modules=["conv"])
    before = everything(model, config)
    try:
        adapted = get_peft_model(model, config)
    except TypeError as error:
        assert kind in str(error)
        assert_same(before, model, config)
    else:
        x = torch.randn(2, 8, *[4] * int(kind[4]))
        layer = adapted.base_model.model["conv"]
        assert not torch.equal(layer(x), layer.get_base_layer()(x))


def test_a_block_with_sizes_and_no_weight_is_no_linear_map(method):
    """`all-linear` means layers whose weight is a linear map, not a block that notes its sizes."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features = self.out_features = 8
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x).relu()

    model = get_peft_model(
        nn.Sequential(Block(), nn.Linear(8, 8)), method.config(target_modules="all-linear")
    )
    assert set(model.peft_config["default"].target_modules) == {"0.linear", "1"}
    with pytest.raises(TypeError, match="`0`"):
        get_peft_model(nn.Sequential(Block(), nn.Linear(8, 8)), method.config(target_modules=["0"]))


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_layers_whose_sizes_are_numbers_of_numpy(method, kind, tmp_path):
    """Models that compute their sizes with numpy have layers like others: the same layer with
    Python's integers gives the same outputs from the same file.
    """

    def base(number):
        torch.manual_seed(0)
        if kind == "linear":
            layer = nn.Linear(number(8), number(16))
        elif kind == "conv":
            layer = nn.Conv2d(number(8), number(16), number(3))
        else:
            layer = nn.Embedding(number(8), number(16))
        return nn.ModuleDict({"layer": layer})

    def call(model):
        x = {"linear": torch.randn(2, 8), "conv": torch.randn(2, 8, 5, 5)}
        inputs = x[kind] if kind in x else torch.tensor([[1, 2], [3, 4]])
        return model.base_model.model["layer"](inputs)

    config = method.config(target_modules="all-linear" if kind == "linear" else ["layer"])
    if method.call:
        config.n_tasks = 1
    try:
        get_peft_model(base(int), config)
    except TypeError:
        with pytest.raises(TypeError, match="is not supported"):
            get_peft_model(base(np.int64), config)
        return
    model = get_peft_model(base(np.int64), config)
    model.save_pretrained(tmp_path)
    twin = PeftModel.from_pretrained(base(int), tmp_path)
    torch.manual_seed(1)
    output = call(model.eval())
    torch.manual_seed(1)
    torch.testing.assert_close(output, call(twin.eval()))
    assert "int64" not in str(peft.plan(base(np.int64), config))


def test_a_model_without_linear_layers_has_no_all_linear_target(method):
    """The message says what was asked for, and not that nothing was."""
    model = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3)})
    with pytest.raises(ValueError, match="modules 'all-linear' not found in the base model"):
        get_peft_model(model, method.config(target_modules="all-linear"))


def test_every_offending_layer_is_named_at_once():
    model = nn.ModuleDict(
        {name: nn.Linear(10, 6) for name in ("a", "b", "c")} | {"d": nn.Linear(8, 8)}
    )
    for config, rule in [
        (PolyConfig(n_splits=4, target_modules=list("abcd")), "n_splits"),
        (VBLoRAConfig(vector_length=4, target_modules=list("abcd")), "vector_length"),
    ]:
        before = everything(model, config)
        with pytest.raises(ValueError, match=rule) as info:
            get_peft_model(model, config)
        assert re.findall(r"`([abcd])`: `(in|out)_features", str(info.value)) == [
            (n, s) for n in "abc" for s in ("in", "out")
        ]
        assert_same(before, model, config)


@pytest.mark.parametrize("name", ["", "a.b", ".", "training", "parameters", 3, None])
def test_bad_adapter_names(method, model, name):
    config = method.config(target_modules=TARGETS)
    before = everything(model, config)
    with pytest.raises((ValueError, TypeError), match=re.escape(repr(name))) as info:
        model.add_adapter(name, config)
    assert isinstance(info.value, peft.PeftError)
    assert_same(before, model, config)


NAMED = {
    "load_adapter": lambda model, path, name: model.load_adapter(path, name),
    "save_pretrained": lambda model, path, name: model.save_pretrained(
        path, selected_adapters=[name]
    ),
    "get state": lambda model, path, name: peft.get_peft_model_state_dict(model, adapter_name=name),
    "set state": lambda model, path, name: peft.set_peft_model_state_dict(model, {}, name),
    "convert_to_lora": lambda model, path, name: peft.convert_to_lora(model, adapter_name=name),
    "supports": lambda model, path, name: model.supports_lora_conversion(name),
    "save_lokr_file": lambda model, path, name: peft.save_lokr_file(
        model, path / "new.safetensors", adapter_name=name
    ),
    "load_lokr_file": lambda model, path, name: peft.load_lokr_file(model, {}, name),
    "inject": lambda model, path, name: inject_adapter_in_model(LoKrConfig(), model, name),
    "hotswap": lambda model, path, name: hotswap_adapter(model, path, name),
    "cast": lambda model, path, name: peft.functional.cast_adapter_dtype(model, name),
    "delete": lambda model, path, name: model.delete_adapter(name),
    "copy": lambda model, path, name: model.copy_adapter(name, "new"),
    "combine": lambda model, path, name: model.add_weighted_adapter([name], [1.0], "new"),
    "merge": lambda model, path, name: model.merge_adapter([name]),
    "unload": lambda model, path, name: model.merge_and_unload(adapter_names=[name]),
    "set": lambda model, path, name: model.set_adapter([name]),
    "unfreeze": lambda model, path, name: model.set_requires_grad([name]),
}


@pytest.mark.parametrize("call", NAMED.values(), ids=NAMED)
def test_an_adapter_is_named_by_one_string(call, tmp_path):
    model = get_peft_model(mlp(), LoKrConfig(r=2, target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    before = everything(model, folder=tmp_path)
    for name in (["default"], ("default",), b"default", 3):  # None may mean the only one
        with pytest.raises(
            TypeError, match=rf"(named by one string, not |adapter_name`=){re.escape(repr(name))}"
        ) as info:
            call(model, tmp_path, name)
        assert isinstance(info.value, peft.PeftError)
    assert_same(before, model, folder=tmp_path)


@pytest.mark.parametrize(
    "name", ["a b", "ü" * 127, "0", "lokr", "model", "weight", "base_layer", "a/b"]
)
def test_odd_adapter_names_work_everywhere(method, tmp_path, name):
    x = torch.randn(3, 8)
    model = get_peft_model(
        mlp(), method.config(target_modules=TARGETS, modules_to_save=["4"]), adapter_name=name
    ).eval()
    expected = model(x, **method.call)
    model.save_pretrained(tmp_path)
    state = peft.get_peft_model_state_dict(model, adapter_name=name)
    plain = peft.get_peft_model_state_dict(
        get_peft_model(mlp(), method.config(target_modules=TARGETS, modules_to_save=["4"]))
    )
    assert state.keys() == plain.keys()
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path, adapter_name=name, subfolder=name)
    assert torch.equal(loaded(x, **method.call), expected)


def test_an_adapters_name_does_not_lead_out_of_the_folder(method, tmp_path):
    """Names become folders; one that is an absolute path must not write there."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    inside.mkdir()
    try:
        model = get_peft_model(
            mlp(), method.config(target_modules=TARGETS), adapter_name=str(outside)
        )
        model.save_pretrained(inside)
    except ValueError as error:
        assert "name" in str(error)
    assert not outside.exists()


def test_unknown_arguments(method, model, tmp_path):
    """Callers hand to loading and saving what they have for the base model, so those say what they
    make nothing of; others refuse.
    """
    model.save_pretrained(tmp_path)
    for options in ({}, {"config": PeftConfig.from_pretrained(tmp_path)}):
        with pytest.warns(UserWarning, match="no_such_option; they have no effect"):
            loaded = PeftModel.from_pretrained(mlp(), tmp_path, no_such_option=1, **options)
        assert (
            peft.get_peft_model_state_dict(loaded).keys()
            == peft.get_peft_model_state_dict(model).keys()
        )
    with pytest.warns(UserWarning, match="no_such_option; they have no effect"):
        model.save_pretrained(tmp_path, no_such_option=1)
    with pytest.raises(TypeError, match="no_such_option"):
        get_peft_model(mlp(), method.config(target_modules=TARGETS), no_such_option=1)


def test_a_failed_load_leaves_the_given_config_alone(method, model, tmp_path):
    model.save_pretrained(tmp_path)
    config = method.config(target_modules=["2", "4"])
    base = mlp()
    before = everything(base, config, folder=tmp_path)
    with pytest.raises(RuntimeError, match="does not (fit|hold)"):
        PeftModel.from_pretrained(base, tmp_path, config=config)
    assert_same(before, base, config, folder=tmp_path)


def test_a_config_of_another_method_is_refused(method, model, tmp_path):
    model.save_pretrained(tmp_path)
    other = next(m for m in METHODS.values() if m.config_cls is not method.config_cls)
    config, base = other.config(target_modules=TARGETS), mlp()
    before = everything(base, config, folder=tmp_path)
    with pytest.raises((ValueError, RuntimeError)):
        PeftModel.from_pretrained(base, tmp_path, config=config)
    assert_same(before, base, config, folder=tmp_path)
    target = get_peft_model(mlp(), other.config(target_modules=TARGETS))
    for name in ("default", "new"):
        before = everything(target, folder=tmp_path)
        with pytest.raises((ValueError, RuntimeError), match="peft types|adapter's weights"):
            target.load_adapter(tmp_path, name)
        assert_same(before, target, folder=tmp_path)


def test_values_of_another_scale_are_not_loaded_under_the_old_one(tmp_path):
    """A checkpoint whose config computes something else with the same tensors: its outputs, or an
    error that says so.
    """
    x = torch.randn(3, 8)
    fields = {"r": 2, "init_weights": False, "target_modules": TARGETS}
    saved = get_peft_model(mlp(), LoKrConfig(alpha=2, **fields)).eval()
    saved.save_pretrained(tmp_path)
    model = get_peft_model(copy.deepcopy(saved).unload(), LoKrConfig(alpha=64, **fields)).eval()
    before = everything(model)
    try:
        model.load_adapter(tmp_path, "default")
    except (ValueError, RuntimeError) as error:
        assert "alpha" in str(error)
        assert_same(before, model)
    else:
        torch.testing.assert_close(model(x), saved(x))


@pytest.mark.parametrize("entry", ["from_pretrained", "load_adapter"])
def test_a_header_that_lies_about_its_size_is_refused(model, tmp_path, entry):
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    content = path.read_bytes()
    for damaged in (content[:8], content[:-1], b"\xff" * 8 + content[8:], content + b"\0" * 16):
        path.write_bytes(damaged)
        target = mlp() if entry == "from_pretrained" else model
        before = everything(target, folder=tmp_path)
        with pytest.raises(RuntimeError, match="not a readable weights file"):
            PeftModel.from_pretrained(
                target, tmp_path
            ) if entry == "from_pretrained" else target.load_adapter(tmp_path, "new")
        assert_same(before, target, folder=tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b'{"peft_type": 3}', b'{"peft_type": null}'],
)
def test_configs_that_are_none(model, tmp_path, content):
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(content)
    for target, load in (
        (mlp(), PeftModel.from_pretrained),
        (model, lambda m, path: m.load_adapter(path, "new")),
    ):
        before = everything(target, folder=tmp_path)
        with pytest.raises((ValueError, TypeError)) as info:
            load(target, tmp_path)
        assert isinstance(info.value, peft.PeftError)
        assert_same(before, target, folder=tmp_path)


def test_config_values_in_a_file_are_checked(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 2', '"r": -2'))
    base = mlp()
    before = everything(base, folder=tmp_path)
    with pytest.raises(ValueError, match="`r`=-2"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_same(before, base, folder=tmp_path)


def test_a_checkpoint_without_its_config_or_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).unlink()
        for target, load in (
            (mlp(), PeftModel.from_pretrained),
            (model, lambda m, path: m.load_adapter(path, "new")),
        ):
            before = everything(target, folder=tmp_path)
            with pytest.raises(FileNotFoundError, match=re.escape(name)):
                load(target, tmp_path)
            assert_same(before, target, folder=tmp_path)


def test_the_wrong_file_of_a_pair_is_told_apart(method, tmp_path):
    """Weights of the right shapes and foreign names."""
    model = get_peft_model(mlp(), method.config(target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    state = {
        f"base_model.model.x{i}": t
        for i, t in enumerate(peft.get_peft_model_state_dict(model).values())
    }
    save_file(
        {key: tensor.detach().clone() for key, tensor in state.items()},
        tmp_path / "adapter_model.safetensors",
    )
    base = mlp()
    before = everything(base, folder=tmp_path)
    with pytest.raises(RuntimeError, match=r"Missing keys: .*Unexpected keys: base_model.model.x0"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_same(before, base, folder=tmp_path)


def test_injection_is_all_or_nothing(method):
    base = mlp()
    inject_adapter_in_model(method.config(target_modules=TARGETS), base)
    for config, name, message in [
        (method.config(target_modules=TARGETS), "default", "already exists"),
        (method.config(target_modules=["nothing"]), "b", "not found"),
        (method.config(target_modules=["0", "1"]), "b", "not supported"),
    ]:
        before = everything(base, config)
        with pytest.raises((ValueError, TypeError), match=message):
            inject_adapter_in_model(config, base, adapter_name=name)
        assert_same(before, base, config)


def test_saving_to_where_a_file_is_changes_nothing(method, model, tmp_path):
    (tmp_path / "file").write_text("x")
    before = everything(model, folder=tmp_path)
    with pytest.raises((ValueError, OSError)):
        model.save_pretrained(tmp_path / "file" / "inside")
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(tmp_path / "new", selected_adapters=["default", "zz"])
    assert not (tmp_path / "new").exists()
    assert_same(before, model, folder=tmp_path)


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000, "a\0b"], ids=["long", "deep", "null"])
def test_paths_that_cannot_be_are_refused_by_all_alike(tmp_path, name):
    model, path = get_peft_model(mlp(), LoKrConfig(target_modules=TARGETS)), str(tmp_path / name)
    for call in (
        lambda: model.save_pretrained(path),
        lambda: model.peft_config["default"].save_pretrained(path),
        lambda: model.load_adapter(path, "b"),
        lambda: PeftModel.from_pretrained(mlp(), path),
        lambda: PeftConfig.from_pretrained(path),
        lambda: peft.save_lokr_file(model, path),
        lambda: peft.load_lokr_file(mlp(), path),
    ):
        with pytest.raises(ValueError, match="can't be a path: it"):
            call()
    assert list(model.peft_config) == ["default"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "model.embed_tokens"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"trainable_token_indices": [3]}, "model.embed_tokens"),
    ],
    ids=["embedding", "head", "tokens"],
)
def test_a_vocabulary_that_adapters_train_keeps_its_size(fields, path):
    """The head is met after the embedding has been resized, so the check comes first."""
    model = get_peft_model(llama(), LoKrConfig(target_modules=["q_proj"], **fields))
    base, before = model.get_base_model(), everything(model)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for whole in (model, model.base_model, base, copied, copied.get_base_model()):
        with pytest.raises(ValueError, match=rf"`{path}` from 48 to 64 rows"):
            whole.resize_token_embeddings(50, pad_to_multiple_of=32)
    if path != "lm_head":
        with pytest.raises(ValueError, match="`embed_tokens` from 48 to 50 rows"):
            base.model.resize_token_embeddings(new_num_tokens=50)
    assert_same(before, model)
    assert model.resize_token_embeddings(48).weight.shape[0] == 48
    assert base.resize_token_embeddings().weight.shape[0] == 48
    assert model.unload() is base
    assert not {*vars(base), *vars(base.model)} & {"resize_token_embeddings"}
    assert base.resize_token_embeddings(50).weight.shape[0] == 50
    plain = get_peft_model(llama(), LoKrConfig(target_modules=["q_proj"]))
    assert plain.resize_token_embeddings(50).weight.shape[0] == 50
    assert plain(torch.tensor([[49]])).logits.shape[-1] == 50


def test_an_injected_adapter_of_the_head_keeps_the_vocabulary():
    base = llama()
    inject_adapter_in_model(LoKrConfig(r=2, target_modules=["lm_head"]), base)
    with pytest.raises(peft.PeftError, match="`lm_head` from 48 to 50 rows"):
        base.resize_token_embeddings(50)
    assert base.get_input_embeddings().weight.shape[0] == 48


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_layer_indices_that_match_nothing(method):
    if "layers_to_transform" not in vars(method.config()):
        with pytest.raises(TypeError, match="layers_to_transform"):
            method.config(layers_to_transform=[9])
        return
    model = gpt2()
    config = method.config(target_modules=["c_attn"], layers_to_transform=[9], layers_pattern="h")
    before = everything(model, config)
    with pytest.raises(peft.NoMatchingPeftModuleError, match="layers_to_transform"):
        get_peft_model(model, config)
    assert_same(before, model, config)


def test_saving_an_empty_adapter_is_refused(method, tmp_path):
    """An adapter on the meta device has no values to save."""
    model = get_peft_model(mlp(), method.config(target_modules=TARGETS), low_cpu_mem_usage=True)
    with pytest.raises(peft.PeftError, match="meta"):
        model.save_pretrained(tmp_path / "new")
    assert not os.path.exists(tmp_path / "new" / "adapter_model.safetensors")


def test_an_argument_for_another_method_is_not_swallowed(method):
    """transformers models take any keyword; `task_ids` must reach a method that knows it or be
    refused.
    """
    model = get_peft_model(llama(), method.config(target_modules=["q_proj"])).eval()
    ids = torch.randint(3, 48, (2, 4))
    if method.call:
        model(input_ids=ids, **method.call)
        return
    for function in (model, model.base_model, model.generate):
        with pytest.raises(TypeError, match="`task_ids` is for another method"):
            function(input_ids=ids, task_ids=torch.tensor([0, 1]))

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, task_ids):
            return self.linear(x) + task_ids[:, None]

    x = torch.randn(2, 8)
    own = get_peft_model(Own(), method.config(target_modules=["linear"])).eval()
    torch.testing.assert_close(
        own(x, task_ids=torch.tensor([1, 1])), own(x, task_ids=torch.tensor([0, 0])) + 1
    )


def test_an_adapter_without_values_is_neither_run_nor_merged():
    config = peft.LoraConfig(target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config, low_cpu_mem_usage=True)
    weight = model.base_model.model[0].weight.clone()
    for work in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(peft.PeftError, match="on the meta device and has no values yet"):
            work()
    assert torch.equal(model.base_model.model[0].weight, weight)


@pytest.mark.parametrize("training", [True, False])
def test_no_forward_adds_memory_without_values(method, training):
    """Torch multiplies by tensors on the meta device, and returns memory as it was."""
    bases = [(nn.Linear(8, 8), (2, 8)), (nn.Linear(8, 8), (8,))]
    if method.config_cls in (peft.LoraConfig, peft.LoHaConfig, peft.LoKrConfig):
        bases += [(nn.Conv1d(2, 2, 3), (2, 2, 4)), (nn.Conv2d(2, 2, 3), (2, 2, 4, 4))]
    for base, shape in bases:
        config = method.config(target_modules=["0"])
        model = get_peft_model(nn.Sequential(base), config, low_cpu_mem_usage=True).train(training)
        with pytest.raises(peft.PeftError, match="on the meta device and has no values yet"):
            model(torch.ones(shape), **method.call)
        assert model.to("meta")(torch.ones(shape, device="meta"), **method.call).is_meta


def test_no_active_adapter_has_no_active_config():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"]))
    model.base_model.activate([])
    assert model.active_adapters == []
    with pytest.raises(peft.PeftError, match="No adapter is active; `peft_config`"):
        _ = model.active_peft_config


def test_layers_that_have_not_seen_their_input(method):
    """They may stand beside the adapted layers, frozen, and get no adapter themselves."""
    lazy, x = nn.LazyLinear(8), torch.randn(3, 8)
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8), lazy), method.config(target_modules=["0"])
    )
    with model.disable_adapter():
        model(x, **method.call)
    assert not any(parameter.requires_grad for parameter in lazy.parameters())
    model(x, **method.call).sum().backward()
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8)), method.config(target_modules=["0"])
    )
    trainable, total = model.get_nb_trainable_parameters()
    assert total == trainable + 8 * 8 + 8  # the lazy ones have no size yet
    fields = [{"modules_to_save": ["1"]}]
    fields += [{"bias": "all"}] if hasattr(method.config(), "bias") else []
    for field in fields:
        base = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
        with pytest.raises(peft.PeftError, match="`1` has not seen its input yet"):
            get_peft_model(base, method.config(target_modules=["0"], **field))
        assert type(base[0]) is nn.Linear and base[0].weight.requires_grad
    for kind in (nn.LazyLinear(4), nn.LazyConv1d(4, 3), nn.LazyConv2d(4, 3)):
        with pytest.raises(
            peft.base.errors.UnsupportedModuleError, match="`0`: Target module Lazy"
        ):
            get_peft_model(nn.Sequential(kind), method.config(target_modules=["0"]))
