# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: no network and one thread.

The environment is set before anything is imported that reads it, and processes that tests start
inherit it.
"""

import contextlib
import gc
import importlib
import os
import socket

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The functions that Triton itself brings are interpreted if it is imported so, which tests/kernels
# needs; no other test runs kernels.
os.environ["TRITON_INTERPRET"] = "1"
with contextlib.suppress(ImportError):
    importlib.import_module("triton.language")
del os.environ["TRITON_INTERPRET"]

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import TARGETS, mlp

import peft

LOCAL = (
    "127.",
    "::1",
    "::ffff:127.",
    "localhost",
    "0.0.0.0",
    "::",
    socket.gethostname() or "localhost",
)
attempts: list[str] = []


def check(host):
    """Refuse and note a host that is not this machine."""
    host = host.decode() if isinstance(host, bytes) else host
    if host and not host.startswith(LOCAL):
        attempts.append(host)
        raise OSError(f"A test tried to reach {host!r}, and tests use no network.")


def guarded(connect):
    def checked(self, address):
        if isinstance(address, tuple):  # others are paths, of sockets on this machine
            check(address[0])
        return connect(self, address)

    return checked


def looked_up(host, *args, _lookup=socket.getaddrinfo, **kwargs):
    check(host)
    return _lookup(host, *args, **kwargs)


socket.socket.connect = guarded(socket.socket.connect)
socket.socket.connect_ex = guarded(socket.socket.connect_ex)
socket.getaddrinfo = looked_up


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(params=sorted(METHODS))
def method(request):
    """Each method of the contract table."""
    return METHODS[request.param]


@pytest.fixture
def model(method):
    """A small network with an adapter of a method."""
    return peft.get_peft_model(mlp(), method.config(target_modules=TARGETS))


@pytest.fixture(autouse=True)
def _no_network():
    """Fail a test that tried to reach another machine, also where the error was caught."""
    yield
    tried = attempts.copy()
    attempts.clear()
    assert not tried


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect():
    """Exempt what is there before a module's tests from garbage collection, which takes as long as
    there are objects to look at: trainers ask for one whenever they start and end, and most objects
    are those of imported libraries.
    """
    gc.collect()
    gc.freeze()
