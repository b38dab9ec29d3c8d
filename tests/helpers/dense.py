# SPDX-License-Identifier: Apache-2.0
"""Variants of every method beside the dense formula of what they compute, in float64."""

import torch
from helpers.methods import METHODS
from helpers.textbook import adapted_weight
from torch import nn

from peft import get_peft_model

IN, OUT, TASKS, TARGETS = 8, 16, 3, r"(.*\.)?\d"

CASES = {
    "LORA": {},
    "LORA bias": {"lora_bias": True},
    "LORA dora": {"use_dora": True},
    "LORA pissa": {"init_lora_weights": "pissa"},
    "LOHA": {},
    "LOHA whole": {"r": 8},
    "LOKR": {},
    "LOKR both": {"decompose_both": True, "r": 1},
    "LOKR whole": {"r": 32},
    "LOKR rows": {"weight_decompose": True, "use_scalar": True},
    "LOKR columns": {"weight_decompose": True, "wd_on_output": False},
    "VBLORA": {},
    "VBLORA gate": {"output_gate": True},
    "POLY": {},
    "POLY one head": {"n_splits": 1},
    "POLY own skills": {"task_rank": 1},
    "POLY top 1": {"n_skills": 6, "eval_top_k": 1},
    "POLY by sample": {"poly_type": "mope"},
    "POLY by token": {"poly_type": "mope", "routing_level": "token"},
}
BY_INPUT = ("POLY by sample", "POLY by token")


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64)


def model_of(case, adapters=("default",), base=None):
    base = nn.Sequential(nn.Linear(IN, OUT)) if base is None else base
    method = METHODS[case.split()[0]]
    config = method.config(target_modules=TARGETS, **CASES.get(case, {}))
    model = get_peft_model(base.double(), config, adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "gate" in name:
            nn.init.constant_(parameter, 0.7)
        if "router" in name:
            nn.init.normal_(parameter)
    return model.double().eval()


def call_of(case, x):
    """The arguments of a call and the samples' tasks: another task for each sample."""
    if METHODS[case.split()[0]].call == {} or case in BY_INPUT:
        return {}, [None] * 9
    size = 1 if x.dim() == 1 else x.size(0)
    tasks = [i % TASKS for i in range(size)]
    return {"task_ids": tasks}, tasks


def samples_of(y):
    return [y] if y.dim() == 1 else list(y.unbind())


def dense(case, layer, x, tasks, adapters=("default",)):
    """What the layer computes for each sample, by the formula; for routing by token for each token
    by itself.
    """
    base = layer.get_base_layer()

    def of(x, task):
        if case == "POLY by token" and x.dim() > 1:
            rows = x.reshape(-1, x.shape[-1])
            return (
                torch.stack([of(row, task) for row in rows]).reshape(*x.shape[:-1], OUT)
                if len(rows)
                else x.new_zeros(*x.shape[:-1], OUT)
            )
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], OUT)
        total = base.bias * (1 - len(adapters))
        W = base.weight * (1 - len(adapters))
        for name in adapters:
            changed, extra = adapted_weight(layer, x, task, name)
            W, total = W + changed, total + base.bias * 1 + extra
        return x @ W.T + total

    return [
        of(sample.as_subclass(torch.Tensor), task)
        for sample, task in zip(samples_of(x), tasks, strict=False)
    ]
