# SPDX-License-Identifier: Apache-2.0
"""What inference keeps from call to call: never used once a parameter has other numbers, however it got them."""

import copy
import gc
import pickle

import pytest
import torch
from conftest import llama
from torch import nn
from variants import CASES

from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners import _recall
from peft.tuners._recall import Recall, during_call


@pytest.fixture(params=["VBLORA", "POLY", "POLY one head", "POLY top 1"])
def case(request):
    return CASES[request.param]


def run(model, case, x):
    with torch.no_grad():
        return model(x, **case.call(0, 2, 1))


def fresh(model, case, x):
    """The output of a copy, which has nothing kept."""
    return run(copy.deepcopy(model), case, x)


def own(model):
    return [p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]


def kept(model):
    return sum(len(layer.recall) for layer in model.base_model.tuner_layers())


def halve(p):
    return p.detach() * 0.5 + torch.linspace(0, 1, p.numel()).view_as(p)


def swap_storage(p):
    p.data = halve(p)


CHANGES = {
    "in place without gradients": lambda p: p.copy_(halve(p)),
    "in place past the version counter": lambda p: p.data.copy_(halve(p)),
    "another memory": swap_storage,
    "one number": lambda p: p.data.view(-1)[-1:].add_(3.0),
    "through numpy": lambda p: p.detach().numpy().__setitem__(..., halve(p).numpy()),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_any_change_is_seen(case, change):
    model, x = case.model().eval(), case.input()
    before = run(model, case, x)
    assert torch.equal(run(model, case, x), before)
    assert kept(model) > 0
    for parameter in own(model):
        with torch.no_grad():
            CHANGES[change](parameter)
        assert torch.equal(run(model, case, x), fresh(model, case, x))
    assert not torch.equal(run(model, case, x), before)


def test_memory_taken_between_calls(case):
    """Engines that shard parameters free their memory after a layer's forward, and bring it back before the next."""
    model, x = case.model().eval(), case.input()
    before = run(model, case, x)
    held = [(p, p.untyped_storage(), p.detach().clone()) for p in own(model)]
    for _, storage, _ in held:
        storage.resize_(0)

    def bring_back(module, args):
        for parameter, storage, values in held:
            storage.resize_(values.untyped_storage().nbytes())
            with torch.no_grad():
                parameter.copy_(values)

    model.base_model.model.register_forward_pre_hook(bring_back)
    assert torch.equal(run(model, case, x), before)


def test_training_between_evaluations(case):
    model, x = case.model(), case.input()
    run(model.eval(), case, x)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    model.train()(x, **case.call(0, 2, 1)).square().sum().backward()
    optimiser.step()
    assert torch.equal(run(model.eval(), case, x), fresh(model, case, x))


def test_values_from_a_checkpoint(case):
    model, x = case.model().eval(), case.input()
    run(model, case, x)
    other = case.model().eval()
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert torch.equal(run(model, case, x), fresh(model, case, x))
    model.load_state_dict({name: tensor + 0.25 for name, tensor in model.state_dict().items()})
    assert torch.equal(run(model, case, x), fresh(model, case, x))


def test_another_precision(case):
    model, x = case.model().eval(), case.input()
    run(model, case, x)
    model.double()
    assert run(model, case, x.double()).dtype == torch.float64
    torch.testing.assert_close(run(model, case, x.double()), fresh(model, case, x.double()))


def test_gradients_and_training_keep_nothing(case):
    model, x = case.model().train(), case.input()
    run(model.eval(), case, x)
    assert kept(model) > 0
    model(x, **case.call(0, 2, 1))
    assert kept(model) == 0
    with torch.inference_mode():
        torch.testing.assert_close(model(x, **case.call(0, 2, 1)), run(model, case, x))


def test_more_tasks_and_skills():
    case = CASES["POLY"]
    model, x = case.model().eval(), case.input()
    before = run(model, case, x)
    model.add_tasks(2)
    assert torch.equal(run(model, case, x), before)
    with torch.no_grad():
        assert torch.equal(model(x, task_ids=torch.tensor([4, 3, 4])), copy.deepcopy(model)(x, task_ids=torch.tensor([4, 3, 4])))
    model.add_skills(1)
    assert torch.equal(run(model, case, x), fresh(model, case, x))


def test_copies_and_deletion_start_anew(case):
    model, x = case.model().eval(), case.input()
    run(model, case, x)
    assert kept(copy.deepcopy(model)) == kept(pickle.loads(pickle.dumps(model))) == 0
    model.add_adapter("other", case.config())
    model.delete_adapter("default")
    assert kept(model) == 0
    model.add_adapter("default", case.config())
    model.set_adapter("default")
    assert torch.equal(run(model, case, x), fresh(model, case, x))


def test_scale(case):
    model, x = case.model().eval(), case.input()
    plain = run(model, case, x)
    for layer in model.base_model.tuner_layers():
        layer.set_scale("default", 3.0)
    assert not torch.equal(run(model, case, x), plain)
    assert torch.equal(run(model, case, x), fresh(model, case, x))


def test_memory_is_bounded_and_given_back(case):
    model, x = case.model().eval(), case.input()
    for i in range(12):
        model.add_adapter(str(i), case.config())
        model.set_adapter(str(i))
        run(model, case, x)
    assert all(len(layer.recall._known) <= Recall.adapters for layer in model.base_model.tuner_layers())
    del model
    gc.collect()
    assert all(watch.tensor() is not None for watch in list(_recall._WATCHES.values()))


def test_large_tensors_are_not_copied(case, monkeypatch):
    monkeypatch.setattr(Recall, "largest", 3)
    model, x = case.model().eval(), case.input()
    run(model, case, x)
    assert kept(model) == 0


def test_generate_computes_once_and_sees_changes(monkeypatch):
    """Inside `generate` what was computed is used again in each step, unless a parameter is changed between two."""
    from peft.tuners.vblora import layer as module

    model = get_peft_model(llama(), CASES["VBLORA"].config(target_modules=["q_proj", "v_proj"])).eval()
    layers, composed = len(list(model.base_model.tuner_layers())), []
    compose = module.compose_factors
    monkeypatch.setattr(module, "compose_factors", lambda *args: (composed.append(1), compose(*args))[1])
    monkeypatch.setattr(Recall, "largest", 3)  # as on a device, where nothing can be compared
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert len(composed) == layers
    with torch.no_grad():
        model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    assert len(composed) == 2 * layers

    def processor(ids, scores):
        with torch.no_grad():
            for parameter in own(model):
                parameter.mul_(0.5)
        return scores

    composed.clear()
    with torch.no_grad():
        model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, logits_processor=[processor])
    assert len(composed) == 3 * layers


def test_a_call_inside_a_call():
    """The outer one counts, and an error ends it."""
    p, made = nn.Parameter(torch.ones(2)), []
    recall = Recall()

    def look():
        with torch.no_grad():
            recall("a", "sum", (p,), lambda: made.append(1))

    def fail():
        with during_call(nn.Identity(), runs_often=True):
            with during_call(nn.Identity()):
                look()
            p.data.add_(1)
            look()
            assert made == [1]  # changed past torch inside a call: the one thing that is not looked for
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    look()
    assert made == [1, 1]
