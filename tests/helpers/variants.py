# SPDX-License-Identifier: Apache-2.0
"""Variants of the methods, beyond the one of each that the contract table has, for tests of how
torch runs them.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from helpers.methods import METHODS
from helpers.models import mlp
from torch import nn

from peft import get_peft_model

TARGETS = ["0", "2"]


@dataclass
class Case:
    """A variant of a method.

    Args:
        method: Its name in the contract table.
        fields: Fields of its config besides.
        conv: Whether the layers are convolutions.
        routes_by_input: Whether it has no tasks and no weight that could be merged.
    """

    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    conv: bool = False
    routes_by_input: bool = False

    def config(self, **more):
        return METHODS[self.method].config(**{"target_modules": TARGETS, **self.fields, **more})

    def call(self, *tasks):
        """The arguments of a call, task ids as a tensor."""
        by_task = METHODS[self.method].call and not self.routes_by_input
        return {"task_ids": torch.tensor(tasks)} if by_task else {}

    @property
    def merge(self):
        return METHODS[self.method].merge

    def base(self):
        if not self.conv:
            return mlp()
        return nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()

    def input(self):
        return torch.randn(3, 8, 4, 4) if self.conv else torch.randn(3, 8)

    def model(self):
        return get_peft_model(self.base(), self.config())


DROPOUT = {"rank_dropout": 0.3, "rank_dropout_scale": True, "module_dropout": 0.3}
CASES = {
    **{name: Case(name) for name in METHODS},
    "POLY by sample": Case("POLY", {"poly_type": "mope"}, routes_by_input=True),
    "POLY by token": Case(
        "POLY", {"poly_type": "mope", "routing_level": "token"}, routes_by_input=True
    ),
    "POLY one head": Case("POLY", {"n_splits": 1}),
    "POLY one hard router": Case(
        "POLY",
        {
            "n_skills": 3,
            "straight_through": True,
            "router_dropout": 0.2,
            "n_shared_skills": 1,
            "router_granularity": "model",
        },
    ),
    "POLY own skills": Case("POLY", {"task_rank": 1, "n_splits": 1}),
    "POLY top 1": Case("POLY", {"n_skills": 6, "eval_top_k": 1, "rank_pattern": {"2": 3}}),
    "LOHA dropout": Case("LOHA", {"rank_dropout": 0.3, "module_dropout": 0.3}),
    "LOHA conv": Case("LOHA", {"use_effective_conv2d": True}, conv=True),
    "LOHA whole": Case("LOHA", {"r": 8}),
    "LOKR dropout": Case("LOKR", DROPOUT),
    "LOKR conv": Case(
        "LOKR", {**DROPOUT, "use_effective_conv2d": True, "decompose_both": True}, conv=True
    ),
    "LOKR decomposed": Case(
        "LOKR", {"weight_decompose": True, "use_scalar": True, "module_dropout": 0.3}
    ),
    "LOKR columns": Case(
        "LOKR", {"weight_decompose": True, "wd_on_output": False, "full_matrix": True}, conv=True
    ),
    "VBLORA dropout": Case("VBLORA", {"vblora_dropout": 0.3}),
}
TASKS = [(0, 2, 1), (1, 1, 0), (2, 2, 2)]


class Model(nn.Module):
    """A model whose forward is not torch's own, as those are compiled part by part."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers(x)
