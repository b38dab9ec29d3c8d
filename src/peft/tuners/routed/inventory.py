# SPDX-License-Identifier: Apache-2.0
"""Changes of a routed adapter's experts: their weights, new ones, fewer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...base.errors import PeftTypeError, PeftValueError
from ...base.plain_values import plain
from ...base.suggestions import did_you_mean
from ...base.tensors import ordinary_tensors
from ...base.validation import number as finite_number
from ...core import plan as _plan
from ...core.injection import Build, Construction, build_adapter, put_in
from ...core.routing.task_ids import one_task
from ...ops.low_rank import Deltas
from .adapter import RoutedAdapter
from .config import RoutedConfig
from .entrance import Expert, described
from .layer import RoutedLayer
from .sources import Source, at_hand, key_of


def expert_weights(adapter: RoutedAdapter) -> dict[str, Tensor]:
    """Return the expert weights of each layer, `[experts]`, by module path."""
    return {
        path: layer.expert_weights(adapter.name).detach().clone()
        for path, layer in adapter.layers.items()
    }


@torch.no_grad()
def set_expert_weights(adapter: RoutedAdapter, weights: Mapping[str, object]) -> None:
    """Set expert weights: of all layers by the expert's name, or of some by module path."""
    config, layers = adapter.config, adapter.layers
    adapter.check_unmerged()
    if not isinstance(weights, Mapping) or not weights:
        raise PeftTypeError(
            f"`weights`={weights!r} must be a dictionary: expert → weight, or module path → such a "
            "dictionary."
        )
    by_layer = {key: value for key, value in weights.items() if isinstance(value, Mapping)}
    if by_layer and config.weights_granularity == "model":
        raise PeftValueError("`weights_granularity`='model': all layers have the same weights.")
    if by_layer and len(by_layer) != len(weights):
        raise PeftTypeError("`weights` has module paths and experts as keys; use one of them.")
    for path in by_layer:
        if path not in layers:
            raise PeftValueError(
                f"`weights`: the adapter has no layer {path!r}.{did_you_mean(path, layers)}"
            )
    values = {path: _by_number(config, by_name) for path, by_name in by_layer.items()}
    if not by_layer:
        values = dict.fromkeys(layers, _by_number(config, weights))
    for path, by_number in values.items():
        present = layers[path].expert_weights(adapter.name)
        for number, value in by_number.items():
            present[number] = value


def _by_number(config: RoutedConfig, weights: Mapping[str, object]) -> dict[int, float]:
    """Return weights by the expert's number, checked."""
    result = {}
    for name, value in weights.items():
        value = plain(value)
        for offence in finite_number(f"weights[{name!r}]", value):
            raise PeftValueError(offence)
        result[one_task(name, config, "weights")] = float(value)
    return result


def add_experts(adapter: RoutedAdapter, experts: Mapping[str, Expert]) -> None:
    """Put experts into an adapter, after those that it has."""
    config = adapter.config
    new, in_memory = described(adapter.tuner.model, experts, config.deltas_only)
    if taken := sorted(new.keys() & config.experts.keys()):
        raise PeftValueError(f"The adapter has experts {taken} already; choose other names.")
    _rebuild(adapter, {**config.experts, **new}, in_memory)


def remove_experts(adapter: RoutedAdapter, names: list[str]) -> None:
    """Take experts out of an adapter; later ones move up."""
    config = adapter.config
    gone = {config.task_names[one_task(name, config, "experts")] for name in names}
    left = {name: source for name, source in config.experts.items() if name not in gone}
    if not left:
        raise PeftValueError("No expert would be left; delete the adapter instead.")
    _rebuild(adapter, left, {})


def _rebuild(
    adapter: RoutedAdapter, sources: dict[str, Source], in_memory: dict[str, Deltas]
) -> None:
    """Build an adapter again with other experts, and keep the weights and gates of those it had."""
    tuner, name, before = adapter.tuner, adapter.name, adapter.config
    adapter.check_unmerged()
    present = adapter.experts()
    if before.general_subtraction == "deltas":  # else the factors are less the general ones
        for expert, deltas in present.deltas.items():
            in_memory[key_of(before.experts[expert])] = deltas
    config = replace(before, experts=sources)
    if before.source is not None and not before.save_experts:
        config.source = before.source
    if set(adapter.layers) == set(present.paths()):
        config.target_modules = config.exclude_modules = None
    fresh = type(tuner)(tuner.model, None, shared_root=tuner)
    with ordinary_tensors(), at_hand(in_memory):
        plan = _plan.make(fresh, name, config, is_new=False)
        plan.trainable_copies.clear()
        build: Build[RoutedConfig] = build_adapter(fresh, plan, Construction())
    for path, layer in build.layers.items():
        assert isinstance(layer, RoutedLayer)
        _keep(layer, adapter.layers.get(path), name, before, plan.config)
    active = tuner.active_adapter
    for path, layer in adapter.layers.items():
        if path not in build.layers:
            layer.delete_adapter(name)
    put_in(tuner, tuner, plan, build)
    tuner.inference_cache.forget(name)
    if name in tuner.active_adapters:
        tuner.set_adapter(active, inference_mode=before.inference_mode)


@torch.no_grad()
def _keep(
    layer: RoutedLayer,
    old: RoutedLayer | None,
    adapter_name: str,
    before: RoutedConfig,
    now: RoutedConfig,
) -> None:
    """Copy the weights and gates of the experts that a layer had. New experts of a blend get 0."""
    if before.routing in ("fixed", "learned"):
        layer.expert_weights(adapter_name).zero_()
    if old is None:
        return
    layer.scaling[adapter_name] = old.scaling[adapter_name]
    old_numbers = {name: i for i, name in enumerate(before.experts)}
    in_old = enumerate(old.factors(adapter_name).numbers.tolist())
    old_places = {number: place for place, number in in_old}
    old_gate = old.routed_gate.get(adapter_name)
    for number, name in enumerate(now.experts):
        if name in old_numbers:
            value = old.expert_weights(adapter_name)[old_numbers[name]]
            layer.expert_weights(adapter_name)[number] = value
    names = list(now.experts)
    for place, number in enumerate(layer.factors(adapter_name).numbers.tolist()):
        old_number = old_numbers.get(names[number])
        if old_number in old_places and old_gate is not None:
            layer.routed_gate[adapter_name][place] = old_gate[old_places[old_number]]
            if old_number not in old.waiting[adapter_name]:
                layer.waiting[adapter_name].discard(number)
