# SPDX-License-Identifier: Apache-2.0
"""Where kernels of our own run."""

import importlib.util

import pytest
import torch

import peft
from peft.ops import triton_support
from peft.ops.triton_support import Trial


def test_never_on_the_cpu():
    assert not triton_support.can_launch(torch.zeros(2))


def test_neither_without_triton_nor_on_an_old_gpu(monkeypatch):
    spec = importlib.util.find_spec
    cuda = torch.device("cuda:0")
    for installed, capability in ((True, (9, 0)), (False, (9, 0)), (True, (7, 5))):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, i=installed: i or None if name == "triton" else spec(name),
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert triton_support.has_triton.__wrapped__(cuda) == (installed and capability >= (8, 0))


def double(x):
    return x * 2


def example(device):
    return (torch.randn(3, device=device, requires_grad=True),)


def fails(x):
    raise OSError("Failed to find C compiler")


@pytest.mark.parametrize(
    ("ours", "words"),
    [(lambda x: x * 2.1, "differ"), (lambda x: x.detach() * 2, "grad"), (fails, "C compiler")],
)
def test_what_does_not_agree_is_not_used_and_one_is_told_once(ours, words):
    with pytest.warns(peft.PeftWarning, match=words):
        assert not triton_support.agrees(Trial(ours, double, example), torch.device("cpu"))
    assert not triton_support.agrees(Trial(ours, double, example), torch.device("cpu"))


def test_trying_leaves_no_trace():
    """It is done whatever the caller has switched on, and draws none of its random numbers."""
    seen = []
    state = torch.get_rng_state()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t)
    with torch.inference_mode(), hooks, torch.autocast("cpu"):
        assert triton_support.agrees(Trial(lambda x: x * 2.0, double, example), torch.device("cpu"))
    assert torch.equal(state, torch.get_rng_state())
    assert seen == []


def test_not_tried_inside_a_backward():
    """There its own backward would wait for the one that runs."""
    answers = []

    def ours(x):
        return x + x

    x = torch.ones(2, requires_grad=True)
    x.register_hook(
        lambda g: answers.append(
            triton_support.agrees(Trial(ours, double, example), torch.device("cpu"))
        )
    )
    x.sum().backward()
    answers.append(triton_support.agrees(Trial(ours, double, example), torch.device("cpu")))
    x.sum().backward()
    assert answers == [False, True, True]
