# SPDX-License-Identifier: Apache-2.0
"""Threads that call one model while others change it: a call that is stopped half-way, between two
adapted layers, gives what a freshly loaded model gives, or the change is refused.
"""

import copy
import math
import os
import signal
import threading
import warnings
from contextlib import ExitStack, contextmanager

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import mlp
from safetensors.torch import load_file

import peft
from peft.base.errors import PeftRuntimeError, PeftValueError
from peft.checkpoint import hotswap
from peft.core import loading
from peft.core.low_rank_deltas import loaded_deltas
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter

X = torch.linspace(-1, 1, 16).reshape(2, 8)
# For what has nothing to do with the method.
one_method = pytest.mark.parametrize("saved", ["LORA"], indirect=True)


def base():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mlp()


class Saved:
    """Saved adapters of both layers, but "narrow", which adapts the first one only; what each of
    them gives alone, and a model with three of them.
    """

    def __init__(self, method, folder):
        self.method, self.folder, self.alone = method, folder, {}
        for name in ("a", "b", "c", "narrow"):
            targets = ["0"] if name == "narrow" else ["0", "2"]
            model = peft.get_peft_model(base(), method.config(target_modules=targets))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.normal_()
            model.save_pretrained(folder / name)
            with torch.no_grad():
                fresh = peft.PeftModel.from_pretrained(base(), folder / name).eval()
                self.alone[name] = fresh(X, **method.call)
        self.model = peft.PeftModel.from_pretrained(base(), folder / "narrow", "narrow")
        self.model.load_adapter(folder / "a", "a")
        self.model.load_adapter(folder / "b", "b")


@pytest.fixture(scope="module", params=sorted(METHODS))
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    return Saved(METHODS[request.param], tmp_path_factory.mktemp("threads"))


@pytest.fixture
def model(saved):
    model = copy.deepcopy(saved.model)
    model.base_model.running_calls.patience = 0.0
    return model


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
        self.thread = threading.Thread(target=run, daemon=True)

    def __enter__(self):
        self.thread.start()
        assert self.inside.wait(60)
        return self

    def __exit__(self, *_):
        self.released.set()
        self.thread.join()
        self.handle.remove()


class Waits:
    """A part of `RunningCalls`, its condition or lock, that tells when a thread waits for it."""

    def __init__(self, running, part):
        self.part, self.came = getattr(running, part), threading.Event()
        setattr(running, part, self)

    def __enter__(self):
        if hasattr(self.part, "wait"):
            return self.part.__enter__()
        if not self.part.acquire(blocking=False):
            self.came.set()
            self.part.acquire()
        return self.part

    def __exit__(self, *error):
        self.part.__exit__(*error)

    def wait(self, timeout=None):
        self.came.set()
        self.part.wait(timeout)

    def notify_all(self):
        self.part.notify_all()


@contextmanager
def thread(function, *args):
    """A thread that runs meanwhile, and has to end without an error."""
    errors = []

    def run():
        try:
            function(*args)
        except BaseException as error:
            errors.append(error)

    started = threading.Thread(target=run, daemon=True)
    started.start()
    yield started
    started.join()
    if errors:
        raise errors[0]


def call(model, name, saved):
    with torch.no_grad():
        return model(X, adapter_names=[name] * 2, **saved.method.call)


def test_a_call_that_names_its_adapter_runs_beside_changes_of_others(model, saved):
    with Halted(model, adapter_names=["a", "a"], **saved.method.call) as halted:
        model.load_adapter(saved.folder / "c", "c")
        model.load_adapter(saved.folder / "b", "b")
        model.set_adapter("c")
        model.delete_adapter("b")
        model.delete_adapter("narrow")
    torch.testing.assert_close(halted.result, saved.alone["a"])


def rescale(model, saved):
    with rescale_adapter_scale(model, 2.0):
        pass


def disable(model, saved):
    with model.disable_adapter():
        pass


