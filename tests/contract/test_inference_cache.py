# SPDX-License-Identifier: Apache-2.0
"""The inference cache: what is kept, for how long, and that it is never used once a parameter has
other numbers, however it got them.

The right output is that of a model that has computed nothing before: a fresh base, and the adapter
loaded from what was saved. `test_any_order.py` walks random orders of all that can be done with a
model.
"""

import copy
import pickle
import threading

import pytest
import torch
from accelerate import cpu_offload
from helpers.models import llama
from helpers.variants import CASES, Case
from torch import nn

from peft import PeftModel, PolyConfig, get_peft_model
from peft.ops import inference_cache
from peft.ops.inference_cache import InferenceCache, cached, reuse
from peft.tuners.poly import mixing


@pytest.fixture(params=["VBLORA", "POLY", "POLY one head", "POLY top 1"])
def case(request):
    return CASES[request.param]


def base_of(case):
    torch.manual_seed(0)
    return case.base()


def model_of(case):
    return get_peft_model(base_of(case), case.config()).eval()


def run(model, case, x):
    with torch.no_grad():
        return model(x, **case.call(0, 2, 1))


def reloaded(model, case, folder):
    """A model that has computed nothing yet, with the adapter that a model saves."""
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(base_of(case), folder)


def own(model):
    return [p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]


def kept(model):
    return len(model.base_model.inference_cache)


@pytest.fixture
def composed(monkeypatch):
    """A list with an entry for each time that VB-LoRA's factors are composed."""
    from peft.tuners.vblora import layer as module

    calls, compose = [], module.compose_factors
    monkeypatch.setattr(
        module, "compose_factors", lambda *args: (calls.append(1), compose(*args))[1]
    )
    return calls


# --- never stale
# ----------------------------------------------------------------------------------------------------------
#
#


def halve(p):
    return p.detach() * 0.5 + torch.linspace(0, 1, p.numel()).view_as(p)


CHANGES = {
    "in place without gradients": lambda p: p.copy_(halve(p)),
    "in place past the version counter": lambda p: p.data.copy_(halve(p)),
    "another memory": lambda p: setattr(p, "data", halve(p)),
    "one number": lambda p: p.data.view(-1)[-1:].add_(3.0),
    "through numpy": lambda p: p.detach().numpy().__setitem__(..., halve(p).numpy()),
    "another tensor under its name": lambda p: torch.utils.swap_tensors(p, nn.Parameter(halve(p))),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_any_change_is_seen(case, change, tmp_path):
    model, x = model_of(case), case.input()
    before = run(model, case, x)
    assert torch.equal(run(model, case, x), before)
    assert kept(model) > 0
    for parameter in own(model):
        with torch.no_grad():
            CHANGES[change](parameter)
        torch.testing.assert_close(
            run(model, case, x), run(reloaded(model, case, tmp_path), case, x)
        )
    assert not torch.allclose(run(model, case, x), before)


def test_memory_taken_between_calls(case, tmp_path):
    """Engines that shard parameters free their memory after a layer's forward, and bring it back
    before the next.
    """
    model, x = model_of(case), case.input()
    expected = run(reloaded(model, case, tmp_path), case, x)
    run(model, case, x)
    held = [(p, p.untyped_storage(), p.detach().clone()) for p in own(model)]
    for _, storage, _ in held:
        storage.resize_(0)

    def bring_back(module, args):
        for parameter, storage, values in held:
            storage.resize_(values.untyped_storage().nbytes())
            with torch.no_grad():
                parameter.copy_(values)

    model.base_model.model.register_forward_pre_hook(bring_back)
    torch.testing.assert_close(run(model, case, x), expected)


def test_gradients_after_an_evaluation(case, tmp_path):
    """They reach all parameters, as in a model that has evaluated nothing."""
    model, x = model_of(case), case.input()
    fresh = reloaded(model, case, tmp_path)
    run(model, case, x)
    for each in (model, fresh):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("_lora_" in name or "vblora" in name or "router" in name)
        each(x, **case.call(0, 2, 1)).square().sum().backward()
    for parameter, other in zip(own(model), own(fresh), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_another_precision(case, tmp_path):
    model, x = model_of(case), case.input()
    expected = run(reloaded(model, case, tmp_path).double(), case, x.double())
    run(model, case, x)
    model.double()
    torch.testing.assert_close(run(model, case, x.double()), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x.double(), **case.call(0, 2, 1)), expected)
    torch.testing.assert_close(run(model, case, x.double()), expected)


def test_scale(case):
    """It is a factor on what an adapter adds."""
    last = {"target_modules": ["4"], **({"rank_pattern": {}} if case.method == "POLY" else {})}
    model, x = get_peft_model(case.base(), case.config(**last)).eval(), case.input()
    added = {}
    for scale in (1.0, 3.0):
        for layer in model.base_model.tuner_layers():
            layer.set_scale("default", scale)
        with torch.no_grad(), model.disable_adapter():
            base = model(x, **case.call(0, 2, 1))
        added[scale] = run(model, case, x) - base
    torch.testing.assert_close(added[3.0], 3 * added[1.0])


FITS = {
    "fit": lambda m, x: m.fit_task(
        2, lambda: m(x, task_ids=2).square().mean(), steps=1, init="best"
    ),
    "rows": lambda m, x: m.train_only(tasks=[2]),
    "two rows": lambda m, x: m.train_only(tasks=[0, 2]),
    "regime": lambda m, x: m.begin_regime("Z", tasks=[2]),
    "all": lambda m, x: m.set_adapter("default"),
}


@pytest.mark.parametrize("first", sorted(FITS))
@pytest.mark.parametrize("second", sorted(FITS))
def test_rows_of_tasks_between_evaluations(first, second, tmp_path):
    config = PolyConfig(r=2, n_tasks=3, target_modules=["0"], init_weights=False)
    model, x = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).eval(), torch.randn(4, 8)
    base = copy.deepcopy(model.get_base_model()[0].base_layer)
    for step in (first, second):
        with torch.no_grad():
            model(x, task_ids=2)
        FITS[step](model, x)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(nn.Sequential(base), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(x, task_ids=2), fresh(x, task_ids=2))


