# SPDX-License-Identifier: Apache-2.0
"""Make an adapter out of others of its method.

A request is checked, the method computes the new adapter's tensors from those of the others, and
then the adapter is put into the model like one that is loaded. The others stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..base.calls.running import changing
from ..base.errors import PeftTypeError, PeftValueError
from ..base.plain_values import JsonObject
from ..base.registry import PeftType
from ..base.suggestions import did_you_mean
from ..base.validation import check_adapter
from ..checkpoint.keys import checkpoint_keys
from ..config import PeftConfig, TargetedConfig, is_int
from . import combined_heads
from .adapter_names import check_name
from .layer import BaseTunerLayer
from .parameter_layer import ParameterLayer
from .skeleton import exact_targets
from .targets import any_layer, named

# Kinds of combinations that prune, and so need a density.
_PRUNING = ("ties", "dare", "magnitude_prune")


@dataclass(frozen=True)
class Combination:
    """A request for a weighted sum of adapters.

    Args:
        adapters: Their names; one may come more than once.
        weights: A factor for each.
        kind: A `combination_type`.
        svd_rank: Rank of an approximation; None for the largest of the adapters'.
        svd_clamp: Quantile that the entries of singular vectors are cut off at.
        svd_full_matrices, svd_driver: For `torch.linalg.svd`.
        density: Share of the elements that pruning keeps.
        majority_sign_method: How signs are elected: "total" or "frequency".
        heads: For modules that several adapters train in full: the adapter whose copy is taken, or
            "mean".
    """

    adapters: Sequence[str]
    weights: Sequence[float]
    kind: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"
    heads: str | None = None

    def terms(self) -> list[tuple[str, float]]:
        """Return each adapter with its weight."""
        return list(zip(self.adapters, self.weights, strict=True))


@dataclass
class Combined:
    """An adapter that a method made of others.

    Args:
        config: Its config; `put` fills in targets and the modules trained beside the layers.
        tensors: Its tensors by checkpoint key.
        errors: Distance of each layer's delta from the weighted sum of the others', relative to the
            sum in the Frobenius norm; for combinations that approximate the sum.
    """

    config: TargetedConfig
    tensors: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


class CombiningMethod(Protocol):
    """The members of a method's `BaseTuner` that combining adapters uses."""

    @property
    def combination_types(self) -> tuple[str, ...]:
        """Return the kinds of combinations that the method has."""

    def named_tuner_layers(self) -> Iterator[tuple[str, BaseTunerLayer]]:
        """Yield the method's layers and their module paths."""

    def combine(self, request: Combination, layers: Mapping[str, Any]) -> Combined:
        """Return the adapter that a request asks for."""

    def note_loaded(self, model: nn.Module, adapter_name: str) -> None:
        """Update the method's state after tensors were written into an adapter."""


class Combinable(Protocol):
    """The members of a model's `BaseTuner` that combining adapters uses."""

    model: nn.Module

    @property
    def peft_config(self) -> Mapping[str, TargetedConfig]:
        """Return each adapter's config, by name."""

    def method_of(self, config: PeftConfig) -> CombiningMethod:
        """Return the tuner of a config's method."""

    def add_with_tensors(
        self, adapter_name: str, config: Any, tensors: Mapping[str, Tensor]
    ) -> None:
        """Put an adapter with given tensors into the model."""


