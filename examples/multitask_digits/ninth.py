# SPDX-License-Identifier: Apache-2.0
"""A task that comes later: learned from a handful of examples by training one new routing row and nothing else."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from peft import PeftModel, PolyConfig, get_peft_model

from .base import Base
from .data import Data, Images
from .methods import RANK, SKILLS, target_names
from .tasks import Task
from .training import accuracy, fit, predict, task_inputs


@dataclass
class Ninth:
    """Accuracy on a task that was not there in training, by way of meeting it."""

    shots: int
    row_parameters: int
    accuracies: dict[str, float]


def few(images: Images, shots: int, generator: torch.Generator) -> Images:
    """``shots`` images, the classes as evenly as they come."""
    order = torch.randperm(len(images), generator=generator)
    rank = torch.zeros(len(order), dtype=torch.long)
    seen: dict[int, int] = {}
    for place, label in enumerate(images.labels[order].tolist()):
        rank[place] = seen[label] = seen.get(label, -1) + 1
    return images.take(order[rank.argsort(stable=True)[:shots]])


def train_new_row(model: PeftModel) -> None:
    """Freeze all but the routers, and of these let gradients reach the last row only."""

    def last_row_only(gradient: Tensor) -> Tensor:
        masked = torch.zeros_like(gradient)
        masked[-1] = gradient[-1]
        return masked

    for name, parameter in model.named_parameters():
        parameter.requires_grad_("module_logits" in name)
        if parameter.requires_grad:
            parameter.register_hook(last_row_only)


def learn_ninth(base: Base, poly: PeftModel, task: Task, data: Data, shots: int, steps: int, seed: int) -> Ninth:
    """Add the task to a trained Poly adapter and learn its row; measure what else could have been done."""
    generator = torch.Generator().manual_seed(seed)
    images = few(data.adapt, shots, generator)
    new = poly.active_peft_config.n_tasks
    scores = {"frozen base": accuracy(predict(base, base.model, task, data.test), data.test)}
    poly.add_tasks(1, init="mean")
    before = {name: others(name, tensor).clone() for name, tensor in poly.state_dict().items()}
    scores["new row, the mean of the eight (no training)"] = accuracy(predict(base, poly, task, data.test, task_ids=new), data.test)
    inputs = task_inputs(base, task, images, len(images), generator)
    train_new_row(poly)
    routed = ({**batch, "task_ids": new} for batch in inputs)
    with tqdm(total=2 * steps, desc=f"ninth task, {shots} examples", unit="step") as bar:
        fit(poly, {"module_logits": 0.3}, steps, routed, bar)
        scores["new row, trained"] = accuracy(predict(base, poly, task, data.test, task_ids=new), data.test)
        targets = target_names(base.model)
        fresh = get_peft_model(copy.deepcopy(base.model), PolyConfig(r=RANK * SKILLS, n_skills=1, target_modules=targets))
        fit(fresh, {"module_logits": 1e-2, "poly_lora": 1e-2}, steps, inputs, bar)
        scores["a new LoRA of its own, trained"] = accuracy(predict(base, fresh, task, data.test), data.test)
    unmoved = all(torch.equal(others(name, tensor), before[name]) for name, tensor in poly.state_dict().items())
    if not unmoved:
        raise AssertionError("learning the ninth task moved something besides its own routing row")
    return Ninth(shots, sum(p.shape[1] for n, p in poly.named_parameters() if "module_logits" in n), scores)


def others(name: str, tensor: Tensor) -> Tensor:
    """What learning a new task must not move: of a router the rows before the last, of anything else all of it."""
    return tensor[:-1] if "module_logits" in name else tensor
