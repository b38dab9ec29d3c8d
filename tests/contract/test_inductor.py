# SPDX-License-Identifier: Apache-2.0
"""`torch.compile` with its default backend, which makes kernels: too slow for more than one graph a method."""

import copy

import pytest
import torch
from conftest import TARGETS, mlp

from peft import get_peft_model


@pytest.mark.compile
def test_values_and_gradients(method):
    torch._dynamo.reset()
    base = mlp()[:3]
    eager = get_peft_model(base, method.config(target_modules=TARGETS)).eval()
    model = copy.deepcopy(eager)
    x = torch.randn(3, 8)
    call = {"task_ids": torch.tensor([0, 2, 1])} if method.call else {}
    with torch._inductor.config.patch(compile_threads=1):  # a pool of processes takes longer to start than this takes
        outputs = [run(x, **call) for run in (eager, torch.compile(model, fullgraph=True))]
        torch.testing.assert_close(outputs[1], outputs[0])
        for output in outputs:
            output.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, eager.get_parameter(name).grad, atol=1e-4, rtol=1e-4)
