# SPDX-License-Identifier: Apache-2.0
"""Small models with Poly adapters, and their routers."""

import torch
from helpers.models import mlp

from peft import PolyConfig, get_peft_model

TARGETS = ["0", "2"]


def task_routers(model):
    layers = model.base_model.named_tuner_layers()
    return {path: layer.router("default") for path, layer in layers}


def config(**fields):
    return PolyConfig(
        **{
            "r": 2,
            "n_tasks": 4,
            "n_skills": 3,
            "n_splits": 2,
            "init_weights": False,
            "target_modules": TARGETS,
            **fields,
        }
    )


def poly(**fields):
    model = get_peft_model(mlp(), config(task_names=["a", "b", "c", "d"], **fields)).eval()
    with torch.no_grad():
        [p.normal_() for n, p in model.named_parameters() if "module_logits" in n]
    return model


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}
