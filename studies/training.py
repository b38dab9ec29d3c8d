# SPDX-License-Identifier: Apache-2.0
"""Training and accuracy of the upper layers on cached states; the same for all arms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft import PeftModel
from peft.optimizers import create_optimizer

from .encoder import States

Batch = dict[str, Tensor]


def fit_head(
    features: Tensor, labels: Tensor, classes: int, penalty: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Return weight `[classes, width]` and bias of a logistic regression on features `[n, width]`,
    the minimum of `cross entropy + penalty · |weight|²` for standardized features.
    """
    mean, spread = features.mean(0), features.std(0) + 1e-6
    inputs = (features - mean) / spread
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(inputs @ weight.T + bias, labels)
        loss = loss + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    scaled = (weight / spread).detach()
    return scaled, (bias - scaled @ mean).detach()


def mixed_batches(
    tasks: Sequence[States], rows: int, generator: torch.Generator
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches with rows of tasks drawn alike, and the number of each row's task. Each task's
    texts are used up in a random order before they are used again.
    """
    orders: list[Tensor] = [torch.empty(0, dtype=torch.long)] * len(tasks)
    while True:
        chosen = torch.randint(len(tasks), (rows,), generator=generator).sort().values
        parts = []
        for number in chosen.unique().tolist():
            count = int((chosen == number).sum())
            while len(orders[number]) < count:
                again = torch.randperm(len(tasks[number]), generator=generator)
                orders[number] = torch.cat([orders[number], again])
            own, orders[number] = orders[number][:count], orders[number][count:]
            parts.append(tasks[number].batch(own))
        yield join(parts), chosen


def join(parts: Sequence[Batch]) -> Batch:
    """Return batches as one, padded to the longest."""
    longest = max(part["mask"].shape[1] for part in parts)
    pad = nn.functional.pad
    return {
        "hidden": torch.cat(
            [pad(part["hidden"], (0, 0, 0, longest - part["mask"].shape[1])) for part in parts]
        ),
        "mask": torch.cat([pad(p["mask"], (0, longest - p["mask"].shape[1])) for p in parts]),
        "labels": torch.cat([part["labels"] for part in parts]),
    }


def optimize(
    model: nn.Module,
    rates: float | Mapping[str, float],
    steps: int,
    loss: Callable[[], Tensor],
) -> list[float]:
    """Train with AdamW: a tenth of the steps warm up, then the rate falls linearly to zero.
    Gradients are clipped to a norm of 1. Return the losses.

    Args:
        rates: Learning rate, or rates by role as in `peft.optimizers`.
    """
    if not isinstance(rates, (int, float)):
        optimizer = create_optimizer(model, rates=dict(rates))
    elif isinstance(model, PeftModel):
        optimizer = create_optimizer(model, lr=rates)
    else:
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), rates)
    warm, losses = max(1, steps // 10), []
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, (steps - s) / max(1, steps - warm))
    )
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(value.detach()))
    return losses


@torch.no_grad()
def logits(model: nn.Module, states: States, **told: Any) -> Tensor:
    """Return a model's logits for all texts of a part, `[texts, classes]`."""
    model.eval()
    order = (states.ends[1:] - states.ends[:-1]).argsort()
    found = torch.empty(0)
    for numbers in order.split(64):
        batch = states.batch(numbers)
        own = model(hidden=batch["hidden"], mask=batch["mask"], **told)
        found = found if len(found) else own.new_empty(len(states), own.shape[1])
        found[numbers] = own
    return found


def accuracy(model: nn.Module, states: States, **told: Any) -> float:
    """Return the share of texts with the right label."""
    return (logits(model, states, **told).argmax(-1) == states.labels).float().mean().item()


def draw_texts(states: States, count: int, seed: int, evenly: bool = False) -> Batch:
    """Return a batch of a few texts, drawn at random, or evenly over the classes that they have."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(states), generator=generator).tolist()
    if not evenly:
        return states.batch(torch.tensor(order[:count]))
    by_class: dict[int, list[int]] = {}
    for number in order:
        by_class.setdefault(int(states.labels[number]), []).append(number)
    turns: list[int] = []
    while len(turns) < min(count, len(states)):
        turns += [numbers.pop() for numbers in by_class.values() if numbers]
    return states.batch(torch.tensor(turns[:count]))
