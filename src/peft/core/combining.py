# SPDX-License-Identifier: Apache-2.0
"""Making an adapter out of others of its method: what is the same whatever the method.

A request is checked whole, the method computes the new adapter's tensors from the others', and only
then it is put into the model like one that is loaded. Those it is made of are read and never
written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base.errors import PeftTypeError, PeftValueError
from ..base.registry import PeftType
from ..base.suggestions import did_you_mean
from ..base.validation import check_adapter
from ..checkpoint.state_dict import (
    check_complete,
    check_state,
    checkpoint_key,
    companion_tensors,
    in_view,
    write_state,
)
from ..config import is_int
from ..integrations.distributed import state_tensors
from . import combined_heads
from . import plan as _plan
from . import targets as _targets
from .build import Build, Construction
from .layer import BaseTunerLayer

if TYPE_CHECKING:
    from .tuner import BaseTuner

# What a request may ask for that prunes, and so needs a density.
_PRUNING = ("ties", "dare", "magnitude_prune")


@dataclass(frozen=True)
class Combination:
    """A request for a weighted sum of adapters.

    Args:
        adapters: Their names; one may come more than once.
        weights: A factor for each.
        kind: How they are combined.
        svd_rank: Rank of what is approximated; None for the largest of the adapters'.
        svd_clamp: Quantile that the entries of singular vectors are cut off at.
        svd_full_matrices, svd_driver: For `torch.linalg.svd`.
        density: Share of the elements that pruning keeps.
        majority_sign_method: How signs are elected: "total" or "frequency".
        heads: What becomes of modules that several train whole: the name of the one whose is taken,
            or "mean".
    """

    adapters: Sequence[str]
    weights: Sequence[float]
    kind: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: Any = "total"
    heads: str | None = None

    def terms(self) -> list[tuple[str, float]]:
        """Each adapter with its weight."""
        return list(zip(self.adapters, self.weights, strict=True))


@dataclass
class Combined:
    """An adapter made of others, as its method hands it over.

    Args:
        config: Its config; targets and companions are filled in by the core.
        tensors: Its tensors by checkpoint key.
        errors: How far each layer's delta is from the weighted sum of the others', relative to that
            sum in the Frobenius norm; only where the sum is what is aimed at.
    """

    config: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def check(tuner: BaseTuner, request: Combination) -> BaseTuner:
    """Insist on a request that can be fulfilled; the tuner of the adapters' method.

    Raises:
        PeftTypeError: Names or weights are no lists.
        PeftValueError: An unknown adapter, a wrong number of weights, or a value that is not
            allowed.
    """
    if isinstance(request.adapters, str) or not isinstance(request.adapters, Sequence):
        raise PeftTypeError(f"`adapters`={request.adapters!r} must be a list of names.")
    if not isinstance(request.weights, Sequence):
        raise PeftTypeError(
            f"`weights`={request.weights!r} must be a list with a number for each adapter."
        )
    for name in request.adapters:
        check_adapter(name, tuner.peft_config, "does not exist")
    if not request.adapters or len(request.adapters) != len(request.weights):
        raise PeftValueError(
            f"Pass one weight for each adapter; got {len(request.adapters)} and "
            f"{len(request.weights)}."
        )
    if not all(isinstance(w, (int, float)) and math.isfinite(w) for w in request.weights):
        raise PeftValueError(f"`weights`={list(request.weights)} must be finite numbers.")
    kinds = {PeftType(tuner.peft_config[name].peft_type).value for name in request.adapters}  # type: ignore[arg-type]
    if len(kinds) > 1:
        raise PeftValueError(
            f"Adapters of different methods can't be combined: {', '.join(sorted(kinds))}."
        )
    method = tuner.method_of(tuner.peft_config[request.adapters[0]])
    if request.kind not in method.combination_types:
        offers = ", ".join(map(repr, method.combination_types)) or "no combinations"
        hint = did_you_mean(str(request.kind), method.combination_types)
        remedy = (
            ""
            if method.combination_types
            else " Combine them as LoRA, which `convert_to_lora` makes of them."
        )
        raise PeftValueError(
            f"Invalid combination_type: {request.kind!r}; {type(method).__name__} has "
            f"{offers}.{hint}{remedy}"
        )
    for name, value, valid in (
        (
            "svd_rank",
            request.svd_rank,
            request.svd_rank is None or (is_int(request.svd_rank) and request.svd_rank >= 1),
        ),
        ("svd_clamp", request.svd_clamp, request.svd_clamp is None or 0 < request.svd_clamp <= 1),
        (
            "majority_sign_method",
            request.majority_sign_method,
            request.majority_sign_method in ("total", "frequency"),
        ),
        (
            "density",
            request.density,
            not request.kind.startswith(_PRUNING) or _is_density(request.density),
        ),
    ):
        if not valid:
            raise PeftValueError(
                f"`{name}`={value!r} is not allowed for combination_type {request.kind!r}."
            )
    for name in request.adapters:
        if tuner.peft_config[name].trained_biases != "none":
            raise PeftValueError(
                f"Adapter {name} trains biases of the base model, of which there is one copy only; "
                "adapters with `bias` other than "
                "'none' can't be combined."
            )
    return method


def add(tuner: BaseTuner, adapter_name: str, request: Combination) -> dict[str, float]:
    """Put the adapter that a request asks for into the model; the errors of its layers."""
    method = check(tuner, request)
    _plan.check_name(adapter_name, tuner)
    companions = _companions(tuner, request)
    with torch.no_grad():
        combined = method.combine(request)
    put(tuner, adapter_name, request, combined, companions)
    return combined.errors


def derive(tuner: BaseTuner, adapter_name: str, source: str, combined: Combined) -> None:
    """Put an adapter into the model that a method made of one other; what that trains beside its
    layers comes along.

    Raises:
        PeftValueError: The name can't be used.
    """
    _plan.check_name(adapter_name, tuner)
    request = Combination([source], [1.0])
    put(tuner, adapter_name, request, combined, _companions(tuner, request))


def put(
    tuner: BaseTuner,
    adapter_name: str,
    request: Combination,
    combined: Combined,
    companions: dict[str, Tensor],
) -> None:
    """Put a combined adapter into the model; it waits, frozen."""
    method = tuner.method_of(tuner.peft_config[request.adapters[0]])
    paths = [path for path, _ in layers_of(method, request)]
    targets, excluded = _targets.exactly(paths, _plan.own_modules(tuner.model))
    configs: list[Any] = [tuner.peft_config[name] for name in request.adapters]
    whole = dict.fromkeys(name for config in configs for name in config.modules_to_save or ())
    changes = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "modules_to_save": list(whole) or None,
        "trainable_token_indices": next(
            (c.trainable_token_indices for c in configs if c.trainable_token_indices), None
        ),
        **{
            name: None
            for name in ("layers_to_transform", "layers_pattern")
            if hasattr(configs[0], name)
        },
    }
    config = replace(combined.config, inference_mode=False, **changes)
    tensors = {**combined.tensors, **companions}
    tuner.add_adapter(
        adapter_name,
        config,
        Construction(initialize=False),
        fill=lambda build: fill(method, build, tensors),
    )
    method.note_loaded(tuner.model, adapter_name)


def fill(method: BaseTuner, build: Build, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, by checkpoint key, into a finished adapter that is not yet in the model."""
    holders = {*method.tuner_layer_cls.container_names, "trainable_tokens_delta"}
    own = {
        checkpoint_key(name, build.adapter_name, holders, method.shared_parameter_names): tensor
        for name, tensor in build.named_tensors()
    }
    expected = {key: tensor for key, tensor in own.items() if key is not None}
    check_complete(check_state(expected, tensors), build.adapter_name)
    write_state(None, expected, tensors)


