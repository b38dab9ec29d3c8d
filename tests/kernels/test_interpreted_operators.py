# SPDX-License-Identifier: Apache-2.0
"""Kernels as operators of compiled and exported programs, interpreted on the CPU, against plain
operations in float64.
"""

from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.export import Dim, export

import peft
from peft.ops import triton_support
from peft.tuners.poly import gating, mixing
from peft.tuners.poly import gating_triton as gating_kernels
from peft.tuners.poly import mixing_triton as mixing_kernels
from peft.tuners.vblora import bank
from peft.tuners.vblora import bank_triton as bank_kernels

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.compile,
    pytest.mark.usefixtures("interpreter", "_fresh"),
]

can_launch = triton_support.can_launch


def no_kernels(*tensors):
    return False


FUNCTIONS = {
    "compose_factors": (bank._compose, bank._example, bank_kernels),
    "task_weights": (gating._weights_of_draws, gating._example, gating_kernels),
    "mix_skills": (mixing._mix, mixing._example, mixing_kernels),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs graphs as they are, and notes our operators in each."""

    def __init__(self):
        self.operators: list[list[str]] = []
        self.backend = aot_autograd(fw_compiler=self.note, bw_compiler=self.note)

    def note(self, graph, inputs):
        targets = (str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        self.operators.append([t.split(".")[1] for t in targets if t.startswith("peft.")])
        return make_boxed_func(graph.forward)


def arguments(name):
    return FUNCTIONS[name][1](torch.device("cpu"))


def exact(name):
    """Results and gradients by plain operations in float64."""
    wide = [
        a.detach().double().requires_grad_(a.requires_grad)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
        else torch.float64
        if isinstance(a, torch.dtype)
        else a
        for a in arguments(name)
    ]
    return outcome(FUNCTIONS[name][0].__wrapped__, wide)


def outcome(function, args):
    results = function(*args)
    results = results if isinstance(results, tuple) else (results,)
    trained = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    loss = sum(result.sin().sum() for result in results)
    return [*results, *torch.autograd.grad(loss, trained)]


@functions
def test_operators_keep_torchs_rules(name):
    """Schema and fake with the kernel; autograd and symbolic sizes with plain operations."""
    operator = getattr(torch.ops.peft, name).default
    torch.library.opcheck(operator, arguments(name), test_utils=("test_schema", "test_faketensor"))
    with mock.patch.object(triton_support, "can_launch", no_kernels):
        torch.library.opcheck(operator, arguments(name))


@functions
def test_a_graph_holds_the_operator_and_its_gradient(name):
    graphs, (function, _, kernels) = Graphs(), FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend=graphs.backend)
    with (
        mock.patch.object(kernels, "forward", wraps=kernels.forward) as forward,
        mock.patch.object(kernels, "backward", wraps=kernels.backward) as backward,
    ):
        found = outcome(compiled, arguments(name))
    assert graphs.operators == [[name], [f"{name}_backward"]]
    assert forward.called and backward.called
    for one, other in zip(found, exact(name), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@functions
def test_what_computes_something_else_is_not_used(name):
    function, _, kernels = FUNCTIONS[name]
    own = kernels.backward
    wrong = mock.patch.object(kernels, "backward", lambda *a: [g * 1.01 for g in own(*a)])
    if name == "task_weights":  # one in a graph
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    untried = mock.patch.dict(triton_support._TRIED, clear=True)
    with untried, wrong, pytest.warns(peft.PeftWarning, match="differ"):
        found = outcome(function, arguments(name))
    for one, other in zip(found, exact(name), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_transforms_inside_a_graph_see_plain_operations():
    graphs = Graphs()
    first, *others = (
        a.detach() if isinstance(a, torch.Tensor) else a for a in arguments("task_weights")
    )

    def gradient(first):
        return gating._weights_of_draws(first, *others).square().sum()

    compiled = torch.compile(torch.func.grad(gradient), fullgraph=True, backend=graphs.backend)
    torch.testing.assert_close(compiled(first), torch.func.grad(gradient)(first))
    assert not any(graphs.operators)


def test_one_graph_for_all_batches():
    graphs = Graphs()
    compiled = torch.compile(mixing.mix, fullgraph=True, backend=graphs.backend, dynamic=True)
    _, A, B, _ = (a.detach() if isinstance(a, torch.Tensor) else a for a in arguments("mix_skills"))
    for batch in (7, 1030, 5):  # the kernel takes up to 1024
        weights = torch.randn(batch, 2, 3)
        for one, other in zip(compiled(weights, A, B), mixing.mix(weights, A, B), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert graphs.operators == [["mix_skills"]]


def test_autocast_inside_a_graph():
    def mixed(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return mixing.mix(*args)

    args = [a.detach() for a in arguments("mix_skills")[:3]]
    graphs = Graphs()
    found = torch.compile(mixed, fullgraph=True, backend=graphs.backend)(*args)
    assert graphs.operators == [["mix_skills"]]
    for one, other in zip(found, mixing.mix(*args), strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=2e-2, atol=2e-2)


CONFIGS = {
    "lora": peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    "lokr": peft.LoKrConfig(r=1, target_modules=["0"], init_weights=False),
    "vblora": peft.VBLoRAConfig(r=2, num_vectors=9, vector_length=8, target_modules=["0"]),
    "poly": peft.PolyConfig(r=2, n_tasks=3, n_skills=3, init_weights=False, target_modules=["0"]),
}


def test_a_compiled_model():
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 8)), CONFIGS["poly"]).train()
    operators, call = ["task_weights", "mix_skills"], {"task_ids": torch.tensor([2, 0, 2])}
    x, graphs, outcomes = torch.randn(3, 8, 16), Graphs(), []
    for run in (model, torch.compile(model, fullgraph=True, backend=graphs.backend)):
        torch.manual_seed(5)
        y = run(x, **call)
        y.square().sum().backward()
        outcomes.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    torch.testing.assert_close(*outcomes)
    assert graphs.operators == [operators, [f"{name}_backward" for name in reversed(operators)]]


@pytest.mark.parametrize("name", ["lora", "lokr", "poly"])
def test_a_compiled_model_in_two_precisions(name):
    """Activations in half precision meet factors in float32 in kernels, of any size."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 8)).half()
    model = peft.get_peft_model(base, CONFIGS[name]).eval()
    call = {"task_ids": torch.tensor([2, 0, 2])} if name == "poly" else {}
    x, graphs = torch.randn(3, 8, 16).half(), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend)

    def outcomes(run, x):
        model.zero_grad()
        x = x.clone().requires_grad_()
        y = run(x, **call)
        y.float().square().sum().backward()
        return [y, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    found = outcomes(compiled, x)
    forward, backward = ([o for o in each if o.startswith("mixed")] for each in graphs.operators)
    assert forward == ["mixed_down", "mixed_add"]
    assert sorted(backward) == ["mixed_across", "mixed_across", "mixed_down", "mixed_up"]
    for one, other in zip(found, outcomes(model.double(), x.double()), strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < (2e-3 if one.dtype == torch.float16 else 1e-3)


@pytest.mark.parametrize("name", ["mixed_down", "mixed_across", "mixed_up", "mixed_add"])
def test_products_keep_torchs_rules(name):
    wide = torch.randn(9, 20).half().requires_grad_()
    thin, p, q = torch.randn(20, 3), torch.randn(9, 3), torch.randn(3, 20)
    for tensor in (thin, p, q) if name in ("mixed_down", "mixed_add") else (wide,):
        tensor.requires_grad_(name in ("mixed_down", "mixed_add"))
    arguments = {
        "mixed_down": (wide, thin),
        "mixed_across": (p, wide),
        "mixed_up": (p, q, wide),
        "mixed_add": (wide, p, q),
    }
    torch.library.opcheck(getattr(torch.ops.peft, name).default, arguments[name])


def test_an_exported_model():
    """It runs, and trains, where no kernels run too."""
    model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 8)), CONFIGS["vblora"]).eval()
    x, batch = torch.randn(3, 16), Dim("batch", min=2, max=64)
    inner = model.get_base_model()
    program = export(inner, (x,), strict=False, dynamic_shapes=({0: batch},)).module()
    assert "peft.compose_factors" in program.code
    x = torch.randn(5, 16)
    expected = outcome(model, [x.requires_grad_()])
    for kernels in (True, False):
        with mock.patch.object(triton_support, "can_launch", can_launch if kernels else no_kernels):
            torch.testing.assert_close(outcome(program, [x]), expected)