def check(model: Combinable, request: Combination) -> CombiningMethod:
    """Check a request, and return the method of its adapters."""
    if isinstance(request.adapters, str) or not isinstance(request.adapters, Sequence):
        raise PeftTypeError(f"`adapters`={request.adapters!r} must be a list of names.")
    if not isinstance(request.weights, Sequence):
        raise PeftTypeError(
            f"`weights`={request.weights!r} must be a list with a number for each adapter."
        )
    for name in request.adapters:
        check_adapter(name, model.peft_config, "does not exist")
    if not request.adapters or len(request.adapters) != len(request.weights):
        raise PeftValueError(
            f"Pass one weight for each adapter; got {len(request.adapters)} and "
            f"{len(request.weights)}."
        )
    if not all(isinstance(w, (int, float)) and math.isfinite(w) for w in request.weights):
        raise PeftValueError(f"`weights`={list(request.weights)} must be finite numbers.")
    kinds = {PeftType(model.peft_config[name].peft_type).value for name in request.adapters}
    if len(kinds) > 1:
        raise PeftValueError(
            f"Adapters of different methods can't be combined: {', '.join(sorted(kinds))}."
        )
    method = model.method_of(model.peft_config[request.adapters[0]])
    if request.kind not in method.combination_types:
        offers = ", ".join(map(repr, method.combination_types)) or "no combinations"
        hint = did_you_mean(str(request.kind), method.combination_types)
        remedy = ""
        if not method.combination_types:
            remedy = " Combine them as LoRA, which `convert_to_lora` makes of them."
        raise PeftValueError(
            f"Invalid combination_type: {request.kind!r}; {type(method).__name__} has "
            f"{offers}.{hint}{remedy}"
        )
    _check_values(request)
    for name in request.adapters:
        if model.peft_config[name].target_parameters:
            raise PeftValueError(
                "add_weighted_adapter does not support targeting nn.Parameter (problematic adapter "
                f"'{name}'); make several adapters active, which adds them up."
            )
        if model.peft_config[name].trained_biases != "none":
            raise PeftValueError(
                f"Adapter {name} trains biases of the base model, of which there is one copy only; "
                "adapters with `bias` other than 'none' can't be combined."
            )
    return method


def _check_values(request: Combination) -> None:
    """Raise `PeftValueError` if a number or a word of a request is not allowed."""
    rank, clamp, density = request.svd_rank, request.svd_clamp, request.density
    sign = request.majority_sign_method
    needs_density = request.kind.startswith(_PRUNING)
    for name, value, valid in (
        ("svd_rank", rank, rank is None or (is_int(rank) and rank >= 1)),
        ("svd_clamp", clamp, clamp is None or 0 < clamp <= 1),
        ("majority_sign_method", sign, sign in ("total", "frequency")),
        ("density", density, not needs_density or _is_density(density)),
    ):
        if not valid:
            raise PeftValueError(
                f"`{name}`={value!r} is not allowed for combination_type {request.kind!r}."
            )


def add_weighted_adapter(
    self: Combinable,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    heads: str | None = None,
) -> dict[str, float]:
    """Make an adapter out of others, which stay as they are. It is frozen and inactive until
    `set_adapter`.

    Args:
        adapters: Names of adapters of one method.
        weights: A factor for each, of any sign.
        adapter_name: The new adapter's name.
        combination_type: One of the method's `combination_types`. "cat" is the weighted sum of
            the deltas, exactly; "svd" its best approximation of rank `svd_rank`.
        svd_rank: Rank of an approximation, by default the largest of the adapters'.
        svd_clamp: Quantile at which entries of singular vectors are cut off.
        svd_full_matrices, svd_driver: For `torch.linalg.svd`; they do not change the result.
        density: Share of the elements that pruning keeps.
        majority_sign_method: How signs are elected, "total" or "frequency".
        heads: For modules that several adapters train in full: "mean" (by the weights), or the
            adapter whose copy is taken (so an adapter called "mean", if it is one of
            `adapters`).

    Returns:
        For combinations that approximate the weighted sum, each layer's distance from it,
        relative to it in the Frobenius norm.

    Raises:
        PeftTypeError: Names are not a list.
        PeftValueError: A value is not allowed, or the method has no such combination, or the
            adapters do not fit together; nothing is changed.
    """
    svd = svd_rank, svd_clamp, svd_full_matrices, svd_driver
    numbers = list(weights) if isinstance(weights, Iterable) else weights
    request = Combination(
        adapters, numbers, combination_type, *svd, density, majority_sign_method, heads
    )
    return add(self, adapter_name, request)


def add(model: Combinable, adapter_name: str, request: Combination) -> dict[str, float]:
    """Put the adapter that a request asks for into a model; return the errors of its layers."""
    with changing(model):  # the others stay as they are meanwhile
        method = check(model, request)
        check_name(adapter_name, model.peft_config)
        companions = _companions(model, request)
        with torch.no_grad():
            combined = method.combine(request, layers_of(method, request))
        put(model, adapter_name, request, combined, companions)
        return combined.errors


