# SPDX-License-Identifier: Apache-2.0
"""Threads that call one model while others change it: a call that is stopped half-way, between two
adapted layers, gives what a freshly loaded model gives, or the change is refused.
"""

import threading

import pytest
import torch
from helpers.models import mlp

import peft
from peft.base.errors import PeftRuntimeError
from peft.utils.hotswap import hotswap_adapter

X = torch.linspace(-1, 1, 16).reshape(2, 8)


def base():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mlp()


@pytest.fixture
def folders(method, tmp_path):
    """Saved adapters of both layers, but "narrow", which adapts the first one only."""
    for name in ("a", "b", "c", "narrow"):
        targets = ["0"] if name == "narrow" else ["0", "2"]
        model = peft.get_peft_model(base(), method.config(target_modules=targets))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        model.save_pretrained(tmp_path / name)
    return tmp_path


@pytest.fixture
def model(folders):
    model = peft.PeftModel.from_pretrained(base(), folders / "narrow", "narrow")
    model.load_adapter(folders / "a", "a")
    model.load_adapter(folders / "b", "b")
    model.base_model.running_calls.patience = 0.0
    return model


def alone(folder, method):
    model = peft.PeftModel.from_pretrained(base(), folder).eval()
    with torch.no_grad():
        return model(X, **method.call)


class Halted:
    """A call in a thread that stands still between the two layers until it is released."""

    def __init__(self, model, **arguments):
        self.inside, self.released, self.result = threading.Event(), threading.Event(), None

        def halt(*_):
            if threading.current_thread() is self.thread:
                self.inside.set()
                assert self.released.wait(60)

        def run():
            with torch.no_grad():
                self.result = model(X, **arguments)

        self.handle = model.get_base_model()[1].register_forward_hook(halt)
        self.thread = threading.Thread(target=run)

    def __enter__(self):
        self.thread.start()
        assert self.inside.wait(60)
        return self

    def __exit__(self, *_):
        self.released.set()
        self.thread.join()
        self.handle.remove()


def test_a_call_that_names_its_adapter_runs_beside_changes_of_others(model, folders, method):
    with Halted(model, adapter_names=["a", "a"], **method.call) as call:
        model.load_adapter(folders / "c", "c")
        model.load_adapter(folders / "b", "b")
        model.set_adapter("c")
        model.delete_adapter("b")
        model.delete_adapter("narrow")
    torch.testing.assert_close(call.result, alone(folders / "a", method))


CHANGES = {
    "delete": lambda model, folders, method: model.delete_adapter("a"),
    "load over": lambda model, folders, method: model.load_adapter(folders / "c", "a"),
    "hot swap": lambda model, folders, method: hotswap_adapter(model, folders / "c", "a"),
    "merge": lambda model, folders, method: model.merge_adapter(["a"], **method.merge),
    "disable": lambda model, folders, method: model.disable_adapter_layers(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_an_adapter_in_use_is_refused(change, model, folders, method):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with (
        Halted(model, adapter_names=["b", "a"], **method.call) as call,
        pytest.raises(PeftRuntimeError, match="1 running calls .*a.*b.* nothing was changed"),
    ):
        CHANGES[change](model, folders, method)
    rows = torch.stack([alone(folders / "b", method)[0], alone(folders / "a", method)[1]])
    torch.testing.assert_close(call.result, rows)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    CHANGES[change](model, folders, method)  # nobody uses it now


def test_a_switch_is_refused_while_a_call_uses_the_active_adapter(model, folders, method):
    with Halted(model, **method.call) as call:
        with pytest.raises(PeftRuntimeError, match="the active adapters"):
            model.set_adapter("a")
        model.load_adapter(folders / "c", "c")  # brings a layer that the call is about to enter
        model.delete_adapter("b")
    torch.testing.assert_close(call.result, alone(folders / "narrow", method))
    assert model.active_adapters == ["narrow"]


def test_calls_wait_for_a_change_and_changes_for_calls(model, folders, method):
    running, order = model.base_model.running_calls, []
    running.patience = 60.0

    def call(name):
        with torch.no_grad():
            model(X, adapter_names=[name] * 2, **method.call)
        order.append(name)

    waiting = threading.Thread(target=call, args=("a",))
    with running.change(["a"]):
        waiting.start()
        other = threading.Thread(target=call, args=("b",))
        other.start()
        other.join()
        order.append("changed")
    waiting.join()
    assert order == ["b", "changed", "a"]

    deleting = threading.Thread(target=model.delete_adapter, args=("a",))
    with Halted(model, adapter_names=["a", "a"], **method.call) as halted:
        deleting.start()
    deleting.join()
    torch.testing.assert_close(halted.result, alone(folders / "a", method))
    assert "a" not in model.peft_config


def test_a_change_inside_a_call_of_its_own_thread_goes_through(model, folders, method):
    def change(*_):
        model.load_adapter(folders / "c", "c")
        model.delete_adapter("b")

    handle = model.get_base_model()[1].register_forward_hook(change)
    with torch.no_grad():
        result = model(X, adapter_names=["a", "a"], **method.call)
    handle.remove()
    torch.testing.assert_close(result, alone(folders / "a", method))
    assert sorted(model.peft_config) == ["a", "c", "narrow"]


def test_a_call_that_failed_is_over(model, folders, method):
    with pytest.raises(RuntimeError):
        model(X[:, :3], adapter_names=["a", "a"], **method.call)
    thread = threading.Thread(target=model.delete_adapter, args=("a",))
    thread.start()
    thread.join()
    assert "a" not in model.peft_config