def hot_swap(model, saved):
    hotswap_adapter(model, saved.folder / "c", "a")


CHANGES = (
    rescale,
    disable,
    hot_swap,
    lambda model, saved: model.load_adapter(saved.folder / "c", "a"),
    lambda model, saved: model.set_requires_grad("a", False),
    lambda model, saved: model.merge_adapter(["a"], **saved.method.merge),
    lambda model, saved: model.unmerge_adapter(),
    lambda model, saved: model.delete_adapter("a"),
)


def test_changes_of_an_adapter_in_use_are_refused(model, saved):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with Halted(model, adapter_names=["b", "a"], **saved.method.call) as halted:
        for change in CHANGES:
            with pytest.raises(PeftRuntimeError, match="use a, b,.*nothing was changed"):
                change(model, saved)
    rows = torch.stack([saved.alone["b"][0], saved.alone["a"][1]])
    torch.testing.assert_close(halted.result, rows)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for change in CHANGES:  # nobody uses it now
        change(model, saved)


@pytest.mark.parametrize("saved", ["LOKR"], indirect=True)
def test_norms_are_not_clipped_in_the_middle_of_a_call(model, saved):
    with Halted(model, adapter_names=["b", "a"]), pytest.raises(PeftRuntimeError, match="a, b"):
        model.clip_weight_norms(1e-3, "a")
    torch.testing.assert_close(call(model, "a", saved), saved.alone["a"])
    assert max(model.clip_weight_norms(1e-3, "a").values()) <= 1e-3


@one_method
def test_experts_stay_in_the_middle_of_a_call(saved):
    experts = {name: str(saved.folder / name) for name in ("a", "b")}
    model = peft.get_routed_model(base(), experts, routing="fixed").eval()
    model.set_expert_weights({"a": 1.0, "b": 0.0})
    model.base_model.running_calls.patience = 0.0
    changes = (
        lambda: model.set_expert_weights({"a": 0.0, "b": 1.0}),
        lambda: model.add_experts({"c": str(saved.folder / "c")}),
        lambda: model.remove_experts("a"),
        lambda: model.fit_weights(lambda: model(X).square().mean(), steps=1),
    )
    with Halted(model) as halted:
        for change in changes:
            with pytest.raises(PeftRuntimeError, match="the active adapters"):
                change()
    torch.testing.assert_close(halted.result, saved.alone["a"])
    for change in changes:
        change()
    assert model.named_experts() == ["b", "c"]


def test_a_switch_is_refused_while_a_call_uses_the_active_adapter(model, saved):
    with Halted(model, **saved.method.call) as halted:
        with pytest.raises(PeftRuntimeError, match="the active adapters"):
            model.set_adapter("a")
        model.load_adapter(saved.folder / "c", "c")  # brings a layer that the call soon enters
        model.delete_adapter("b")
    torch.testing.assert_close(halted.result, saved.alone["narrow"])
    assert model.active_adapters == ["narrow"]


def test_a_change_inside_a_call_of_its_own_thread_goes_through(model, saved):
    def change(*_):
        model.load_adapter(saved.folder / "c", "c")
        model.delete_adapter("b")

    handle = model.get_base_model()[1].register_forward_hook(change)
    result = call(model, "a", saved)
    handle.remove()
    torch.testing.assert_close(result, saved.alone["a"])
    assert sorted(model.peft_config) == ["a", "c", "narrow"]


@one_method
def test_calls_wait_for_a_change_and_changes_for_calls(model, saved):
    running, order = model.base_model.running_calls, []
    running.patience = math.inf

    def noted(name):
        call(model, name, saved)
        order.append(name)

    waits = Waits(running, "_ended")
    with ExitStack() as stack, running.change(["a"]):
        stack.enter_context(thread(noted, "a"))
        assert waits.came.wait(60)
        with thread(noted, "b"):
            pass
        order.append("changed")
    assert order == ["b", "changed", "a"]

    waits.came.clear()
    with Halted(model, adapter_names=["a", "a"]) as halted, thread(model.delete_adapter, "a"):
        assert waits.came.wait(60)
        halted.released.set()
    torch.testing.assert_close(halted.result, saved.alone["a"])
    assert "a" not in model.peft_config