def derive(model: Combinable, adapter_name: str, source: str, combined: Combined) -> None:
    """Put an adapter made of one other into a model; copy the modules trained beside its layers."""
    check_name(adapter_name, model.peft_config)
    request = Combination([source], [1.0])
    put(model, adapter_name, request, combined, _companions(model, request))


def put(
    model: Combinable,
    adapter_name: str,
    request: Combination,
    combined: Combined,
    companions: Mapping[str, Tensor],
) -> None:
    """Put a combined adapter into a model, frozen and inactive.

    `companions` are the tensors that it trains beside its layers, by checkpoint key.
    """
    configs = [model.peft_config[name] for name in request.adapters]
    method = model.method_of(configs[0])
    paths = layers_of(method, request)
    parameters = [name for config in configs for name in config.target_parameters or ()]
    modules = [path for path, layer in paths.items() if not _is_of(layer, path, parameters)]
    changes: JsonObject = {
        "inference_mode": False,
        **exact_targets(model.model, modules),
        **combined_heads.fields_of(configs),
        **any_layer(configs[0]),
    }
    config = replace(combined.config, **changes)
    tensors = {**combined.tensors, **companions}
    model.add_with_tensors(adapter_name, config, tensors)
    method.note_loaded(model.model, adapter_name)


def _is_of(layer: BaseTunerLayer, path: str, parameters: Sequence[str]) -> bool:
    """Return whether a layer adapts one of some targeted parameters."""
    return isinstance(layer, ParameterLayer) and named(parameters, f"{path}.{layer.parameter_name}")


def layers_of(method: CombiningMethod, request: Combination) -> dict[str, BaseTunerLayer]:
    """Return the layers that have any of a request's adapters, by path."""
    return {
        outer_path(path): layer
        for path, layer in method.named_tuner_layers()
        if any(name in layer.scaling for name in request.adapters)
    }


def file_paths(layers: Mapping[str, BaseTunerLayer], adapter_name: str) -> dict[str, str]:
    """Return the paths that an adapter's layers have in its file, by those in the model."""
    ends = {f"{path}.layer.{adapter_name}": path for path in layers}
    keys = checkpoint_keys(ends, adapter_name, ("layer",), ())
    return {ends[name]: key.removesuffix(".layer") for name, key in keys.items()}


def outer_path(path: str) -> str:
    """Return the path of the module that a layer adapts, also if another layer wraps it."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def check_same(configs: Mapping[str, PeftConfig], request: Combination, *names: str) -> None:
    """Raise `PeftValueError` unless fields have one value in the configs of all adapters."""
    for name in names:
        values = {adapter: getattr(configs[adapter], name) for adapter in request.adapters}
        if any(value != values[request.adapters[0]] for value in values.values()):
            shown = ", ".join(f"{adapter} has {value!r}" for adapter, value in values.items())
            raise PeftValueError(
                f"Adapters are combined as {request.kind!r} only if they have the same `{name}`: "
                f"{shown}."
            )


def uniform_scale(layers: Iterable[BaseTunerLayer], adapter_name: str) -> float:
    """Return an adapter's scale beyond its config; raise if it differs between layers."""
    own = [layer for layer in layers if adapter_name in layer.scaling]
    scales = {
        float(layer.scaling[adapter_name]) / layer.base_scaling(adapter_name) for layer in own
    }
    if len(scales) > 1:
        raise PeftValueError(
            f"Adapter {adapter_name} is scaled differently in different layers; call "
            "`unscale_layer` on them."
        )
    return next(iter(scales), 1.0)


def _companions(model: Combinable, request: Combination) -> dict[str, Tensor]:
    """Return the tensors that adapters train beside their layers, combined as the request says."""
    configs = {name: model.peft_config[name] for name in dict.fromkeys(request.adapters)}
    parts = combined_heads.collect(model.model, configs)
    weights: dict[str, float] = {}
    for name, weight in request.terms():
        weights[name] = weights.get(name, 0.0) + weight
    return combined_heads.combine(parts, request.heads, weights)


def _is_density(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
