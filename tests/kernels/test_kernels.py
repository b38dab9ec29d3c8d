# SPDX-License-Identifier: Apache-2.0
"""Where kernels of our own run, and `interpreted.py`, their tests, in a process in which Triton interprets kernels on the CPU."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import peft
from peft.tuners import _kernels


def test_in_the_interpreter():
    pytest.importorskip("triton")  # not built for every system
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(Path(__file__).with_name("interpreted.py"))]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_never_on_the_cpu():
    assert not _kernels.can_launch(torch.zeros(2))


def driver(error):
    """A stand-in for `triton.runtime`, whose driver finds no compiler."""

    class Driver:
        @property
        def active(self):
            raise error

    return types.SimpleNamespace(driver=Driver())


@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to find C compiler"), subprocess.CalledProcessError(1, "gcc"), OSError("x")]
)
def test_where_triton_does_not_work_one_is_told_and_goes_on(monkeypatch, error):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.runtime", driver(error))
    with pytest.warns(peft.PeftWarning, match="plain operations"):
        assert not _kernels._has_triton.__wrapped__(0)


def test_where_triton_is_missing_or_the_gpu_is_old(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    for capability in ((9, 0), (7, 5)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, capability=capability: capability)
        assert not _kernels._has_triton.__wrapped__(0)
