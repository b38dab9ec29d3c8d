# SPDX-License-Identifier: Apache-2.0
"""Layers that read one input add their gradients for it in one memory, and nobody can tell.

The oracle is autograd of each layer's dense formula (`helpers/dense.py`).
"""

import gc
import threading
import weakref

import pytest
import torch
from helpers.dense import IN, OUT, call_of, dense, model_of, numbers
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

# Cases whose layers state a chain.
CHAINS = [
    *("LORA", "LOHA", "LOKR", "LOKR both", "LOKR whole", "VBLORA"),
    *("POLY", "POLY one head", "POLY top 1", "POLY by sample"),
]


class Readers(nn.Module):
    """Layers of one input, as an attention has them.

    Attributes:
        before: Called with the module and the input before a layer is; may return another input.
        expected: What the layers of LoRA should have returned at the last call.
    """

    def __init__(self):
        super().__init__()
        for i in range(3):
            self.add_module(str(i), nn.Linear(IN, OUT))
        self.before = {}

    def forward(self, x):
        outputs, self.expected = [], []
        for i, layer in enumerate(self.children()):
            given = self.before[i](self, x) if i in self.before else x
            self.expected.append(lora(layer, given) if hasattr(layer, "lora_A") else None)
            outputs.append(layer(given))
        return outputs


def lora(layer, x):
    """The formula of LoRA."""
    base = layer.get_base_layer()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return nn.functional.linear(x, base.weight + layer.scaling["default"] * B @ A, base.bias)


def readers(case="LORA"):
    torch.manual_seed(0)
    model = model_of(case, base=Readers())
    return model, model.get_base_model()


def leaf(*shape):
    return numbers(*shape).requires_grad_()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def gradients(outputs, sources):
    """Of a loss, None for sources that it does not depend on."""
    return torch.autograd.grad(squares(outputs), sources, retain_graph=True, allow_unused=True)


def squares(outputs):
    return sum((i + 1) * y.square().sum() for i, y in enumerate(outputs))


