# SPDX-License-Identifier: Apache-2.0
"""`generate` with a cache of fixed length, whose forward can be compiled, writes what it writes with
a growing one: for each method, with a task and an adapter of its own for each sample.
"""

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import llama
from torch._dynamo.utils import counters
from transformers import CompileConfig

from peft import get_peft_model

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.tensor([[5, 6, 7], [8, 9, 10], [0, 11, 12]])
OPTIONS = {"input_ids": IDS, "attention_mask": (IDS > 0).long(), "do_sample": False}


def model_of(name, **fields):
    torch.manual_seed(0)
    method = METHODS[name]
    model = get_peft_model(llama(**fields), method.config(target_modules=TARGETS)).eval()
    model.add_adapter("other", method.config(target_modules=TARGETS))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(std=0.5)  # so that adapters change what is written
    return model.eval()


def calls(name):
    """Arguments of calls with one adapter for all samples, and with one for each."""
    own = {"task_ids": torch.tensor([0, 2, 1])} if METHODS[name].call else {}
    return own, {**own, "adapter_names": ["default", "other", "__base__"]}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_static_cache(name):
    model, written = model_of(name), []
    for arguments in calls(name):
        written.append(model.generate(**OPTIONS, **arguments, max_new_tokens=6))
        static = {"cache_implementation": "static", "disable_compile": True}
        again = model.generate(**OPTIONS, **arguments, **static, max_new_tokens=6)
        assert torch.equal(again, written[-1])
    assert not torch.equal(*written)


@pytest.mark.compile
def test_a_compiled_forward():
    """It is one graph for all tokens, and for another call with other tasks."""
    model = model_of("POLY", num_hidden_layers=1)
    arguments = calls("POLY")[1]
    compiled = CompileConfig(backend="eager", mode=None)
    compiled._compile_all_devices = True  # transformers compiles on accelerators only
    torch._dynamo.reset()
    counters.clear()
    static = {"cache_implementation": "static", "compile_config": compiled}
    for tasks in ([0, 2, 1], [1, 0, 0]):
        arguments["task_ids"] = torch.tensor(tasks)
        written = model.generate(**OPTIONS, **arguments, **static, max_new_tokens=5)
        assert torch.equal(written, model.generate(**OPTIONS, **arguments, max_new_tokens=5))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
