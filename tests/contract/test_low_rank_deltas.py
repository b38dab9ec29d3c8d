# SPDX-License-Identifier: Apache-2.0
"""An adapter's deltas for a base model, read without a trace in it."""

import copy

import pytest
import torch
from tests.helpers.methods import METHODS
from torch import nn

import peft
from peft.base.errors import CheckpointError, CheckpointNotFoundError, PeftNotSupportedError
from peft.checkpoint.digests import adapter_digest
from peft.core.low_rank_deltas import DeltaReader, deltas_by_task, loaded_deltas, low_rank_deltas


def mlp(width=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 16))


def tuned(method, base, **more):
    torch.manual_seed(1)
    config = METHODS[method].config(target_modules=["0", "2"], **more)
    return peft.get_peft_model(copy.deepcopy(base), config)


def state_of(model):
    tensors = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    return repr(model), tensors, {path: set(vars(m)) for path, m in model.named_modules()}


@pytest.mark.parametrize("method", METHODS)
def test_deltas_are_those_of_the_loaded_adapter_and_leave_no_trace(method, tmp_path):
    base = mlp()
    model, before = tuned(method, base), state_of(base)
    model.save_pretrained(tmp_path)
    found = deltas_by_task(base, tmp_path)
    assert state_of(base) == before
    tasks = METHODS[method].fields.get("n_tasks", 0)
    assert list(found) == ([f"task_{i}" for i in range(tasks)] if tasks else [""])
    for task, deltas in enumerate(found.values()):
        option = {"task_id": task} if tasks else {}
        again = low_rank_deltas(base, tmp_path, **option)
        for path in ("0", "2"):
            layer = model.get_base_model().get_submodule(path)
            dense = layer.get_delta_weight("default", **option)
            torch.testing.assert_close(deltas[path].B @ deltas[path].A, dense)
            torch.testing.assert_close(again[path].B @ again[path].A, dense)
            assert deltas[path].error == 0


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_in_memory_and_a_base_with_adapters(method):
    base = mlp()
    model = tuned(method, base)
    pair = model.peft_config["default"], peft.get_peft_model_state_dict(model)
    plain, adapted = deltas_by_task(base, pair), deltas_by_task(tuned("LORA", base), pair)
    for task in plain:
        for path, delta in plain[task].items():
            torch.testing.assert_close(adapted[task][path].A, delta.A)


@pytest.mark.parametrize("method", METHODS)
def test_deltas_of_an_adapter_on_the_model_have_its_present_scale(method):
    model = tuned(method, mlp())
    layer = model.get_base_model()[0]
    layer.set_scale("default", 0.25)
    for task, deltas in enumerate(loaded_deltas(model, "default").values()):
        option = {"task_id": task} if "n_tasks" in METHODS[method].fields else {}
        dense = layer.get_delta_weight("default", **option)
        torch.testing.assert_close(deltas["0"].B @ deltas["0"].A, dense)


@pytest.mark.parametrize("method", METHODS)
def test_one_reader_for_many_adapters(method, tmp_path):
    """Layers are filled again for an equal config, and made again for another."""
    read = DeltaReader(mlp())
    models = []
    for seed, more in enumerate(({}, {}, {"r": 1}, {})):
        torch.manual_seed(seed)
        config = METHODS[method].config(target_modules=["0", "2"], **more)
        models.append(peft.get_peft_model(mlp(), config))
        models[-1].save_pretrained(tmp_path / str(seed))
    found = [read(tmp_path / str(seed)) for seed in range(4)]
    for model, views in zip(models, found, strict=True):
        for task, deltas in enumerate(views.values()):
            option = {"task_id": task} if len(views) > 1 else {}
            layer = model.get_base_model()[0]
            dense = layer.get_delta_weight("default", **option)
            torch.testing.assert_close(deltas["0"].B @ deltas["0"].A, dense)


def test_a_blend_of_tasks(tmp_path):
    base = mlp()
    model = tuned("POLY", base, task_names=["a", "b", "c"])
    model.save_pretrained(tmp_path)
    shares = {"a": 0.5, "c": -2.0}
    model.extract_tasks("blend", shares)  # mixes skills, not deltas
    blend, layer = low_rank_deltas(base, tmp_path, shares)["0"], model.get_base_model()[0]
    torch.testing.assert_close(blend.B @ blend.A, layer.get_delta_weight("blend"))


def test_what_is_more_than_deltas_is_refused_by_name(tmp_path):
    base = mlp()
    cases = {
        "modules_to_save": (
            peft.LoKrConfig(r=2, target_modules=["0"], modules_to_save=["2"]),
            "trains `2`",
        ),
        "bias": (peft.LoraConfig(r=2, target_modules=["0"], bias="all"), "biases"),
        "dora": (peft.LoraConfig(r=2, target_modules=["0"], use_dora=True), "DoRA"),
        "input": (
            peft.PolyConfig(r=2, poly_type="mope", target_modules=["0"]),
            "depends on the input",
        ),
    }
    for name, (config, message) in cases.items():
        peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / name)
        before = state_of(base)
        with pytest.raises(PeftNotSupportedError, match=message) as caught:
            deltas_by_task(base, tmp_path / name)
        assert name in str(caught.value)  # the folder
        assert state_of(base) == before
        model = peft.get_peft_model(copy.deepcopy(base), config)
        with pytest.raises(PeftNotSupportedError, match=message):
            loaded_deltas(model, "default")
        if name in ("modules_to_save", "bias"):
            saved = deltas_by_task(base, tmp_path / name, deltas_only=True)[""]
            assert state_of(base) == before
            assert list(saved) == list(loaded_deltas(model, "default", deltas_only=True)[""])


def test_a_wrong_base_model_and_a_missing_adapter(tmp_path):
    tuned("LORA", mlp()).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="fit this base model.*size mismatch"):
        low_rank_deltas(mlp(24), tmp_path / "a")
    with pytest.raises(ValueError, match="Target module"):
        low_rank_deltas(nn.ModuleDict({"x": nn.Linear(2, 2)}), tmp_path / "a")
    with pytest.raises(CheckpointNotFoundError):
        low_rank_deltas(mlp(), tmp_path / "b")
    with pytest.raises(TypeError, match="pair of its config"):
        low_rank_deltas(mlp(), ({}, {}))


def test_the_digest_changes_with_weights_and_config(tmp_path):
    model = tuned("LORA", mlp())
    model.save_pretrained(tmp_path)
    first = adapter_digest(tmp_path)
    model.save_pretrained(tmp_path)
    assert adapter_digest(tmp_path) == first
    model.peft_config["default"].lora_alpha = 7
    model.save_pretrained(tmp_path)
    second = adapter_digest(tmp_path)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)
    model.save_pretrained(tmp_path)
    assert len({first, second, adapter_digest(tmp_path)}) == 3
