# SPDX-License-Identifier: Apache-2.0
"""Prototypes and gates from examples: mean inputs, and the training of gates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor

from ...base.errors import PeftNotSupportedError, PeftTypeError, PeftValueError
from ...base.progress import track
from ...core.fitting import FewShotLoss, Loss, Subject, checked_options, descend, evaluating
from ...core.measuring import watched_inputs
from ...core.routing.task_ids import one_task
from ...core.tuner import BaseTuner
from .adapter import RoutedAdapter
from .config import TRAINS, RoutedConfig
from .layer import RoutedLayer

Batch: TypeAlias = "Mapping[str, object] | Tensor"
Examples: TypeAlias = Mapping[str, Iterable[Batch]]


@dataclass
class _OneExpert:
    """The routing of an adapter while its calls run one expert: its config, as the routing reads
    it. Inputs are averaged over all real tokens.
    """

    n_tasks: int
    task_names: list[str]
    task_type: str | None
    routes_by_input: bool = True
    routing_level: str = "sequence"

    def reads_task_ids(self, training: bool) -> bool:
        """Return True: calls name the expert."""
        return True


@torch.no_grad()
def collect_prototypes(adapter: RoutedAdapter, examples: Examples, with_expert: bool) -> None:
    """Set the prototypes of experts to the mean input of each layer over a few examples."""
    config, layers, adapter_name = adapter.config, adapter.layers, adapter.name
    if config.routing != "activation":
        raise PeftNotSupportedError(
            f"`routing`={config.routing!r} has no prototypes of examples; use 'activation'."
        )
    batches = _batches(config, examples)
    means: dict[str, dict[int, Tensor]] = {path: {} for path in layers}
    for number, of_expert in track(batches.items(), "Collecting prototypes", unit="expert"):
        for path, mean in _mean_inputs(adapter, number, of_expert, with_expert).items():
            if not mean.isfinite().all():
                raise PeftValueError(
                    f"`{path}`: the mean input of expert {config.task_names[number]!r} is NaN or "
                    "infinite; look for such values in its examples."
                )
            means[path][number] = mean
    for path, layer in layers.items():
        experts, gate = layer.factors(adapter_name), layer.routed_gate[adapter_name]
        for place, number in enumerate(experts.numbers.tolist()):
            if number in means[path]:
                gate[place] = means[path][number].to(gate)
                layer.waiting[adapter_name].discard(number)


def _batches(config: RoutedConfig, examples: Examples) -> dict[int, list[Batch]]:
    """Return the batches of each expert by number, checked."""
    if not isinstance(examples, Mapping) or not examples:
        raise PeftTypeError(
            "The examples must be a dictionary, expert → batches: keyword arguments for the "
            f"model, or input tensors; got {type(examples).__name__}."
        )
    result = {}
    for name, given in examples.items():
        given = given if isinstance(given, Iterable) else ()
        batches = [given] if isinstance(given, (Tensor, Mapping)) else list(given)
        if not batches or not all(isinstance(b, (Tensor, Mapping)) for b in batches):
            raise PeftTypeError(
                f"Expert {name!r} needs batches: keyword arguments for the model, or tensors."
            )
        result[one_task(name, config, "examples")] = batches
    return result


def _mean_inputs(
    adapter: RoutedAdapter, number: int, batches: list[Batch], with_expert: bool
) -> dict[str, Tensor]:
    """Return the mean input of each layer, over samples of the mean over their real tokens."""
    tuner, adapter_name, layers = adapter.tuner, adapter.name, adapter.layers
    sums: dict[str, tuple[Tensor, int]] = {}

    def note(path: str, args: tuple[object, ...]) -> None:
        layer, x = layers[path], args[0]
        assert isinstance(x, Tensor)

        def add(pooled: Tensor) -> tuple[Tensor, ...]:
            total, count = sums.get(path, (0, 0))
            sums[path] = total + pooled.double().sum(0), count + pooled.shape[0]
            return (pooled[:, :1],)

        layer.routing.chosen_by_input(x, layer, adapter_name, add)

    with _running_one_expert(adapter, with_expert), watched_inputs(tuner, layers, note):
        for batch in batches:
            if isinstance(batch, Tensor):
                tuner(batch, task_ids=number)
            else:
                tuner(**{**batch, "task_ids": number})
    return {path: total / max(count, 1) for path, (total, count) in sums.items()}


@contextmanager
def _running_one_expert(adapter: RoutedAdapter, with_expert: bool = True) -> Iterator[None]:
    """Context in which `task_ids` name the expert of a call; without it the base model runs."""
    tuner, adapter_name, config = adapter.tuner, adapter.name, adapter.config
    if with_expert:
        adapter.check_running()
    if tuner.active_adapters != [adapter_name] or tuner.merged_adapters:
        raise PeftValueError(
            f"Adapter {adapter_name} must be the only active one, and nothing merged; call "
            "`set_adapter` and `unmerge_adapter` first."
        )
    layers = adapter.layers.values()
    before = {layer: layer.routed_options[adapter_name] for layer in layers}
    routing = next(iter(layers)).routing
    one = _OneExpert(config.n_tasks, config.task_names, config.task_type)
    configs = routing.configs
    for layer, options in before.items():
        layer.routed_options[adapter_name] = options._replace(routing="task")
    configs[adapter_name] = one
    was_disabled = tuner.adapters_disabled
    try:
        if not with_expert and not was_disabled:
            tuner.disable_adapter_layers()
        yield
    finally:
        if not with_expert and not was_disabled:
            tuner.enable_adapter_layers()
        configs[adapter_name] = config
        for layer, options in before.items():
            layer.routed_options[adapter_name] = options


def fit_gates(
    adapter: RoutedAdapter, examples: Mapping[str, Loss] | Loss, steps: int, lr: float
) -> dict[str, list[float]]:
    """Train gates or expert weights, all else frozen; return the losses of each fit."""
    config, layers, adapter_name = adapter.config, adapter.layers, adapter.name
    if config.routing not in TRAINS:
        raise PeftNotSupportedError(f"`routing`={config.routing!r} has nothing to train.")
    steps, lr = checked_options(steps, lr, None, ())
    by_expert: dict[str, Loss] = {}
    if config.routing != "phatgoose":
        by_expert[""] = cast("Loss", examples)
    elif isinstance(examples, Mapping):
        by_expert.update(examples)
    if not by_expert:
        raise PeftTypeError(
            "`routing`='phatgoose' trains a gate for each expert: pass a dictionary, expert → "
            "batches."
        )
    numbers = {name: one_task(name, config, "examples") for name in by_expert if name}
    checked = {
        name: _loss(adapter.tuner, loss, name, numbers.get(name))
        for name, loss in by_expert.items()
    }
    adapter.check_running()
    parameters = _trained(layers, adapter_name, config)
    losses = {}
    with evaluating(adapter.tuner), _training(layers.values(), config.routing == "phatgoose"):
        for parameter in parameters:
            parameter.requires_grad_(True)
        kept = [parameter.detach().clone() for parameter in parameters]
        try:
            for name, loss in checked.items():
                losses[name] = descend(loss, parameters, steps, lr)
                for parameter in parameters:
                    parameter.grad = None
        except BaseException:
            with torch.no_grad():
                for parameter, values in zip(parameters, kept, strict=True):
                    parameter.copy_(values)
            raise
    return losses


def _trained(
    layers: Mapping[str, RoutedLayer], adapter_name: str, config: RoutedConfig
) -> list[Tensor]:
    """Return the parameters that an adapter's routing trains, shared ones once."""
    parameters: dict[int, Tensor] = {}
    for layer in layers.values():
        if TRAINS[config.routing] == "routed_gate":
            parameter = layer.routed_gate[adapter_name]
        else:
            parameter = layer.expert_weights(adapter_name)
        parameters[id(parameter)] = parameter
    return list(parameters.values())


@contextmanager
def _training(layers: Iterable[RoutedLayer], training: bool) -> Iterator[None]:
    """Context in which only the routed layers themselves are in training mode, so that gates train
    without dropout in the model.
    """
    before = [(layer, layer.training) for layer in layers]
    for layer, _ in before:
        layer.training = training
    try:
        yield
    finally:
        for layer, mode in before:
            layer.training = mode


def _loss(tuner: BaseTuner[RoutedConfig], loss: Loss, name: str, number: int | None) -> FewShotLoss:
    """Return the loss on examples of one expert, or of all."""

    def run(batch: Mapping[str, object]) -> object:
        return tuner(**({**batch} if number is None else {**batch, "task_ids": number}))

    fitted = f"the gate of expert {name!r}" if name else "the expert weights or gates"
    subject = Subject(name=fitted, state=fitted, remedy="have it run the model")
    try:
        return FewShotLoss(loss, run, subject)
    except PeftTypeError:
        of_expert = f"[{name!r}]" if name else ""
        raise PeftTypeError(
            f"`examples{of_expert}` must be a function without arguments that returns a loss, or "
            "at least one batch: keyword arguments for the model, in a list."
        ) from None
