# SPDX-License-Identifier: Apache-2.0
"""Short forms of the campaigns of `torture/`, and planted faults that they have to find."""

import os
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torture import (
    allocations,
    faults,
    file_systems,
    power,
    resuming,
    scenarios,
    sharded,
    threads,
    together,
    tracer,
)

from peft.base.calls import running
from peft.checkpoint import files
from peft.core import loading

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not tracer.is_supported(), reason="traces processes on Linux on x86-64"),
]


def scenario(name):
    return next(s for s in (*scenarios.writes(), *scenarios.reads()) if s.name == name)


def findings(tries):
    return [f"{what}: {wrong}" for what, wrong in tries if wrong is not None]


def loses_something(tries):
    return any(wrong is not None for _, wrong in tries)


@pytest.fixture
def every_thirtieth(monkeypatch):
    every = faults.faults_of
    monkeypatch.setattr(faults, "faults_of", lambda calls: list(every(calls))[::30])


@pytest.mark.parametrize("name", ["save LORA over another", "save a bank over another"])
def test_a_save_survives_faults_and_kills(name, tmp_path, every_thirtieth):
    assert not findings(faults.writing(scenario(name), tmp_path / "work"))


@pytest.mark.parametrize(
    "name", ["load VBLORA beside another", "load LORA after an interrupted save"]
)
def test_a_load_that_fails_changes_nothing(name, tmp_path, every_thirtieth):
    assert not findings(faults.reading(scenario(name), tmp_path / "work"))


@pytest.mark.parametrize("name", ["save LORA over a legacy file", "save a LoKr file over another"])
def test_a_power_cut_leaves_the_old_content_or_the_new(name, tmp_path):
    assert not findings(power.cutting(scenario(name), tmp_path / "work"))


CHANGES = {change.name: change for change in allocations.changes()}


@pytest.mark.parametrize(
    "name",
    [
        "load over an adapter LOHA",
        "load beside another VBLORA",
        "merge POLY",
        "unmerge LOKR",
        "add tasks POLY",
        "add skills POLY",
        "combine LORA",
    ],
)
def test_no_memory_at_any_allocation_leaves_the_model_as_it_was(name, tmp_path):
    assert not findings(allocations.exhausting(CHANGES[name], tmp_path / "work"))


def test_a_change_in_steps_is_found(tmp_path):
    def halfway(model, folder):
        for layer in (model.base_model.model[0], model.base_model.model[2]):
            layer.merge()

    broken = replace(CHANGES["merge LORA"], work=halfway)
    assert loses_something(allocations.exhausting(broken, tmp_path / "work"))


def test_a_missing_sync_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "sync_folder", lambda folder: None)
    assert loses_something(power.cutting(scenario("save LORA over another"), tmp_path / "work"))


@pytest.mark.parametrize("name", ["save LORA over another", "save a LoKr file over another"])
def test_a_save_where_the_file_system_lacks_something(name, tmp_path):
    found = list(file_systems.saving(scenario(name), tmp_path / "work"))
    assert len([what for what, _ in found if "killed" in what]) > 3
    assert not findings(found)


def test_a_write_in_place_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "replace_file", lambda path, write: write(path))
    broken = scenario("save a bank over another")
    assert loses_something(faults.writing(broken, tmp_path / "work"))
    assert loses_something(file_systems.saving(broken, tmp_path / "work"))


def test_the_tracer_sees_calls_and_makes_them_fail(tmp_path):
    path = tmp_path / "file"

    def work():
        try:
            path.write_text("text")
        except OSError as error:
            return error.errno
        return path.read_text()

    clean = tracer.run(work, tmp_path)
    assert clean.value == "text"
    calls = [call.name for call in clean.calls]
    assert calls[0] == "openat"
    at = calls.index("write")
    assert clean.calls[at].data == b"text"
    assert clean.calls[at].paths == (str(path),)
    assert tracer.run(work, tmp_path, tracer.Fault(at, "error", 28)).value == 28
    assert tracer.run(work, tmp_path, tracer.Fault(at, "kill")).killed
    assert path.read_bytes() == b""
    assert tracer.run(work, tmp_path, tracer.Fault(at, "short")).value == "text"  # written on
    assert not os.path.exists(tmp_path / "other")


def test_two_writers_and_readers_see_whole_adapters(tmp_path):
    found = list(together.meeting(scenario("save LORA over another"), tmp_path, seconds=3))
    assert len(found) > 10
    assert not findings(found)


@pytest.mark.parametrize("name", ["all LOKR", "one name LORA", "tasks and skills POLY"])
def test_threads_that_call_a_model_while_others_change_it(name, tmp_path):
    kind = next(kind for kind in threads.scenarios() if kind.name == name)
    assert not findings(threads.meeting(kind, tmp_path / "work", calls=40))


def test_calls_that_changes_do_not_see_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(running.RunningCalls, "during", lambda self, names: nullcontext())
    kind = next(kind for kind in threads.scenarios() if kind.name == "switch LOKR")
    assert loses_something(threads.meeting(kind, tmp_path / "work", calls=200))


SHARDED = next(kind for kind in sharded.scenarios() if kind.name == "FSDP2 LORA")


@pytest.mark.distributed
def test_a_process_killed_in_a_sharded_save_leaves_the_old_adapter_or_the_new(tmp_path):
    assert not findings(sharded.killing(SHARDED, tmp_path / "work", kills=1))


@pytest.mark.distributed
def test_a_sharded_save_that_empties_the_folder_first_is_found(tmp_path):
    def emptying(model, folder):
        (folder / "adapter_model.safetensors").unlink(missing_ok=True)
        SHARDED.save(model, folder)

    broken = replace(SHARDED, save=emptying)
    assert loses_something(sharded.killing(broken, tmp_path / "work", kills=2))


RUNS = {kind.name: kind for kind in resuming.scenarios()}


@pytest.mark.parametrize("name", ["loop POLY"])
def test_a_killed_run_is_resumed_as_if_it_had_gone_on(name, tmp_path):
    assert not findings(resuming.resuming(RUNS[name], tmp_path / "work", kills=1))


def test_a_resumed_run_with_other_random_numbers_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    assert loses_something(resuming.resuming(RUNS["loop POLY"], tmp_path / "work", kills=0))


def test_a_save_between_config_and_weights_is_noticed(tmp_path, monkeypatch):
    old, new = scenarios.adapted("LORA", 1), scenarios.adapted("LORA", 2)
    old.save_pretrained(tmp_path)
    real, saves = loading.load_peft_weights, [new.save_pretrained]

    def interrupted(*args, **kwargs):
        while saves:
            saves.pop()(tmp_path)
        return real(*args, **kwargs)

    monkeypatch.setattr(loading, "load_peft_weights", interrupted)
    model = scenarios.PeftModel.from_pretrained(scenarios.base(), tmp_path)
    assert model.peft_config["default"].lora_alpha == 2
    assert scenarios.outputs(model) == scenarios.outputs(new)
