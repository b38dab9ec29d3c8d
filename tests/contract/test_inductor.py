# SPDX-License-Identifier: Apache-2.0
"""`torch.compile` with its default backend, which makes kernels: too slow for more than one graph,
so all methods are in it.
"""

import copy

import pytest
import torch
from helpers.methods import METHODS
from torch import nn

from peft import get_peft_model


class Every(nn.Module):
    """A small model of each method, side by side."""

    def __init__(self):
        super().__init__()
        made = {
            name: get_peft_model(nn.Sequential(nn.Linear(8, 8)), m.config(target_modules=["0"]))
            for name, m in METHODS.items()
        }
        self.models = nn.ModuleDict(made)

    def forward(self, x, tasks):
        return [
            model(x, **({"task_ids": tasks} if METHODS[name].call else {}))
            for name, model in self.models.items()
        ]


@pytest.mark.compile
def test_values_and_gradients():
    torch._dynamo.reset()
    eager = Every().eval()
    model = copy.deepcopy(eager)
    x, tasks = torch.randn(3, 8), torch.tensor([0, 2, 1])
    # A pool of processes takes longer to start than this takes, and kernels without vector
    # instructions are compiled the fastest.
    with torch._inductor.config.patch({"compile_threads": 1, "cpp.simdlen": 1}):
        outputs = [run(x, tasks) for run in (eager, torch.compile(model, fullgraph=True))]
        torch.testing.assert_close(outputs[1], outputs[0])
        for output in outputs:
            sum(each.square().sum() for each in output).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, eager.get_parameter(name).grad, atol=1e-4, rtol=1e-4
            )
