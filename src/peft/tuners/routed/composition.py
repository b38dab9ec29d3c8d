# SPDX-License-Identifier: Apache-2.0
"""Few-shot composition: one weight for each expert, fitted to a few examples of a new task, with
gradients or without. `RoutedModel.fit_weights` documents the arguments.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor, nn

from ...base.errors import PeftNotSupportedError, PeftValueError
from ...base.plain_values import plain
from ...base.progress import track
from ...base.tables import table
from ...base.validation import at_least, check_flags, choice
from ...base.validation import number as finite_number
from ...checkpoint.files import write_report
from ...core.fitting import FewShotLoss, Loss, Subject, checked_options, descend, evaluating
from ...ops.search import evolve
from .adapter import RoutedAdapter

FitMethod = Literal["gradient", "search"]
# Starts of a fit, beside the present weights.
_STARTS = ("zero", "equal", "best")
# The first steps of a search have this share of the bound as their standard deviation.
_FIRST_STEP = 0.2


@dataclass
class WeightFit:
    """Result of fitting experts' weights. `print` shows a table, largest weights first.

    Attributes:
        weights: The weight of each expert; with weights by layer, the mean over the layers.
        by_layer: The weights by module path; empty where all layers have the same.
        losses: The loss with the penalty at the start, after each step, and so on: one more than
            steps. A search has the loss of each point that it tried.
        seconds: Time it took.
        start: The expert alone that it started from; None if it started otherwise.
    """

    weights: dict[str, float]
    by_layer: dict[str, dict[str, float]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    start: str | None = None

    def __str__(self) -> str:
        largest_first = sorted(self.weights.items(), key=lambda entry: -abs(entry[1]))
        rows = [("expert", "weight"), *((name, f"{weight:.3f}") for name, weight in largest_first)]
        return (
            f"{table(rows, right=[1])}\n"
            f"loss {self.losses[0]:.4g} at the start, {min(self.losses):.4g} at best, "
            f"{len(self.losses)} evaluations in {self.seconds:.1f} s"
        )

    def to_dict(self) -> dict[str, object]:
        """Return the result as values of JSON; a loss that is not finite is None."""
        return {
            "weights": self.weights,
            "by_layer": self.by_layer,
            "losses": [loss if isfinite(loss) else None for loss in self.losses],
            "seconds": self.seconds,
            "start": self.start,
        }

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the result to a file; a missing folder is created."""
        write_report(path, self.to_dict())


class _Fitted(nn.Module):
    """The weights that are fitted, in a layer's dtype and on its device, in place of its own."""

    def __init__(self, values: Tensor, like: Tensor, calls: list[None]) -> None:
        super().__init__()
        self._held = values, like, calls  # in a tuple, so that torch does not register them

    def forward(self) -> Tensor:
        """Return the weights, and note the call."""
        values, like, calls = self._held
        calls.append(None)
        return values.to(like)


def fit_weights(
    adapter: RoutedAdapter,
    loss: Loss,
    steps: int = 40,
    lr: float = 0.1,
    init: str | None = None,
    *,
    method: FitMethod = "gradient",
    penalty: float = 0.05,
    bound: float = 1.5,
    by_layer: bool = False,
    seed: int = 0,
) -> WeightFit:
    """Fit the expert weights of a blend, and set them where they gave the least loss."""
    begin = perf_counter()
    _check_can_fit(adapter)
    steps, lr = checked_options(steps, lr, init, _STARTS)
    _check_options(method, penalty, bound, by_layer, seed)
    subject = Subject(
        name="expert weights", state="the expert weights", remedy="have it run the model"
    )
    checked = FewShotLoss(loss, lambda batch: adapter.tuner(**batch), subject)
    groups = _weight_groups(adapter, by_layer)
    fit = WeightFit({})
    with evaluating(adapter.tuner), _fitted(adapter, groups) as (vectors, calls):
        fit.start = _initialize(list(adapter.config.experts), vectors, init, bound, checked)
        if method == "gradient":
            with torch.enable_grad():
                for vector in vectors:
                    vector.requires_grad_(True)
                fit.losses = descend(
                    checked, vectors, steps, lr, lambda: penalty * _mean_norm(vectors), bound
                )
        else:
            fit.losses = _search(checked, vectors[0], steps, penalty, bound, seed)
        if not calls:
            raise PeftValueError(
                f"`loss` never ran the routed layers of adapter {adapter.name}; {subject.remedy}."
            )
    with torch.no_grad():
        for vector, group in zip(vectors, groups, strict=True):
            for weights in group:
                weights.copy_(vector)
    _report(fit, adapter, by_layer)
    fit.seconds = perf_counter() - begin
    return fit


def _check_can_fit(adapter: RoutedAdapter) -> None:
    """Check that the model runs with a blend."""
    if adapter.config.routing not in ("fixed", "learned"):
        raise PeftNotSupportedError(
            f"`routing`={adapter.config.routing!r} has no weights for all inputs to fit; use "
            "'fixed' or 'learned'."
        )
    adapter.check_running()