def layers_of(tuner: BaseTuner, request: Combination) -> list[tuple[str, Any]]:
    """The layers that have any of the adapters, by path."""
    return [
        (outer_path(path), layer)
        for path, layer in tuner.named_tuner_layers()
        if any(name in layer.scaling for name in request.adapters)
    ]


def outer_path(path: str) -> str:
    """The path of the module that a layer stands for, be it inside a layer of another method."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def shared_value(tuner: BaseTuner, request: Combination, *names: str) -> None:
    """Insist that fields have one value in all configs.

    Raises:
        PeftValueError: One has several.
    """
    for name in names:
        values = {
            adapter: getattr(tuner.peft_config[adapter], name) for adapter in request.adapters
        }
        if any(value != values[request.adapters[0]] for value in values.values()):
            shown = ", ".join(f"{adapter} has {value!r}" for adapter, value in values.items())
            raise PeftValueError(
                f"Adapters are combined as {request.kind!r} only if they have the same `{name}`: "
                f"{shown}."
            )


def uniform_scale(layers: Sequence[BaseTunerLayer], adapter_name: str) -> float:
    """How much an adapter is scaled beyond its config, where all layers must have it alike.

    Raises:
        PeftValueError: They have not.
    """
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


def _companions(tuner: BaseTuner, request: Combination) -> dict[str, Tensor]:
    """Return what the adapters have beside their layers' own tensors, made into one.

    Raises:
        PeftValueError: Several train a copy of the same module, or rows of the same embedding, and
            the request does not say what becomes of them; or they train different rows.
    """
    names = dict.fromkeys(request.adapters)
    rows = {name: tuner.peft_config[name].trainable_token_indices for name in names}  # type: ignore[attr-defined]
    differing = [name for name, indices in rows.items() if indices]
    if len({repr(rows[name]) for name in differing}) > 1:
        raise PeftValueError(
            f"Adapters {', '.join(differing)} train different rows of embeddings, which can't be "
            "combined."
        )
    parts = {}
    for name in names:
        config = tuner.peft_config[name]
        parts[name] = companion_tensors(
            state_tensors(tuner.model, in_view(config, name)).items(), config, name
        )
    weights: dict[str, float] = {}
    for name, weight in request.terms():
        weights[name] = weights.get(name, 0.0) + weight
    return combined_heads.combine(parts, request.heads, weights)


def _is_density(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