def test_rows_that_change_inside_a_call(tmp_path):
    """They share their table's memory, and count versions of their own."""
    case = CASES["POLY"]
    model, x = model_of(case), case.input()
    model.train_only(tasks=[0, 2])
    with torch.no_grad(), model.base_model.inference_cache.during_call(runs_often=True):
        model(x, **case.call(0, 2, 1))
        for row in own(model):
            row.add_(1.0 + torch.arange(row.shape[-1]))
        after = model(x, **case.call(0, 2, 1))
    torch.testing.assert_close(after, run(reloaded(model, case, tmp_path), case, x))


CHOICES = {
    "another tensor": lambda ids: ids.flip(0),
    "in place": lambda ids: ids.copy_(ids.flip(0)),
    "in place past the version counter": lambda ids: ids.data.copy_(ids.flip(0)),
    "through numpy": lambda ids: ids.numpy().__setitem__(..., ids.flip(0).numpy()),
}


@pytest.mark.parametrize("n_splits", [1, 2])
@pytest.mark.parametrize("change", sorted(CHOICES))
def test_other_task_ids(n_splits, change, tmp_path, monkeypatch):
    """Their weights are chosen from the tables of all layers when a call begins."""
    monkeypatch.setattr(mixing, "rank_space_pays", lambda *sizes: True)
    case = Case("POLY", {"n_splits": n_splits, "alpha": 3})
    model, x, ids = model_of(case), case.input(), torch.tensor([0, 1, 2])
    fresh = reloaded(model, case, tmp_path)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(x, task_ids=ids), fresh(x, task_ids=[0, 1, 2]))
        ids = out if isinstance(out := CHOICES[change](ids), torch.Tensor) else ids
        torch.testing.assert_close(model(x, task_ids=ids), fresh(x, task_ids=[2, 1, 0]))
        for layer in model.base_model.tuner_layers():
            layer.set_scale("default", 2.0)
        scaled = model(x, task_ids=ids)
        with torch.enable_grad():  # does not use the cache
            torch.testing.assert_close(scaled, model(x, task_ids=[2, 1, 0]).detach())
    assert kept(model) == 2  # one result a layer, whatever scales were used


# --- one call
# ------------------------------------------------------------------------------------------------------------
#
#