@one_method
def test_a_call_inside_another_one_waits_for_a_change_of_its_own_adapter(model, saved):
    running, order = model.base_model.running_calls, []
    waits, inside = Waits(running, "_ended"), threading.Event()

    def inner(*_):
        handle.remove()
        inside.set()
        assert released.wait(60)
        for name in ("a", "b"):  # the outer call's, then another
            torch.testing.assert_close(call(model, name, saved), saved.alone[name])
            order.append(name)
        waits.came.set()

    released = threading.Event()
    handle = model.get_base_model()[1].register_forward_hook(inner)
    with thread(call, model, "a", saved):
        assert inside.wait(60)
        with running.change(["b"]):
            released.set()
            assert waits.came.wait(60)
            order.append("changed")
    assert order == ["a", "changed", "b"]


@contextmanager
def changed_half_way(model, member, change):
    """Context in which a reader calls a member of the second layer, and another thread then changes
    the model, or waits for that.
    """
    layer, lock = model.get_base_model()[2], Waits(model.base_model.running_calls, "_one_change")
    real, starts = getattr(layer, member), [thread(lambda: (change(), lock.came.set()))]

    with ExitStack() as changing:

        def read(*args, **kwargs):
            if starts:
                changing.enter_context(starts.pop())
                assert lock.came.wait(60)
            return real(*args, **kwargs)

        setattr(layer, member, read)
        yield
        assert not starts
    delattr(layer, member)


def lokr_file(model, folder):
    peft.save_lokr_file(model, folder / "lokr.safetensors", adapter_name="a")
    return load_file(folder / "lokr.safetensors")


def of_tasks(model, folder):
    peft.save_tasks_as_lora(model, folder, adapter_name="a")
    files = sorted(folder.glob("*/*.safetensors"))
    return {f"{f.parent.name} {key}": t for f in files for key, t in load_file(f).items()}


@pytest.mark.parametrize(
    ("saved", "member", "read"),
    [
        ("LORA", "low_rank_factors", lambda m, _: peft.convert_to_poly(m, ["a"]).state_dict),
        ("LOHA", "low_rank_factors", lambda m, _: peft.convert_to_lora(m, None, "a").state_dict),
        ("LOKR", "low_rank_factors", lambda m, _: loaded_deltas(m, "a")[""]["2"]._asdict()),
        ("LOKR", "factors", lokr_file),
        ("POLY", "low_rank_factors", of_tasks),
        ("VBLORA", "selections", lambda m, _: peft.bank_usage(m, "a").uses[-1].weights),
    ],
    indirect=["saved"],
)
def test_a_reader_of_several_layers_sees_one_state(model, saved, tmp_path, member, read):
    alone = peft.PeftModel.from_pretrained(base(), saved.folder / "a", "a")
    expected = read(alone, tmp_path / "alone")
    with changed_half_way(model, member, lambda: model.load_adapter(saved.folder / "c", "a")):
        found = read(model, tmp_path / "found")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(call(model, "a", saved), saved.alone["c"])


