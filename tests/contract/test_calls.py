# SPDX-License-Identifier: Apache-2.0
"""What belongs to a call ends with it, whatever ends it: the next one gives what a model gives that
never saw the first.
"""

import copy
import threading

import pytest
import torch
from helpers.models import t5
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft

ERRORS = [KeyboardInterrupt("stopped"), torch.OutOfMemoryError("out of memory")]


class Blocks(nn.Module):
    """Two layers, of which the first may be checkpointed; it can be told to fail after it, or on
    the way back.
    """

    def __init__(self, reentrant=None):
        super().__init__()
        self.first, self.second, self.reentrant, self.inside = (
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            reentrant,
            None,
        )

    def forward(self, x):
        h = (
            self.first(x)
            if self.reentrant is None
            else checkpoint(self.first, x, use_reentrant=self.reentrant)
        )
        if self.inside is not None:
            h = self.inside(h)
        return self.second(h.tanh())


def adapted(method, base=None, targets=("first", "second")):
    """A model with adapters a, the active one, and b."""
    model = peft.get_peft_model(base or Blocks(), method.config(target_modules=list(targets)), "a")
    model.add_adapter("b", method.config(target_modules=list(targets)))
    return model.eval()


def tasks(method, *ids):
    return {"task_ids": list(ids)} if method.call else {}


def failing(error):
    """A function of a tensor that fails in its forward."""

    def fail(h):
        raise error

    return fail


class _FailsBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        raise ctx.error


def check_next(model, fresh, method):
    """Calls of other sizes, with names and without, give what the model gives that never failed."""
    for names in (None, ["b", "a", "a"], ["a"]):
        x = torch.randn(3 if names is None else len(names), 8)
        call = {
            **tasks(method, *[i % 3 for i in range(len(x))]),
            **({} if names is None else {"adapter_names": names}),
        }
        torch.testing.assert_close(model(x, **call), fresh(x, **call))
        torch.testing.assert_close(model(x, **call).sum(), sum(fresh(x, **call)).sum())
    if method.call:
        with pytest.raises(ValueError, match="task_ids should not be None"):
            model(x)


@pytest.mark.parametrize("where", ["forward", "backward", "hook", "backward hook"])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_after_an_error(method, where, reentrant):
    model = adapted(method, Blocks(reentrant))
    other = adapted(method)
    fresh, other_fresh = copy.deepcopy(model), copy.deepcopy(other)
    base = model.get_base_model()

    def run(error):
        x, call = torch.randn(4, 8, requires_grad=True), tasks(method, 0, 1, 2, 1)
        handle = None
        if where == "forward":
            base.inside = failing(error)
        elif where == "backward":
            base.inside = lambda h: _FailsBackwards.apply(h, error)
        elif where == "hook":
            handle = base.register_forward_hook(lambda *_: failing(error)(None))
        else:
            handle = base.second.register_full_backward_hook(lambda *_: failing(error)(None))
        with pytest.raises(type(error)):
            model(x, adapter_names=["a", "b", "__base__", "a"], **call).sum().backward()
        base.inside = None
        if handle is not None:
            handle.remove()

    def go():
        for error in ERRORS:
            run(error)
            check_next(other, other_fresh, method)
            check_next(model, fresh, method)
        done.append(True)

    done = []
    go()
    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    assert done == [True, True]


def test_after_an_error_inside_generate(method):
    """In the encoder, which generation calls by itself, and in a step of the decoder."""
    model = adapted(method, t5(), ("q", "v"))
    fresh = copy.deepcopy(model)
    ids, options = torch.randint(3, 48, (3, 5)), {"max_new_tokens": 3, "do_sample": False}
    base = model.get_base_model()
    for part in (base.encoder.block[1], base.decoder.block[1]):
        for error in ERRORS:
            handle = part.register_forward_hook(lambda *_, error=error: failing(error)(None))
            with pytest.raises(type(error)):
                model.generate(
                    input_ids=ids,
                    adapter_names=["a", "b", "b"],
                    **tasks(method, 0, 1, 2),
                    **options,
                )
            handle.remove()
            for call in (tasks(method, 2), {"adapter_names": ["b"], **tasks(method, 1)}):
                expected = fresh.generate(input_ids=ids[:1], **call, **options)
                assert torch.equal(model.generate(input_ids=ids[:1], **call, **options), expected)
                labels = torch.randint(3, 48, (1, 4))
                expected = fresh(input_ids=ids[:1], labels=labels, **call).logits
                torch.testing.assert_close(
                    model(input_ids=ids[:1], labels=labels, **call).logits, expected
                )


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_call_inside_a_call(method, reentrant):
    """A forward in a hook, with another adapter and task for each sample, and with none: values and
    gradients are those of the calls one after the other.
    """
    model = adapted(method, Blocks(reentrant))
    model.set_requires_grad(["a", "b"], True)
    x, y, z = (torch.randn(n, 8, requires_grad=True) for n in (4, 3, 2))
    calls = [
        (x, {"adapter_names": ["b", "a", "b", "a"], **tasks(method, 0, 1, 2, 1)}),
        (y, {"adapter_names": ["a", "b", "b"], **tasks(method, 2, 2, 0)}),
        (z, tasks(method, 1, 0)),
    ]
    separate = [model(inputs, **call) for inputs, call in calls]
    sum(output.square().sum() for output in separate).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    waiting, seen = calls[1:], []

    def inside(h):
        if waiting:
            inputs, call = waiting.pop()
            seen.append(model(inputs, **call))
        return h

    model.get_base_model().inside = inside
    outer = model(x, **calls[0][1])
    for output, known in zip([outer, *seen], separate, strict=True):  # the innermost ended first
        torch.testing.assert_close(output, known)
    sum(output.square().sum() for output in [outer, *seen]).backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_backward_inside_backward(method):
    """A pass that begins another one, of another call, goes on with its own."""
    model = adapted(method, Blocks(True))
    model.set_requires_grad(["a", "b"], True)
    inner = copy.deepcopy(model)
    x, y = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    call = {"adapter_names": ["b", "a", "b", "a"], **tasks(method, 0, 1, 2, 1)}
    model(x, **call).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    def again(gradient):
        with torch.enable_grad():
            inner(y, adapter_names=["a", "b"], **tasks(method, 2, 0)).sum().backward()

    model.get_base_model().inside = lambda h: h.register_hook(again) and h
    output = model(x, **call)
    model.get_base_model().inside = None
    loss = output.square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, 2 * expected[name])
