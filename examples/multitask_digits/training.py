# SPDX-License-Identifier: Apache-2.0
"""Functions that train, predict and measure, the same for every method."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor, nn
from tqdm import tqdm

from peft import PeftModel, get_peft_model

from .base import Base
from .data import Images
from .methods import Method
from .tasks import Task


@dataclass(frozen=True)
class Budget:
    """How long to train: every method sees each task's examples equally often.

    Args:
        examples: Labeled pictures of each task.
        epochs: Passes over them.
        batch: Pictures a step: from all tasks for a joint adapter, from its one task (and half as
            many) for the others.
    """

    examples: int
    epochs: int
    batch: int

    def steps(self, rows_a_task: int) -> int:
        return self.epochs * -(-self.examples // rows_a_task)


@dataclass
class Adapted:
    """A method's trained model and its measurements. ``logits`` are those of the test part, by
    task.
    """

    method: Method
    model: PeftModel
    trainable: int
    seconds: float
    logits: dict[str, Tensor] = field(default_factory=dict)


def batches(images: Images, rows: int, generator: torch.Generator) -> Iterator[Images]:
    """Yield shuffled batches of ``rows`` images without end."""
    rows = min(rows, len(images))
    while True:
        order = torch.randperm(len(images), generator=generator)
        for index in order[: len(order) - len(order) % rows].split(rows):
            yield images.take(index)


def parameter_groups(model: nn.Module, rates: dict[str, float]) -> list[dict]:
    """Return trainable parameters by learning rate. The first fragment in ``rates`` that the name
    contains counts.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = next(rate for fragment, rate in rates.items() if fragment in name)
            groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def fit(
    model: nn.Module, rates: dict[str, float], steps: int, inputs: Iterator[dict], bar: tqdm
) -> None:
    """Train with AdamW and clipped gradients: a tenth of the steps warm up, then the rate falls
    linearly.
    """
    groups = parameter_groups(model, rates)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    model.train()
    for step in range(steps):
        loss = model(**next(inputs)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.update()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


def task_inputs(
    base: Base, task: Task, images: Images, rows: int, generator: torch.Generator
) -> Iterator[dict]:
    """Batches of one task."""
    for some in batches(images, rows, generator):
        yield {"pixel_values": base.prepare(task(some.pixels)), "labels": some.labels}


def joint_inputs(
    base: Base,
    tasks: Sequence[Task],
    parts: Sequence[Images],
    rows: int,
    routed: bool,
    generator: torch.Generator,
) -> Iterator[dict]:
    """Batches with ``rows`` images of every task; with ``task_ids [len(tasks) * rows]`` for a
    routed adapter.
    """
    streams = [
        task_inputs(base, task, part, rows, generator)
        for task, part in zip(tasks, parts, strict=True)
    ]
    while True:
        some = [next(stream) for stream in streams]
        batch = {key: torch.cat([one[key] for one in some]) for key in ("pixel_values", "labels")}
        if routed:
            counts = torch.tensor([len(one["labels"]) for one in some])
            batch["task_ids"] = torch.arange(len(tasks)).repeat_interleave(counts)
        yield batch


def train(
    base: Base,
    method: Method,
    tasks: Sequence[Task],
    parts: Sequence[Images],
    budget: Budget,
    seed: int,
) -> Adapted:
    """Adapt a copy of the base to ``tasks`` with ``method``, from ``parts[i]`` for ``tasks[i]``."""
    torch.manual_seed(seed)
    run = train_per_task if method.mode == "per task" else train_jointly
    start = perf_counter()
    model, trainable = run(base, method, tasks, parts, budget, torch.Generator().manual_seed(seed))
    return Adapted(method, model, trainable, perf_counter() - start)


def train_jointly(
    base: Base,
    method: Method,
    tasks: Sequence[Task],
    parts: Sequence[Images],
    budget: Budget,
    generator: torch.Generator,
) -> tuple[PeftModel, int]:
    """Train one adapter for all tasks, with all tasks in each batch. Return the model and its
    trainable parameters.
    """
    model = get_peft_model(copy.deepcopy(base.model), method.config())
    rows = max(1, budget.batch // len(tasks))
    steps = budget.steps(rows)
    inputs = joint_inputs(base, tasks, parts, rows, method.mode == "routed", generator)
    with progress(method.label, steps) as bar:
        fit(model, method.rates, steps, inputs, bar)
    return model, model.get_nb_trainable_parameters()[0]


def train_per_task(
    base: Base,
    method: Method,
    tasks: Sequence[Task],
    parts: Sequence[Images],
    budget: Budget,
    generator: torch.Generator,
) -> tuple[PeftModel, int]:
    """Train an adapter per task on one model, one after the other. Return the model and the sum of
    their parameters.
    """
    model = get_peft_model(copy.deepcopy(base.model), method.config(), adapter_name=tasks[0].key)
    for task in tasks[1:]:
        model.add_adapter(task.key, method.config())
    rows = min(max(1, budget.batch // 2), budget.examples)
    steps, trainable = budget.steps(rows), 0
    with progress(method.label, steps * len(tasks)) as bar:
        for task, part in zip(tasks, parts, strict=True):
            model.set_adapter(task.key)
            fit(model, method.rates, steps, task_inputs(base, task, part, rows, generator), bar)
            trainable += model.get_nb_trainable_parameters()[0]
    return model, trainable


def progress(label: str, steps: int) -> tqdm:
    """A bar that lines up with the others."""
    return tqdm(total=steps, desc=f"{label:28s}", unit="step", dynamic_ncols=True)


@torch.no_grad()
def predict(base: Base, model: nn.Module, task: Task, images: Images, **kwargs: int) -> Tensor:
    """Return logits ``[len(images), classes]`` of ``images`` transformed by ``task``, with
    ``task_ids=<number>`` for a routed adapter.
    """
    model.eval()
    chunks = [base.prepare(task(pixels)) for pixels in images.pixels.split(256)]
    return torch.cat([model(pixel_values=chunk, **kwargs).logits for chunk in chunks])


def predict_tasks(
    base: Base, method: Method, model: PeftModel, tasks: Sequence[Task], images: Images
) -> dict[str, Tensor]:
    """Return the logits of every task, with the adapter that ``method`` has for it."""
    logits = {}
    for number, task in enumerate(tasks):
        if method.mode == "per task":
            model.set_adapter(task.key)
        kwargs = {"task_ids": number} if method.mode == "routed" else {}
        logits[task.key] = predict(base, model, task, images, **kwargs)
    return logits


def accuracy(logits: Tensor, images: Images) -> float:
    """Return the share of images whose largest logit is their label's."""
    return (logits.argmax(-1) == images.labels).float().mean().item()