@one_method
def test_what_takes_merges_off_for_a_moment_waits_for_calls(saved, tmp_path):
    """Reading biases that an adapter trains, or the base model."""
    model = peft.get_peft_model(base(), saved.method.config(target_modules=["0", "2"], bias="all"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        plain, expected = peft.get_base_model_state_dict(model), model.eval()(X)
    plain = {name: value.clone() for name, value in plain.items()}
    readers = (
        peft.get_base_model_state_dict,
        peft.get_peft_model_state_dict,
        lambda model: model.save_pretrained(tmp_path),
    )
    with Halted(model):  # nothing is merged
        for read in readers:
            read(model)
    model.merge_adapter()
    model.base_model.running_calls.patience = 0.0
    with Halted(model) as halted:
        for read in readers:
            with pytest.raises(PeftRuntimeError, match="the active adapters"):
                read(model)
    torch.testing.assert_close(halted.result, expected)
    torch.testing.assert_close(readers[0](model), plain)


@one_method
def test_a_state_is_not_written_in_the_middle_of_a_call(model, saved):
    state = load_file(saved.folder / "c" / "adapter_model.safetensors")
    with Halted(model, adapter_names=["a", "a"]) as halted:
        with pytest.raises(PeftRuntimeError, match="use a, and did"):
            peft.set_peft_model_state_dict(model, state, "a")
        with pytest.raises(PeftRuntimeError, match="use a, and did"):
            peft.set_base_model_state_dict(model, base().state_dict())
    torch.testing.assert_close(halted.result, saved.alone["a"])
    peft.set_peft_model_state_dict(model, state, "a")
    torch.testing.assert_close(call(model, "a", saved), saved.alone["c"])


@one_method
@pytest.mark.filterwarnings("ignore:You are trying to modify a model")
def test_models_around_one_base_see_the_calls_of_each_other(saved):
    one = peft.PeftModel.from_pretrained(base(), saved.folder / "a", "a").eval()
    two = peft.PeftModel.from_pretrained(one.get_base_model(), saved.folder / "b", "b")
    two.base_model.running_calls.patience = 0.0
    refused = pytest.raises(PeftRuntimeError, match="use a, and did")
    with Halted(one, adapter_names=["a", "a"]) as halted, refused:
        two.merge_adapter()
    torch.testing.assert_close(halted.result, saved.alone["a"])


@one_method
@pytest.mark.filterwarnings("ignore:Adapter b was active")
def test_a_change_looks_at_the_model_when_its_turn_comes(model, saved):
    running = model.base_model.running_calls
    running.patience = math.inf
    ended, lock = Waits(running, "_ended"), Waits(running, "_one_change")

    def delete():
        model.delete_adapter("b")  # which is inactive now, but not when its turn comes
        ended.came.set()

    halted = Halted(model)
    with running.change(()):
        lock.came.clear()
        deleting = threading.Thread(target=delete, daemon=True)
        deleting.start()
        assert lock.came.wait(60)
        model.set_adapter("b")
        halted.__enter__()
    assert ended.came.wait(60)
    halted.__exit__()
    deleting.join()
    torch.testing.assert_close(halted.result, saved.alone["b"])
    assert "b" not in model.peft_config


@one_method
def test_an_adapter_that_is_deleted_while_a_file_is_read(model, saved, monkeypatch):
    def deleting(module, name):
        read = getattr(module, name)

        def read_and_delete(*args, **kwargs):
            result = read(*args, **kwargs)
            model.delete_adapter("a")
            return result

        monkeypatch.setattr(module, name, read_and_delete)

    deleting(hotswap, "load_peft_weights")
    with pytest.raises(PeftValueError, match="a"):
        hotswap_adapter(model, saved.folder / "c", "a")
    model.load_adapter(saved.folder / "b", "a")
    deleting(loading, "read_checkpoint")
    model.load_adapter(saved.folder / "c", "a")
    torch.testing.assert_close(call(model, "a", saved), saved.alone["c"])


@one_method
def test_the_end_of_a_context_waits_for_calls_that_began_in_it(model, saved):
    waits, halted = Waits(model.base_model.running_calls, "_ended"), Halted(model)

    def disabled():
        try:
            with model.disable_adapter():
                halted.__enter__()
        finally:
            waits.came.set()

    with thread(disabled):
        assert waits.came.wait(60)
        halted.__exit__()
    torch.testing.assert_close(halted.result, base()(X))
    assert not model.base_model.adapters_disabled


@one_method
def test_a_call_past_the_model_can_be_noted(model, saved):
    def noted(x):
        with model.base_model.running_calls.during(None):
            return model.get_base_model()(x)

    noted.get_base_model = model.get_base_model
    with Halted(noted), pytest.raises(PeftRuntimeError, match="the active adapters"):
        model.set_adapter("a")


@one_method
def test_a_call_that_failed_is_over(model, saved):
    with pytest.raises(RuntimeError):
        model(X[:, :3], adapter_names=["a", "a"])
    with thread(model.delete_adapter, "a"):
        pass
    assert "a" not in model.peft_config


@one_method
def test_a_copy_has_the_patience_and_no_calls(model, saved):
    model.base_model.running_calls.patience = 0.5
    with Halted(model):
        twin = copy.deepcopy(model)
        twin.set_adapter("a")
    assert twin.base_model.running_calls.patience == 0.5


@one_method
def test_a_forked_process_has_its_own_thread_alone(model, saved):
    running = model.base_model.running_calls
    running.patience = math.inf
    waits = Waits(running, "_ended")
    with Halted(model) as halted, thread(model.set_adapter, "a"):
        assert waits.came.wait(60)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads
            child = os.fork()
        if child == 0:
            signal.alarm(60)
            try:
                model.set_adapter("b")
                os._exit(0 if torch.allclose(model(X), saved.alone["b"], atol=1e-5) else 2)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        halted.released.set()
    assert os.waitstatus_to_exitcode(status) == 0
    assert model.active_adapters == ["a"]


def test_adapters_are_off_until_the_last_of_two_contexts_ends(saved):
    """Contexts of two threads, or of two coroutines, need not be nested."""
    model = copy.deepcopy(saved.model)
    model.set_adapter("a")

    def output():
        with torch.no_grad():
            return model(X, **saved.method.call)

    first, second, inner = (model.disable_adapter() for _ in range(3))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    torch.testing.assert_close(output(), base()(X))
    assert not any(p.requires_grad for p in model.parameters())
    with inner, rescale_adapter_scale(model, 2.0):
        second.__exit__(None, None, None)
        torch.testing.assert_close(output(), base()(X))
    torch.testing.assert_close(output(), saved.alone["a"])


@one_method
def test_scales_and_casts_return_whichever_context_ends_first(model, saved):
    layer = model.base_model.model[0]
    half, third = rescale_adapter_scale(model, 0.5), rescale_adapter_scale(model, 3.0)
    casts = [disable_input_dtype_casting(model), disable_input_dtype_casting(model)]
    before = dict(layer.scaling)
    for context in (half, third, *casts):
        context.__enter__()
    assert layer.scaling == {name: 1.5 * scale for name, scale in before.items()}
    half.__exit__(None, None, None)
    casts[0].__exit__(None, None, None)
    assert layer.scaling == {name: 3.0 * scale for name, scale in before.items()}
    assert not layer.cast_input_dtype_enabled
    third.__exit__(None, None, None)
    casts[1].__exit__(None, None, None)
    assert layer.scaling == before
    assert layer.cast_input_dtype_enabled


def test_a_call_runs_while_another_thread_adds_an_adapter(monkeypatch):
    """The routing asks all configs, of which one more may come at any time."""
    config = peft.PolyConfig(r=2, n_tasks=2, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config).eval()
    x = torch.randn(3, 4)
    expected, configs = model(x, task_ids=[0, 1, 0]), model.base_model.model[0].routing.configs

    def routes_by_input(config):
        configs[f"new {len(configs)}"] = configs["default"]
        return False

    monkeypatch.setattr(peft.PolyConfig, "routes_by_input", property(routes_by_input))
    assert torch.equal(model(x, task_ids=[0, 1, 0]), expected)
    assert "new 1" in configs