def _check_options(
    method: object, penalty: object, bound: object, by_layer: object, seed: object
) -> None:
    check_flags(by_layer=by_layer)
    offences = [
        *choice("method", method, ("gradient", "search")),
        *finite_number("penalty", plain(penalty)),
        *finite_number("bound", plain(bound), positive=True),
        *at_least("seed", seed, 0),
    ]
    if not offences and plain(penalty) < 0:
        offences.append(f"`penalty`={penalty} must be at least 0.")
    if offences:
        raise PeftValueError(" ".join(offences))
    if by_layer and method == "search":
        raise PeftValueError(
            "`by_layer`=True fits more numbers than a search finds; use `method`='gradient'."
        )


def _weight_groups(adapter: RoutedAdapter, by_layer: bool) -> list[list[Tensor]]:
    """Return the layers' weights in groups that get the same values."""
    every = (layer.expert_weights(adapter.name) for layer in adapter.layers.values())
    distinct = list({id(weights): weights for weights in every}.values())
    if by_layer and len(distinct) < len(adapter.layers):
        raise PeftValueError(
            "`by_layer`=True needs weights of each layer; the adapter has "
            "`weights_granularity`='model'."
        )
    return [[weights] for weights in distinct] if by_layer else [distinct]


@contextmanager
def _fitted(
    adapter: RoutedAdapter, groups: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[list[Tensor], list[None]]]:
    """Context in which layers use vectors `[experts]`, one for each group of weights, that start
    from the mean of the group; and a list that grows with each use.
    """
    calls: list[None] = []
    vectors: list[Tensor] = []
    of_weights: dict[int, Tensor] = {}
    for group in groups:
        like = group[0].new_empty(0, dtype=torch.promote_types(group[0].dtype, torch.float32))
        vectors.append(torch.stack([weights.detach().to(like) for weights in group]).mean(0))
        of_weights.update({id(weights): vectors[-1] for weights in group})
    before = {}
    for layer in adapter.layers.values():
        weights, modules = layer.expert_weights(adapter.name), layer.routed_weights
        before[layer] = modules[adapter.name]
        modules[adapter.name] = _Fitted(of_weights[id(weights)], weights.detach(), calls)
    try:
        yield vectors, calls
    finally:
        for layer, module in before.items():
            layer.routed_weights[adapter.name] = module


@torch.no_grad()
def _initialize(
    experts: list[str], vectors: Sequence[Tensor], init: str | None, bound: float, loss: FewShotLoss
) -> str | None:
    """Set the weights to a start; return the expert of "best"."""
    best, least = None, float("inf")
    for number in track(
        range(len(experts) if init == "best" else 0), "Trying experts", unit="expert"
    ):
        for vector in vectors:
            vector.zero_()[number] = 1
        value = loss.mean_number()
        if isfinite(value) and value < least:
            best, least = number, value
    for vector in vectors:
        if best is not None:
            vector.zero_()[best] = 1
        elif init is not None:
            vector.fill_(0 if init == "zero" else 1 / len(experts))
        vector.clamp_(-bound, bound)
    return None if best is None else experts[best]


def _mean_norm(vectors: Sequence[Tensor]) -> Tensor:
    """Return `Σ_e |w_e|`, the mean over layers."""
    return torch.stack([vector.abs().sum().to(vectors[0].device) for vector in vectors]).mean()


@torch.no_grad()
def _search(
    loss: FewShotLoss, vector: Tensor, steps: int, penalty: float, bound: float, seed: int
) -> list[float]:
    """Search the weights of least loss, and leave the vector there; return all losses."""
    turns = iter(track(range(steps + 1), "Searching expert weights", unit="evaluation"))

    def objective(x: Tensor) -> float:
        step = next(turns)
        vector.copy_(x)
        value = loss.mean_number() + penalty * float(x.abs().sum())
        if step == 0 and not isfinite(value):
            raise loss.not_finite(f"`loss` is {value}", 0, 0.0)
        return value if isfinite(value) else float("inf")

    best = evolve(
        objective,
        vector.clone(),
        evaluations=steps + 1,
        step=_FIRST_STEP * bound,
        bound=bound,
        seed=seed,
    )
    vector.copy_(best.x)
    return best.values


def _report(fit: WeightFit, adapter: RoutedAdapter, by_layer: bool) -> None:
    """Note the weights that the layers have now."""
    names = list(adapter.config.experts)
    tables = {p: layer.expert_weights(adapter.name) for p, layer in adapter.layers.items()}
    mean = torch.stack([table.detach().double().cpu() for table in tables.values()]).mean(0)
    fit.weights = dict(zip(names, mean.tolist(), strict=True))
    if by_layer:
        fit.by_layer = {
            path: dict(zip(names, table.tolist(), strict=True)) for path, table in tables.items()
        }
