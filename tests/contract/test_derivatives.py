# SPDX-License-Identifier: Apache-2.0
"""First and second derivatives, forward and backward, batched or not, against the dense formula and
finite differences.
"""

import functools

import pytest
import torch
from helpers.dense import CASES, IN, OUT, call_of, dense, model_of, numbers
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, vmap

# Whose lengths of rows or columns have no gradient, which finite differences don't know.
WITHOUT_LENGTHS = sorted(
    case for case, fields in CASES.items() if not ({"use_dora", "weight_decompose"} & fields.keys())
)


def parts(case, x, adapters=("default",)):
    """A model, its output as a function of input and parameters, that of the formula, and the
    values of the parameters.
    """
    model = model_of(case, adapters)
    if len(adapters) > 1:
        model.base_model.set_adapter(list(adapters))
    call, tasks = call_of(case, x)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def run(x, *values):
        return functional_call(model, dict(zip(trained, values, strict=True)), (x,), call)

    def formula(x, *values):
        own = functools.partial(dense, case, model.base_model.model[0], x, tasks, adapters)
        holder = nn.Module()
        holder.model, holder.forward = model, lambda: torch.stack(own())
        return functional_call(
            holder, {f"model.{name}": v for name, v in zip(trained, values, strict=True)}, ()
        )

    return model, run, formula, tuple(p.detach() for p in trained.values())


def assert_same(one, other):
    for a, b in zip(
        torch.utils._pytree.tree_leaves(one), torch.utils._pytree.tree_leaves(other), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", WITHOUT_LENGTHS)
def test_finite_differences(case):
    """Of both roads: the input has other strides where there are two adapters."""
    for x, adapters in ((numbers(2, IN), ("default",)), (numbers(IN, 2).T, ("one", "two"))):
        _, run, _, values = parts(case, x, adapters)
        sources = [tensor.clone().requires_grad_() for tensor in (x, *values)]
        batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
        assert gradcheck(run, sources, check_forward_ad=True, fast_mode=True, **batched)
        assert gradgradcheck(
            run, sources, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True
        )


@pytest.mark.parametrize("case", CASES)
def test_against_the_formula(case):
    """Forward mode and Hessians, which `torch.func` and autograd make each in its own way."""
    x = numbers(2, IN)
    _, run, formula, values = parts(case, x)
    sources, tangents = (x, *values), tuple(numbers(*v.shape) for v in (x, *values))
    assert_same(jvp(run, sources, tangents), jvp(formula, sources, tangents))

    def loss(function, some, x):
        return function(x, some, *values[1:]).sin().sum()

    wanted = [torch.autograd.functional.hessian(functools.partial(loss, formula), (values[0], x))]
    wanted.append(hessian(lambda pair: loss(run, *pair))((values[0], x)))
    wanted.append(torch.autograd.functional.hessian(functools.partial(loss, run), (values[0], x)))
    wanted.append(
        torch.autograd.functional.hessian(
            functools.partial(loss, run), (values[0], x), vectorize=True
        )
    )
    for found in wanted[1:]:
        assert_same(found, wanted[0])


@pytest.mark.parametrize("case", CASES)
def test_a_layer_that_runs_twice(case):
    """Gradients that are part of a graph are the same as others."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("0", nn.Linear(OUT, OUT))

        def forward(self, x):
            return self._modules["0"](self._modules["0"](x).tanh())

    model = model_of(case, base=Twice())
    layer, x = model.base_model.model._modules["0"], numbers(2, OUT)
    call, tasks = call_of(case, x)
    trained = [p for p in model.parameters() if p.requires_grad]

    def formula(x):
        return torch.stack(dense(case, layer, x, tasks))

    expected = torch.autograd.grad(formula(formula(x).tanh()).square().sum(), trained)
    for create_graph in (False, True):
        assert_same(
            torch.autograd.grad(
                model(x, **call).square().sum(), trained, create_graph=create_graph
            ),
            expected,
        )


@pytest.mark.parametrize("case", CASES)
def test_for_each_sample(case):
    """`vmap` of `grad`: a vector is one sample, as a batch of one is."""
    x = numbers(3, IN)
    model, _, formula, values = parts(case, x)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    call = {"task_ids": 1} if call_of(case, x)[0] else {}

    def loss(values, x):
        return (
            functional_call(model, dict(zip(trained, values, strict=True)), (x,), call)
            .square()
            .sum()
        )

    found = vmap(grad(loss), in_dims=(None, 0))(values, x)
    again = vmap(grad(loss), in_dims=(None, 0))(values, x.unsqueeze(1))
    assert_same(found, again)
    # The same numbers of task 1 for each, whatever place it has in a batch.
    for i in range(3):
        own = tuple(v.clone().requires_grad_() for v in values)
        batch = torch.stack([x[i], x[i]])
        expected = torch.autograd.grad(formula(batch, *own)[1].square().sum(), own)
        assert_same([g[i] for g in found], expected)


@pytest.mark.parametrize("case", CASES)
def test_traces(case):
    """A trace is the same graph with gradients and without, and runs batches of other sizes."""
    model = model_of(case).float()
    call = {"task_ids": 1} if call_of(case, numbers(3, IN))[0] else {}

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x, **call)

    for shape, other in (((3, IN), (5, IN)), ((3, 4, IN), (2, 6, IN)), ((IN,), (IN,))):
        traced = torch.jit.trace(Whole(), torch.randn(shape))
        x = torch.randn(other)
        torch.testing.assert_close(traced(x), model(x, **call))
