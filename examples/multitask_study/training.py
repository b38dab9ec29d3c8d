# SPDX-License-Identifier: Apache-2.0
"""Training on many tasks at once, accuracy by task, and adapting to a new task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import process_time

import torch
from examples.multitask_digits.base import Base
from examples.multitask_digits.data import Images
from torch import Tensor, nn

from peft import get_peft_model
from peft.optimizers import create_optimizer

from .methods import Method, Way
from .tasks import Task


@dataclass
class Budget:
    """Amount of training.

    Args:
        steps: Of joint training.
        rows: Pictures of each task in a step of joint training; adapters of single tasks see as
            many in all, 16 a step.
        adapt_steps: On a new task.
    """

    steps: int = 400
    rows: int = 3
    adapt_steps: int = 30


@dataclass
class Trained:
    """A method after training: a model for all tasks, or one for each."""

    method: Method
    models: list[nn.Module]
    parameters: int = 0
    seconds: float = 0.0
    accuracies: dict[str, float] = field(default_factory=dict)

    def of(self, number: int) -> nn.Module:
        """Return the model for a task."""
        return self.models[number if self.method.mode == "per task" else 0]

    def arguments(self, number: int) -> dict[str, int]:
        """Return the arguments that tell the model the task."""
        return {"task_ids": number} if self.method.mode == "routed" else {}


def optimize(
    model: nn.Module, rates: dict[str, float], steps: int, loss: Callable[[], Tensor]
) -> None:
    """Train with AdamW: a tenth of the steps warm up, then the rate falls linearly."""
    by_role = {role: rate for role, rate in rates.items() if role != "all"}
    optimizer = create_optimizer(model, lr=rates.get("all"), rates=by_role)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, (steps - s) / max(1, steps - warm))
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(
            [p for group in optimizer.param_groups for p in group["params"]], 1.0
        )
        optimizer.step()
        schedule.step()


def batches(
    base: Base, task: Task, images: Images, rows: int, generator: torch.Generator
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function that gives the next batch of a task. It goes through the task's pictures in
    a new random order each time.
    """
    pixels, order = base.prepare(task(images.pixels)), torch.empty(0, dtype=torch.long)

    def following() -> tuple[Tensor, Tensor]:
        nonlocal order
        while len(order) < rows:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        index, order = order[:rows], order[rows:]
        return pixels[index], images.labels[index]

    return following


def train(
    base: Base,
    method: Method,
    tasks: Sequence[Task],
    parts: Sequence[Images],
    budget: Budget,
    seed: int,
) -> Trained:
    """Train a method on all tasks, from ``parts[i]`` for ``tasks[i]``."""
    if method.config is None:
        return Trained(method, [base.model])
    torch.manual_seed(seed)
    generator, start = torch.Generator().manual_seed(seed), process_time()
    models = [get_peft_model(copy.deepcopy(base.model), copy.deepcopy(method.config)).train()]
    if method.mode == "per task":
        models = [
            models[0],
            *(
                get_peft_model(copy.deepcopy(base.model), copy.deepcopy(method.config)).train()
                for _ in tasks[1:]
            ),
        ]
        for model, task, images in zip(models, tasks, parts, strict=True):
            following = batches(base, task, images, 16, generator)
            optimize(
                model,
                method.rates,
                max(1, budget.steps * budget.rows // 16),
                lambda m=model, f=following: loss_of(m, *f()),
            )
    else:
        streams = [
            batches(base, task, images, budget.rows, generator)
            for task, images in zip(tasks, parts, strict=True)
        ]
        ids = torch.arange(len(tasks)).repeat_interleave(budget.rows)
        told = {"task_ids": ids} if method.mode == "routed" else {}

        def joint() -> Tensor:
            pixels, labels = zip(*(stream() for stream in streams), strict=True)
            return loss_of(models[0], torch.cat(pixels), torch.cat(labels), **told)

        optimize(models[0], method.rates, budget.steps, joint)
    result = Trained(method, [model.eval() for model in models])
    result.parameters = sum(model.get_nb_trainable_parameters()[0] for model in models)
    result.seconds = process_time() - start
    return result


def loss_of(model: nn.Module, pixels: Tensor, labels: Tensor, **told: Tensor | int | str) -> Tensor:
    """Return the cross entropy on a batch."""
    return model(pixel_values=pixels, labels=labels, **told).loss


@torch.no_grad()
def accuracy(base: Base, model: nn.Module, task: Task, images: Images, **told: int | str) -> float:
    """Return the share of pictures, transformed by a task, that a model classifies correctly."""
    model.eval()
    logits = model(pixel_values=base.prepare(task(images.pixels)), **told).logits
    return (logits.argmax(-1) == images.labels).float().mean().item()


def adapt(
    base: Base, trained: Trained, way: Way, task: Task, few: Images, steps: int, seed: int
) -> tuple[nn.Module, dict, float]:
    """Adapt a copy of a model to a new task from a few pictures. Return it, its task arguments and
    the processor's seconds.
    """
    torch.manual_seed(seed)
    rates, pixels, told = trained.method.ways[way], base.prepare(task(few.pixels)), {}
    model = (
        trained.models[0]
        if way == "none"
        else copy.deepcopy(base.model if way == "new" else trained.models[0])
    )
    start = process_time()
    if way == "new":
        model = get_peft_model(model, copy.deepcopy(trained.method.config))
    elif way in ("Z", "full"):
        model.add_tasks(1)
        told = {"task_ids": model.peft_config["default"].n_tasks - 1}
    if way == "Z":
        model.fit_task(
            told["task_ids"],
            lambda: loss_of(model, pixels, few.labels, **told),
            steps,
            rates["router"],
            init="best",
        )
    elif way != "none":
        if way in ("full", "mu"):
            model.begin_regime(way, [told["task_ids"]] if told else None)
        model.train()
        optimize(model, rates, steps, lambda: loss_of(model, pixels, few.labels, **told))
    return model, told, process_time() - start
