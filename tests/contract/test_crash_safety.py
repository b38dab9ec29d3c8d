# SPDX-License-Identifier: Apache-2.0
"""A save that is killed leaves the old adapter or the new one, config included."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import TARGETS, mlp

from peft import LoKrConfig, PeftModel, get_peft_model
from peft.utils import adapter_files


def adapter(rank):
    torch.manual_seed(rank)
    # At these sizes rank 2 has other tensors than rank 1, so weights of one never fit the config of the other.
    return get_peft_model(mlp(), LoKrConfig(r=rank, alpha=rank * 8, target_modules=TARGETS, init_weights=False))


def read(folder):
    """(rank, alpha, output) of the adapter in a folder."""
    model = PeftModel.from_pretrained(mlp_of_one_seed(), folder)
    config = model.peft_config["default"]
    return config.r, config.alpha, model(torch.ones(1, 8))


def mlp_of_one_seed():
    torch.manual_seed(0)
    return mlp()


class Killed(BaseException):
    """Stands for the process's end: nothing below catches it."""


def steps_of_a_save(monkeypatch, folder):
    """How many times a save touches the folder through the functions that can be cut short."""
    count = 0
    real = os.replace

    def counted(*paths):
        nonlocal count
        count += 1
        return real(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted)
        adapter(1).save_pretrained(folder)
    return count


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_rename(tmp_path, monkeypatch, after):
    old, new = tmp_path / "old", tmp_path / "new"
    adapter(1).save_pretrained(old)
    adapter(2).save_pretrained(new)
    wanted = [read(old), read(new)]
    assert wanted[0][:2] != wanted[1][:2]
    real, steps = os.replace, steps_of_a_save(monkeypatch, tmp_path / "count")
    assert steps >= 3
    seen = set()
    for step in range(steps):
        folder = tmp_path / f"step{step}"
        adapter(1).save_pretrained(folder)
        done = 0

        def killed(*paths, step=step):
            nonlocal done
            if done == step:
                if after:
                    real(*paths)
                raise Killed
            done += 1
            return real(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            with pytest.raises(Killed):
                adapter(2).save_pretrained(folder)
        rank, alpha, output = read(folder)
        assert (rank, alpha) in {(1, 8), (2, 16)}
        assert torch.equal(output, wanted[rank - 1][2])
        seen.add(rank)
        adapter(2).save_pretrained(folder)
        assert read(folder)[0] == 2
        assert sorted(os.listdir(folder)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert seen == {1, 2}


@pytest.mark.processes
def test_killed_while_writing(tmp_path):
    """A process that ends for real, in the middle of writing the weights."""
    adapter(1).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    script = f"""
import os, sys
sys.path[:0] = {sys.path!r}
import test_crash_safety as t
from peft.utils import adapter_files
def half(state, path, metadata):
    path.write_bytes(b"half")
    os._exit(9)
adapter_files.save_file = half
t.adapter(2).save_pretrained({str(tmp_path)!r})
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert read(tmp_path)[0] == 1
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


def test_a_config_edited_by_hand_is_read_as_edited(tmp_path):
    adapter(1).save_pretrained(tmp_path)
    path = tmp_path / adapter_files.CONFIG_NAME
    path.write_text(path.read_text().replace('"alpha": 8', '"alpha": 4'))
    assert read(tmp_path)[1] == 4
