# SPDX-License-Identifier: Apache-2.0
"""A later task, learned from a few examples by training one new routing row and nothing else."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from peft import PeftModel, get_peft_model

from .base import Base
from .data import Data, Images
from .methods import Method
from .tasks import Task
from .training import Adapted, accuracy, fit, predict, progress, task_inputs

ROUTER_RATE = 0.3


@dataclass
class Way:
    """One way to learn a new task: the parameters it trains, and the accuracy by task."""

    label: str
    group: str
    trainable: int = 0
    accuracies: dict[str, float] = field(default_factory=dict)


def few(images: Images, shots: int, generator: torch.Generator) -> Images:
    """Return ``shots`` images, with the classes as even as possible."""
    order = torch.randperm(len(images), generator=generator)
    labels = images.labels[order]
    earlier = torch.stack([(labels[:place] == label).sum() for place, label in enumerate(labels)])
    return images.take(order[earlier.argsort(stable=True)[:shots]])


def check_only_new_row(model: PeftModel, before: dict[str, Tensor]) -> None:
    """Raise if anything but the routers' last rows differs from ``before``."""
    for name, now in model.state_dict().items():
        old = before[name]
        if not (
            torch.equal(now[:-1], old[:-1]) if "module_logits" in name else torch.equal(now, old)
        ):
            raise AssertionError(f"learning a new task moved {name}, which belongs to the old ones")


def nearest_row(base: Base, model: PeftModel, task: Task, examples: Images, n_tasks: int) -> int:
    """Return the old task whose routing has the lowest loss on the examples."""
    losses = [
        F.cross_entropy(predict(base, model, task, examples, task_ids=i), examples.labels)
        for i in range(n_tasks)
    ]
    return int(torch.stack(losses).argmin())


def learn_row(
    base: Base, adapted: Adapted, task: Task, data: Data, examples: Images, steps: int
) -> list[tuple[str, int, float]]:
    """Append a row for ``task`` to a routed adapter and train it.

    Returns:
        For each way without and with training: what was done, the parameters trained, the accuracy.
    """
    model, label = adapted.model, adapted.method.label
    old = model.active_peft_config.n_tasks
    near = nearest_row(base, model, task, examples, old)
    model.add_tasks(1, init="mean")
    model.train_only(tasks=[old])
    size = model.get_nb_trainable_parameters()[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def score(row: int) -> float:
        return accuracy(predict(base, model, task, data.test, task_ids=row), data.test)

    ways = [("mean of the rows", 0, score(old)), ("best old row on the examples", 0, score(near))]
    inputs = task_inputs(base, task, examples, len(examples), torch.Generator().manual_seed(0))
    with progress(f"{task.label}: {label}", steps) as bar:
        fit(
            model,
            {"poly_router": ROUTER_RATE},
            steps,
            ({**batch, "task_ids": old} for batch in inputs),
            bar,
        )
    check_only_new_row(model, before)
    return [*ways, ("new row, trained", size, score(old))]


def learn_fresh(
    base: Base, method: Method, name: str, task: Task, data: Data, examples: Images, steps: int
) -> tuple[int, float]:
    """Train a new adapter for the task on the same examples. Return parameters and accuracy."""
    model = get_peft_model(copy.deepcopy(base.model), method.config())
    inputs = task_inputs(base, task, examples, len(examples), torch.Generator().manual_seed(0))
    with progress(f"{task.label}: new {name}", steps) as bar:
        fit(model, method.rates, steps, inputs, bar)
    return model.get_nb_trainable_parameters()[0], accuracy(
        predict(base, model, task, data.test), data.test
    )


def meet(
    base: Base,
    adapted: dict[str, Adapted],
    tasks: list[Task],
    data: Data,
    shots: int,
    steps: int,
    seed: int,
) -> list[Way]:
    """Learn each of ``tasks`` from ``shots`` examples in every way. The routed adapters keep their
    new rows.
    """
    ways: dict[tuple[str, str], Way] = {}

    def note(label: str, group: str, task: Task, trainable: int, score: float) -> None:
        way = ways.setdefault((group, label), Way(label, group, trainable))
        way.accuracies[task.key] = score

    for task in tasks:
        examples = few(data.adapt, shots, torch.Generator().manual_seed(seed))
        note(
            "frozen base",
            "",
            task,
            0,
            accuracy(predict(base, base.model, task, data.test), data.test),
        )
        torch.manual_seed(seed)
        for one in (one for one in adapted.values() if one.method.mode == "routed"):
            for label, size, score in learn_row(base, one, task, data, examples, steps):
                note(label, one.method.label, task, size, score)
        for fresh, name in ((adapted["lora"].method, "LoRA"), (adapted["lokr"].method, "LoKr")):
            note(
                f"new {name} of its own",
                "",
                task,
                *learn_fresh(base, fresh, name, task, data, examples, steps),
            )
    return list(ways.values())