class Sums(TorchDispatchMode):
    """Counts the sums of two tensors of a shape."""

    def __init__(self, *shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            self.count += result.shape == self.shape
        return result


@pytest.mark.parametrize("trained_base", [False, True])
@pytest.mark.parametrize("case", CHAINS)
def test_outputs_and_gradients(case, trained_base):
    model, base = readers(case)
    x = leaf(3, 4, IN)
    call, tasks = call_of(case, x)
    for layer in model.base_model.tuner_layers():
        layer.get_base_layer().requires_grad_(trained_base)
    sources = [x, *trained(model)]
    expected = [torch.stack(dense(case, layer, x, tasks)) for layer in base.children()]
    outputs = model(x, **call)
    assert_same(outputs, expected)
    assert len({y.grad_fn.next_functions[0] for y in outputs}) == 1  # an alias of theirs alone
    assert_same(gradients(outputs, sources), gradients(expected, sources))


@pytest.mark.parametrize("case", ["LORA", "VBLORA"])
def test_nothing_is_added_by_autograd(case):
    """It adds for layers outside a call of the model."""
    model, base = readers(case)
    x = leaf(3, 4, IN)
    for outputs, expected in ((model(x), 0), ([layer(x) for layer in base.children()], 2)):
        with Sums(3, 4, IN) as sums:
            gradients(outputs, x)
        assert sums.count == expected


@pytest.mark.parametrize("case", ["LORA", "LOKR", "POLY one head"])
def test_finite_differences(case):
    """First and second derivatives, batched ones too."""
    model, _ = readers(case)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    call = call_of(case, numbers(2, IN))[0]

    def run(x, *values):
        outputs = functional_call(model, dict(zip(names, values, strict=True)), (x,), call)
        return torch.cat(outputs, -1)

    sources = [t.detach().clone().requires_grad_() for t in (numbers(2, IN), *trained(model))]
    options = {"fast_mode": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(run, sources, **options)
    assert torch.autograd.gradgradcheck(run, sources, **options)


def written(base, x):
    with torch.no_grad():
        x.mul_(2)
    return x


@pytest.mark.parametrize("between", [written, lambda base, x: x * 2], ids=["written", "another"])
def test_another_input(between):
    model, base = readers()
    base.before = {1: between}
    x = leaf(2, IN) * 1
    outputs = model(x)
    assert_same(outputs, base.expected)
    if between is not written:  # whose first layer can't be differentiated any more
        sources = [x, *trained(model)]
        assert_same(gradients(outputs, sources), gradients(base.expected, sources))


@pytest.mark.parametrize("place", ["", ".base_layer"])
def test_hooks_of_one_layer(place):
    model, base = readers()
    layer, x, seen = base.get_submodule("1"), leaf(2, IN), []
    hooked = base.get_submodule(f"1{place}")
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    hooked.register_full_backward_hook(lambda module, given, of: seen.append(of[0]))
    outputs = model(x)
    expected = [base.expected[0], lora(layer, x) * 2, base.expected[2]]
    if place:
        expected[1] = lora(layer, x) + nn.functional.linear(x, layer.weight, layer.bias)
    sources = [x, *trained(model)]
    assert_same(gradients(outputs, sources), gradients(expected, sources))
    assert len(seen) == 1


def test_hooks_of_the_input_see_the_sum():
    model, base = readers()
    x, seen = leaf(2, IN) * 1, []
    x.register_hook(seen.append)
    outputs = model(x)
    squares(outputs).backward(retain_graph=True)
    assert_same(seen[:1], gradients(base.expected, [x]))


@pytest.mark.parametrize("again", [False, True])
def test_checkpoints(again):
    """Gradient checkpointing runs the layers again, and compares what is saved."""
    model, base = readers()
    x, run = leaf(2, IN), base.forward
    base.forward = lambda x: checkpoint(lambda x: squares(run(x)), x, use_reentrant=again)
    model(x * 1).backward()
    expected = squares([lora(layer, x) for layer in base.children()])
    assert_same([x.grad], torch.autograd.grad(expected, [x]))


def test_what_autograd_saves_is_kept_by_hooks_alone():
    """They may move it elsewhere, so nothing else holds the input."""
    model, base = readers()
    base.forward = lambda x: [layer(x) for layer in base.children()]
    x = leaf(2, IN) * 1
    with saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        outputs = model(x)
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None
    squares(outputs).backward()


def test_backward_passes_of_some_outputs():
    """One after the other without `retain_graph`, as of heads with a loss each; what others read is
    not reached.
    """
    model, base = readers()
    x = leaf(2, IN)
    outputs = model(x)
    for i in (1, 0, 2):
        sources = [x, *trained(model)]
        found = torch.autograd.grad(squares([outputs[i]]), sources, allow_unused=True)
        assert_same(found, gradients([base.expected[i]], sources))


def test_passes_over_one_graph():
    """For some sources, again for others, and several at a time."""
    model, base = readers()
    x = leaf(2, IN)
    outputs = model(x)
    for sources in (trained(model), [x], [x, *trained(model)]):
        assert_same(gradients(outputs, sources), gradients(base.expected, sources))
    results, barrier = {}, threading.Barrier(2)

    def wait(gradient):  # until one layer is through in both threads
        barrier.wait(10)

    outputs[1].register_hook(wait)

    def run(i):
        results[i] = gradients([y * i for y in outputs], x)

    threads = [threading.Thread(target=run, args=(i,)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (1, 2):
        assert_same(results[i], gradients([y * i for y in base.expected], x))


def test_outputs_written_to():
    model, base = readers()
    x = leaf(2, IN)
    outputs = model(x)
    outputs[0].mul_(2)
    expected, sources = [base.expected[0] * 2, *base.expected[1:]], [x, *trained(model)]
    assert_same(gradients(outputs, sources), gradients(expected, sources))


def test_call_in_a_call():
    """Another model between two layers, with the same input."""
    model, base = readers()
    other, _ = readers("LOKR")
    x, inner = leaf(2, IN), []
    base.before = {1: lambda base, x: (inner.extend(other(x)), x)[1]}
    outputs = model(x)
    assert_same(outputs, base.expected)
    layers = other.get_base_model().children()
    expected = [torch.stack(dense("LOKR", layer, x, [None] * 2)) for layer in layers]
    assert_same(gradients(outputs + inner, x), gradients(base.expected + expected, x))
