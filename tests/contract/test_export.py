# SPDX-License-Identifier: Apache-2.0
"""Adapted models as programs and as functions: `torch.export`, `torch.jit.trace` and `torch.func`."""

import copy
from io import BytesIO

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import llama
from helpers.variants import CASES, Case, Model
from torch import nn
from torch.export import Dim, export
from torch.func import functional_call, grad, vmap

from peft import get_peft_model, inject_adapter_in_model

pytestmark = pytest.mark.compile
MODES = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])


@pytest.fixture(params=sorted(CASES))
def case(request) -> Case:
    return CASES[request.param]


class WithTasks(nn.Module):
    """A model whose call has the task ids by position; export takes free sizes for named arguments
    alone.
    """

    def __init__(self, model, **options):
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, x, task_ids=None):
        call = {} if task_ids is None else {"task_ids": task_ids}
        return self.model(x, **call, **self.options)


def sample(case, size):
    """An input of any number of samples, with task ids where there are any."""
    return torch.randn(size, *case.input().shape[1:]), *case.call(
        *[(2 * i + 1) % 3 for i in range(size)]
    ).values()


@pytest.mark.parametrize(
    ("case", "strict"),
    [*((name, False) for name in CASES), *((name, True) for name in METHODS)],
    indirect=["case"],
)
def test_batch_and_length_may_be_free(case, strict):
    """Other inputs and, where the method has any, other tasks than it was exported with. What
    strict mode traces of the other variants is what a compiler does.
    """
    model = WithTasks(case.model().eval())
    shape = (8, 4, 4) if case.conv else (4, 8)
    free = {1: Dim("length", min=2, max=64)} if not case.conv else {}

    def inputs(size, length, first=1):
        x = torch.randn(size, *shape) if case.conv else torch.randn(size, length, 8)
        return x, *case.call(*[(2 * i + first) % 3 for i in range(size)]).values()

    batch, sample = Dim("batch", min=2, max=64), inputs(3, 4)
    shapes = ({0: batch, **free}, *({0: batch} for _ in sample[1:]))
    program = export(model, sample, strict=strict, dynamic_shapes=shapes).module()
    for size, length in ((2, 9), (5, 4), (7, 3)):
        x, *tasks = inputs(size, length)
        torch.testing.assert_close(program(x, *tasks), model(x, *tasks))
        other = inputs(size, length, first=2)[1:]
        assert torch.equal(program(x, *tasks), program(x, *other)) == (not tasks)


@pytest.mark.parametrize("name", ["POLY", "POLY by sample"])
def test_a_language_model_with_free_batch_and_length(name):
    case = CASES[name]
    base = llama()
    base.model.layers = base.model.layers[:1]
    adapted = get_peft_model(
        base, case.config(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ).eval()
    model = WithTasks(adapted, use_cache=False, return_dict=False)
    batch, length = Dim("batch", min=2, max=64), Dim("length", min=2, max=32)
    tasks = tuple(case.call(0, 2, 1).values())
    shapes = ({0: batch, 1: length}, *({0: batch} for _ in tasks))
    program = export(
        model, (torch.randint(3, 48, (3, 5)), *tasks), strict=False, dynamic_shapes=shapes
    ).module()
    for size in ((2, 9), (5, 4)):
        ids = torch.randint(3, 48, size)
        tasks = tuple(case.call(*[i % 3 for i in range(size[0])]).values())
        torch.testing.assert_close(program(ids, *tasks), model(ids, *tasks))


@MODES
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_model_that_adapters_were_put_into(name, strict):
    """The model itself, without a `PeftModel` around it; its forward names the task ids."""
    case = CASES[name]
    model = inject_adapter_in_model(
        case.config(target_modules=["layers.0", "layers.2"]), Model(case.base())
    ).eval()
    program = export(model, (case.input(),), case.call(0, 2, 1), strict=strict).module()
    x, call = case.input(), case.call(2, 0, 0)
    torch.testing.assert_close(program(x, **call), model(x, **call))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_program_goes_through_a_file(name):
    case = CASES[name]
    model = case.model().eval()
    model.add_adapter("b", case.config(target_modules=["2"]))
    model.base_model.set_adapter(["default", "b"])
    file = BytesIO()
    torch.export.save(export(model, (case.input(),), case.call(0, 2, 1), strict=False), file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert {
        key for key in loaded.state_dict if "vector_bank" not in key
    } <= model.state_dict().keys()
    x, call = case.input(), case.call(1, 1, 2)
    torch.testing.assert_close(loaded.module()(x, **call), model(x, **call))


def test_out_of_range_tasks_fail_in_an_exported_program():
    case = CASES["POLY"]
    program = export(
        case.model().eval(), (case.input(),), case.call(0, 2, 1), strict=False
    ).module()
    for bad in ((0, 3, 1), (-1, 0, 0)):
        with pytest.raises((RuntimeError, IndexError)):
            program(case.input(), **case.call(*bad))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_model(case):
    model = WithTasks(case.model().eval())
    traced = torch.jit.trace(model, sample(case, 3))
    for _ in range(2):
        inputs = sample(case, 3)
        torch.testing.assert_close(traced(*inputs), model(*inputs))


def trained(model):
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def test_a_call_with_other_parameters(case):
    model = case.model().eval()
    x, call = case.input(), case.call(0, 2, 1)
    other = {name: torch.randn_like(tensor) for name, tensor in trained(model).items()}
    output = functional_call(model, other, (x,), call)
    assert not torch.allclose(output, model(x, **call))
    model.load_state_dict({**model.state_dict(), **other})
    torch.testing.assert_close(output, model(x, **call))


def test_gradients_of_each_sample(case):
    """`vmap` of `grad`, against one backward a sample."""
    model = case.model().eval()
    inputs = sample(case, 3)

    def loss(parameters, *one):
        x, *tasks = (tensor.unsqueeze(0) for tensor in one)
        return (
            functional_call(
                WithTasks(model), {f"model.{n}": p for n, p in parameters.items()}, (x, *tasks)
            )
            .square()
            .sum()
        )

    every = vmap(grad(loss), in_dims=(None, *[0] * len(inputs)))(trained(model), *inputs)
    for i in range(3):
        single = copy.deepcopy(model)
        WithTasks(single)(*(tensor[i : i + 1] for tensor in inputs)).square().sum().backward()
        for name, gradient in every.items():
            torch.testing.assert_close(
                gradient[i], single.get_parameter(name).grad, atol=1e-4, rtol=1e-4
            )


def test_several_models_at_once(case):
    """`vmap` over parameters."""
    model = case.model().eval()
    x, call = case.input(), case.call(0, 2, 1)
    sets = [
        {name: torch.randn_like(tensor) for name, tensor in trained(model).items()}
        for _ in range(2)
    ]
    stacked = {name: torch.stack([one[name] for one in sets]) for name in sets[0]}
    outputs = vmap(lambda parameters: functional_call(model, parameters, (x,), call))(stacked)
    for parameters, output in zip(sets, outputs, strict=True):
        torch.testing.assert_close(
            output, functional_call(model, parameters, (x,), call), atol=1e-4, rtol=1e-4
        )