def test_generate_computes_once_and_sees_changes(composed, monkeypatch):
    """Inside `generate` what was computed is used again in each step, unless a parameter is changed
    between two.
    """
    model = get_peft_model(
        llama(), CASES["VBLORA"].config(target_modules=["q_proj", "v_proj"])
    ).eval()
    layers = len(list(model.base_model.tuner_layers()))
    monkeypatch.setattr(
        inference_cache, "LARGEST", 3
    )  # as on a device, where nothing can be compared
    ids = torch.tensor([[5, 6, 7]])

    def generate(tokens, **options):
        composed.clear()
        with torch.no_grad():
            model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, **options)
        assert kept(model) == 0
        return len(composed)

    assert generate(4) == layers
    assert generate(2) == layers

    def processor(ids, scores):
        with torch.no_grad():
            for parameter in own(model):
                parameter.mul_(0.5)
        return scores

    assert generate(3, logits_processor=[processor]) == 3 * layers


def test_a_call_inside_a_call():
    """The outer one counts, and an error ends it."""
    p, made, layer, cache = nn.Parameter(torch.ones(2)), [], nn.Identity(), InferenceCache()

    def look():
        with torch.no_grad():
            reuse(layer, "a", "sum", (p,), lambda: made.append(1) or "sum")
            return cached(layer, "a", "other", (p,), lambda: 1)

    def fail_inside():
        with InferenceCache().during_call():
            assert look()
            raise KeyError

    def fail():
        with cache.during_call(runs_often=True):
            with pytest.raises(KeyError):
                fail_inside()
            p.data.add_(1)
            assert look()
            assert made == [
                1
            ]  # changed past torch inside a call: the one thing that is not looked for
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not look()  # no call is in progress
    assert made == [1, 1]
    with cache.during_call():
        look()
    assert made == [1, 1, 1]


def test_calls_of_several_threads(case, tmp_path):
    """Each gets the right outputs, while another thread's calls fail."""
    model = model_of(case)
    inputs = [case.input() for _ in range(3)]
    expected = [run(reloaded(model, case, tmp_path), case, x) for x in inputs]
    wrong, begin = [], threading.Barrier(len(inputs) + 1)

    def work(x, right):
        begin.wait()
        wrong.extend(
            1 for _ in range(20) if not torch.allclose(run(model, case, x), right, atol=1e-6)
        )

    def fail():
        begin.wait()
        for _ in range(20):
            with pytest.raises(RuntimeError):
                run(model, case, torch.randn(3, 5))

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)
    ]
    threads.append(threading.Thread(target=fail))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- what is kept
# ---------------------------------------------------------------------------------------------------------
#
#


def test_factors_are_composed_once(composed):
    case = CASES["VBLORA"]
    model, x = model_of(case), case.input()
    for _ in range(3):
        run(model, case, x)
    assert len(composed) == 2  # layers
    model.add_adapter("other", case.config())
    for name in ("other", "default", "other", "default"):
        model.set_adapter(name)
        run(model, case, x)
    assert len(composed) == 2 * 2


def test_copies_start_without_results(case):
    model, x = model_of(case), case.input()
    run(model, case, x)
    assert kept(copy.deepcopy(model)) == kept(pickle.loads(pickle.dumps(model))) == 0


def test_memory_is_bounded_and_given_back(case):
    model, x = model_of(case), case.input()
    for i in range(12):
        model.add_adapter(str(i), case.config())
    with torch.no_grad():
        for i in range(0, 12, 3):
            model(x, adapter_names=[str(i), str(i + 1), str(i + 2)], **case.call(0, 2, 1))
    assert 0 < kept(model) <= 2 * inference_cache.ADAPTERS
    for i in range(12):
        model.delete_adapter(str(i))
    assert kept(model) == 0
    run(model, case, x)
    tuner = model.base_model
    model.unload()
    assert len(tuner.inference_cache) == 0


def test_nothing_is_kept_of_what_is_here_for_a_call_only(case, tmp_path):
    """Offloading brings an adapter's tensors for a layer's forward."""
    model, x = model_of(case), case.input()
    expected = run(reloaded(model, case, tmp_path), case, x)
    cpu_offload(model, torch.device("cpu"))
    for _ in range(2):
        torch.testing.assert_close(run(model, case, x), expected)
        assert kept(model) == 0


def test_large_tensors_are_not_copied(case, monkeypatch):
    monkeypatch.setattr(inference_cache, "LARGEST", 3)
    model, x = model_of(case), case.input()
    run(model, case, x)
    assert kept(model) == 0
