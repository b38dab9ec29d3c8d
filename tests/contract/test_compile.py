# SPDX-License-Identifier: Apache-2.0
"""`torch.compile` of adapted models: whole graphs, none made twice without need, and what an eager
model computes.
"""

import copy

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import llama
from helpers.variants import CASES, TASKS, Model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from peft import get_peft_model, get_peft_model_state_dict

pytestmark = pytest.mark.compile
some_cases = pytest.mark.parametrize("case", [*METHODS, "LOKR conv"], indirect=True)
methods = pytest.mark.parametrize("case", sorted(METHODS), indirect=True)


@pytest.fixture(params=sorted(CASES))
def case(request):
    return CASES[request.param]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(backend="eager"):
    return CompileCounterWithBackend(backend)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_one_graph_for_all_tasks_and_steps(case):
    """Forward, backward and an optimiser's step, three times with other tasks; values are those of
    the eager model, which has two adapters at work where one variant of a method stands for all.
    """
    eager = case.model()
    if case in [CASES[name] for name in METHODS]:
        eager.add_adapter("b", case.config(target_modules=["2"]))
        eager.base_model.set_adapter(["default", "b"])
    eager.train()
    model = copy.deepcopy(eager)
    backend = counted("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimisers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        for m in (eager, model)
    ]
    for tasks in TASKS:
        x, call, outputs = case.input(), case.call(*tasks), []
        for run in (eager, compiled):
            torch.manual_seed(9)  # what training draws
            outputs.append(run(x, **call))
            outputs[-1].square().mean().backward()
        torch.testing.assert_close(outputs[1], outputs[0])
        expected = gradients(eager)
        assert expected
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    assert backend.frame_count == 1


@some_cases
def test_scales_and_batches_of_any_size_cost_one_more_graph_at_most(case):
    """The second value of a scale makes it a variable of the graph."""
    model = case.model().eval()
    backend = counted()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    x, outputs = torch.randn(7, *case.input().shape[1:]), []
    for scale, size in ((1.0, 3), (1.0, 5), (2.0, 3), (3.5, 2), (0.25, 7), (-1.0, 3)):
        for layer in model.base_model.tuner_layers():
            layer.set_scale("default", scale)
        call = case.call(*[i % 3 for i in range(size)])
        outputs.append(compiled(x[:size], **call))
        torch.testing.assert_close(outputs[-1], model(x[:size], **call))
        assert backend.frame_count <= (1 if scale == 1.0 else 2)
    assert not torch.allclose(outputs[0], outputs[2])


@methods
def test_switching_disabling_and_merging(case):
    """Each state is compiled once, and seen at once."""
    model = case.model().eval()
    model.add_adapter("b", case.config(target_modules=["2"]))
    eager, backend = copy.deepcopy(model), counted()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x, call, counts = case.input(), case.call(1, 1, 1), []
    with torch.no_grad():
        for _ in range(2):
            for names in ("default", ["default", "b"]):
                for m in (model, eager):
                    m.base_model.set_adapter(names)
                expected = eager(x, **call)
                torch.testing.assert_close(compiled(x, **call), expected)
            with model.disable_adapter():
                torch.testing.assert_close(compiled(x), case_base(eager, x))
            assert counts or backend.frame_count == 3
            model.merge_adapter(**case.merge)
            torch.testing.assert_close(compiled(x), expected, atol=1e-4, rtol=1e-4)
            model.unmerge_adapter()
            torch.testing.assert_close(compiled(x, **call), expected)
            counts.append(backend.frame_count)
        assert counts[0] == counts[1]
        model.merge_adapter(**case.merge)
        with model.disable_adapter():
            torch.testing.assert_close(compiled(x), case_base(eager, x))
        torch.testing.assert_close(compiled(x, **call), expected)
        torch.testing.assert_close(
            model.merge_and_unload(**case.merge)(x), expected, atol=1e-4, rtol=1e-4
        )


def case_base(model, x):
    """The output of the base layers by themselves."""
    for layer in model.get_base_model():
        x = layer.get_base_layer()(x) if hasattr(layer, "get_base_layer") else layer(x)
    return x


@methods
@pytest.mark.parametrize("where", ["around", "inside"])
def test_a_base_that_was_compiled_before(case, where):
    """As `torch.compile(base)`, which wraps it, or `base.compile()`, which does not."""
    config = case.config(target_modules=["layers.0", "layers.2"])
    eager, base, backend = (
        get_peft_model(Model(case.base()), config).eval(),
        Model(case.base()),
        counted(),
    )
    if where == "around":
        base = torch.compile(base, fullgraph=True, backend=backend)
    else:
        base.compile(fullgraph=True, backend=backend)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), eager.parameters(), strict=True):
            parameter.copy_(other)
    counts = []
    for tasks in TASKS:
        x, call = case.input(), case.call(*tasks)
        torch.testing.assert_close(model(x, **call), eager(x, **call))
        counts.append(backend.frame_count)
    assert counts[0] == counts[-1] >= 1
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(eager).keys()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize("case", [*METHODS, "POLY by sample"], indirect=True)
def test_equal_blocks_share_their_graphs(case):
    """Compiled one by one, five blocks need what one needs: a graph for an input that no gradient
    flows to, one for any other.
    """
    base = nn.Sequential(*(Block() for _ in range(5)))
    eager = get_peft_model(base, case.config(target_modules=["up", "down"])).train()
    model, backend = copy.deepcopy(eager), counted()
    for block in model.get_base_model():
        block.compile(fullgraph=True, backend=backend)
    for tasks in TASKS:
        x, call, outputs = torch.randn(3, 8), case.call(*tasks), []
        for run in (eager, model):
            torch.manual_seed(9)
            outputs.append(run(x, **call))
            outputs[-1].square().sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0])
    for key, gradient in gradients(eager).items():
        torch.testing.assert_close(gradients(model)[key], gradient, atol=1e-4, rtol=1e-4)
    assert backend.frame_count == 2
    assert not any("_orig_mod" in key for key in model.state_dict())


@methods
def test_checkpointed_blocks_inside_a_graph(case):
    """Gradient checkpointing of a part, compiled with the whole."""

    class Checkpointed(Model):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.layers, x, use_reentrant=False)

    plain = get_peft_model(
        Checkpointed(case.base()), case.config(target_modules=["layers.0", "layers.2"])
    ).eval()
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, call = case.input(), case.call(0, 2, 1)
    for run in (plain, compiled):
        run(x, **call).square().sum().backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["POLY", "POLY by sample"], indirect=True)
def test_generation_with_a_compiled_forward(case):
    base = llama()
    base.model.layers = base.model.layers[:1]
    model = get_peft_model(
        base, case.config(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ).eval()
    ids, call = torch.randint(3, 48, (2, 4)), case.call(0, 2)
    options = {"max_new_tokens": 2, "do_sample": False, **call}
    expected = model.generate(input_ids=ids, **options)
    base.forward = torch.compile(base.forward, fullgraph=True, backend="eager")
    assert torch.equal(model.generate(input_ids=ids, **options), expected)
