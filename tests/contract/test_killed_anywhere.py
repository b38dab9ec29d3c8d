# SPDX-License-Identifier: Apache-2.0
"""A saving process is killed at each of its system calls in turn; a reader sees the old adapter or
the new one.
"""

import os
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from helpers.killing import KILLED, run_killed
from helpers.models import TARGETS, mlp

import peft
from peft import LoKrConfig, PeftModel, get_peft_model
from peft.checkpoint import files
from peft.utils.error import CheckpointWriteError


def adapter(rank):
    torch.manual_seed(rank)
    # Rank 2 has other tensors than rank 1 at these sizes, so weights of one never fit the config of
    # the other.
    return get_peft_model(
        mlp(), LoKrConfig(r=rank, alpha=rank * 8, target_modules=TARGETS, init_weights=False)
    )


def scaled(alpha):
    """Adapters whose tensors have one shape and whose configs differ: a mixture would load without
    complaint.
    """
    torch.manual_seed(int(alpha))
    return get_peft_model(
        mlp(), LoKrConfig(r=1, alpha=alpha, target_modules=TARGETS, init_weights=False)
    )


def read(folder):
    """What a reader has: config values and output, None where there is no adapter."""
    torch.manual_seed(0)
    try:
        model = PeftModel.from_pretrained(mlp(), folder)
    except FileNotFoundError:
        return None
    config = model.peft_config["default"]
    return config.r, config.alpha, model(torch.ones(1, 8)).detach().numpy().tobytes()


def kill_everywhere(tmp_path, make_old, make_new, old_options, new_options):
    """For every step: state after the kill is old or new; the next save ends clean."""
    old, new = make_old(), make_new()
    reference = tmp_path / "reference"
    values = []
    for model, options in ((old, old_options), (new, new_options)):
        if model is None:
            values.append(None)
            continue
        model.save_pretrained(reference, **options)
        values.append(read(reference))
    clean = sorted(os.listdir(reference))
    assert values[0] != values[1]
    seen, left = [], set()
    for step in range(200):
        folder = tmp_path / f"step{step}"
        if old is not None:
            old.save_pretrained(folder, **old_options)
        code = run_killed(
            lambda folder=folder: new.save_pretrained(folder, **new_options), folder, step
        )
        assert code in (0, KILLED)
        state = read(folder)
        assert state in values, f"a mixture or nothing at step {step}"
        seen.append(values.index(state))
        new.save_pretrained(folder, **new_options)
        assert read(folder) == values[1]
        left |= set(os.listdir(folder)) - set(clean)
        if code == 0:
            assert step > 6
            break
    assert seen == sorted(seen)  # old, old, …, new, new: never back
    assert set(seen) == {0, 1}
    assert not left


@pytest.mark.processes
@pytest.mark.parametrize("make", [adapter, scaled])
def test_an_adapter_is_replaced(tmp_path, make):
    kill_everywhere(tmp_path, lambda: make(1), lambda: make(2), {}, {})


@pytest.mark.processes
def test_an_adapter_is_written_where_none_was(tmp_path):
    kill_everywhere(tmp_path, lambda: None, lambda: adapter(2), {}, {})


@pytest.mark.processes
def test_a_legacy_adapter_is_replaced(tmp_path):
    kill_everywhere(
        tmp_path, lambda: scaled(1), lambda: scaled(2), {"safe_serialization": False}, {}
    )


@pytest.mark.processes
def test_leftovers_do_not_outlive_the_next_save(tmp_path):
    adapter(1).save_pretrained(tmp_path)
    expected = sorted(os.listdir(tmp_path))
    for step in range(12):
        run_killed(lambda: adapter(2).save_pretrained(tmp_path), tmp_path, step)
    adapter(1).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == expected
    assert read(tmp_path)[0] == 1


@contextmanager
def largest_file(size):
    """No file may grow beyond a size, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", [10, 1800])
def test_a_save_that_fails_leaves_nothing_and_no_config_that_would_win_later(tmp_path, size, safe):
    """1,800 bytes hold the config and not the weights, 10 neither."""
    torch.manual_seed(0)
    model = get_peft_model(
        mlp(), LoKrConfig(r=1, alpha=8, target_modules=["0"], modules_to_save=["2", "4"])
    )
    with largest_file(size), pytest.raises(OSError, match=f"{tmp_path}/new.*can't be written"):
        model.save_pretrained(tmp_path / "new" / "er", safe_serialization=safe)
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "old", safe_serialization=safe)
    before = files_in(tmp_path / "old")
    with largest_file(size), pytest.raises(CheckpointWriteError):
        model.save_pretrained(tmp_path / "old", safe_serialization=safe)
    assert files_in(tmp_path / "old") == before
    path = tmp_path / "old" / "adapter_config.json"
    path.write_text(path.read_text().replace('"alpha": 8', '"alpha": 4'))
    assert '"alpha": 4' in path.read_text() and read(tmp_path / "old")[1] == 4


@pytest.mark.processes
def test_an_edited_config_wins_over_one_that_waits(tmp_path):
    """A save is killed at each step; the config that is then edited is the one that is read."""
    for step in range(20):
        folder = tmp_path / f"x{step}"
        scaled(1).save_pretrained(folder)
        run_killed(lambda folder=folder: scaled(1).save_pretrained(folder), folder, step)
        path = folder / "adapter_config.json"
        path.write_text(path.read_text().replace('"alpha": 1', '"alpha": 4'))
        assert peft.PeftConfig.from_pretrained(folder).alpha == 4


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_full_disk_is_an_error_and_keeps_the_old_adapter(tmp_path, monkeypatch, name):
    scaled(1).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(OSError, match="No space left"):
            scaled(2).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.processes
def test_a_config_saved_by_itself_is_the_one_that_is_read(tmp_path):
    """Even in a folder where a killed save left its own."""
    scaled(1).save_pretrained(tmp_path)
    for step in range(4, 14):
        folder = tmp_path / f"x{step}"
        scaled(1).save_pretrained(folder)
        run_killed(lambda folder=folder: scaled(2).save_pretrained(folder), folder, step)
        config = peft.PeftConfig.from_pretrained(folder)
        config.alpha = 64
        config.save_pretrained(folder)
        assert peft.PeftConfig.from_pretrained(folder).alpha == 64


def test_a_config_edited_by_hand_is_read_as_edited(tmp_path):
    adapter(1).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"alpha": 8', '"alpha": 4'))
    assert read(tmp_path)[1] == 4


@pytest.mark.parametrize("write", ["tensors", "report"])
def test_other_files_are_written_under_the_folders_lock(tmp_path, monkeypatch, write):
    """A save of an adapter beside them deletes the temporary files that it finds."""
    fcntl, locked = pytest.importorskip("fcntl"), []
    replace = files.replace_file

    def watched(path, do):
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked.append(False)
        except BlockingIOError:
            locked.append(True)
        finally:
            os.close(handle)
        replace(path, do)

    monkeypatch.setattr(files, "replace_file", watched)
    if write == "tensors":
        files.write_tensors(tmp_path / "bank.safetensors", {"a": torch.zeros(2)}, {})
    else:
        files.write_report(tmp_path / "report.json", [1])
    assert locked == [True]


def test_an_error_of_the_system_keeps_its_number(tmp_path):
    with pytest.raises(OSError, match="can't be written") as failure, files.folder_for(tmp_path):
        raise OSError(28, "No space left on device")
    assert failure.value.errno == 28
