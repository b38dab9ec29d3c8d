# SPDX-License-Identifier: Apache-2.0
"""What state the adapters in a model are in: layer by layer, and summed up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .base.containers import walk
from .base.errors import PeftTypeError, PeftValueError
from .base.registry import PEFT_TYPE_TO_TUNER_MAPPING, PeftType
from .core.adapted_model import AdaptedModel
from .core.auxiliary import AuxiliaryTrainingWrapper
from .core.base_peft_model import BasePeftModel
from .core.layer import BaseTunerLayer
from .core.weights import is_quantized
from .integrations import quantization

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """The state of one layer.

    Args:
        name: Its path in the model.
        module_type: Method and class, such as "lokr.Linear".
        enabled: Whether its adapters are switched on.
        active_adapters: Names of the active adapters, those included that this layer lacks.
        merged_adapters: Names of the adapters whose delta is in the weight.
        requires_grad: By adapter, whether it is trainable; "irregular" if only some of its
            parameters are.
        available_adapters: Names of the adapters the layer has, sorted.
        devices: By adapter, the kinds of devices its parameters are on.
        quantization_backend: What keeps the base weight in few bits, None where it is not.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """The state of a model's adapters. What is not the same on all layers is "irregular".

    Args:
        base_model_type: The base model's class; "other" for a model that is neither a `PeftModel`
            nor of transformers.
        adapter_model_type: The tuner's class, "None" for a model that adapters were injected into.
        peft_types: The method of each adapter, empty for a model that adapters were injected into.
        trainable_params, total_params: Numbers of parameters of the whole model.
        num_adapter_layers: How many layers have adapters.
        enabled: Whether adapters are switched on.
        active_adapters: Names of the active adapters.
        merged_adapters: Names of the adapters whose deltas are in the weights, as far as the layers
            have them.
        requires_grad: By adapter, whether it is trainable.
        available_adapters: Names of all adapters, sorted.
        devices: By adapter, the kinds of devices its parameters are on, sorted.
        quantization_backend: What keeps the base weights in few bits.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None = None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of each layer with adapters, modules that are trained beside them included.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.

    Returns:
        In the order of the layers in the model.

    Raises:
        PeftTypeError: Not a model.
        PeftValueError: There are no adapters in it.

    Example:
        >>> import torch
        >>> from peft import LoKrConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoKrConfig(target_modules=["0"]))
        >>> get_layer_status(model)[0].module_type
        'lokr.Linear'
    """
    model = _plain(model)
    searched = model.base_model if isinstance(model, BasePeftModel) else model
    result = [
        _layer_status(path, module)
        for path, module in walk(searched)
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    if not result:
        raise PeftValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that "
            "you have PEFT adapters injected in "
            "the model."
        )
    return result


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of a model's adapters, summed up over the layers.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.

    Raises:
        PeftTypeError: Not a model.
        PeftValueError: There are no adapters in it.

    Example:
        >>> import torch
        >>> from peft import LoKrConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoKrConfig(target_modules=["0"]))
        >>> status = get_model_status(model)
        >>> status.active_adapters, status.enabled, status.requires_grad
        (['default'], True, {'default': True})
    """
    model = _plain(model)
    layers = get_layer_status(model)
    base, tuner, methods = _kinds(model)
    trainable, total = BasePeftModel.get_nb_trainable_parameters(model)  # type: ignore[arg-type]
    names = sorted({name for layer in layers for name in layer.available_adapters})
    by_name = {
        name: [layer for layer in layers if name in layer.available_adapters] for name in names
    }
    adapted = [
        layer for layer in layers if "." in layer.module_type
    ]  # the others are trained whole
    return TunerModelStatus(
        base_model_type=base,
        adapter_model_type=tuner,
        peft_types=methods,
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_same(layer.enabled for layer in layers),
        active_adapters=_active(layers, adapted),
        merged_adapters=_merged(adapted),
        requires_grad={
            name: _same(layer.requires_grad[name] for layer in own) for name, own in by_name.items()
        },
        available_adapters=names,
        devices={
            name: sorted({d for layer in own for d in layer.devices[name]})
            for name, own in by_name.items()
        },
        quantization_backend=_same(layer.quantization_backend for layer in adapted)
        if adapted
        else None,
    )


def _plain(model: Any) -> nn.Module:
    """The model inside what `torch.compile` puts around it."""
    if not isinstance(model, nn.Module):
        raise PeftTypeError(f"The state of adapters is that of a model, got {type(model)}.")
    return model._modules.get("_orig_mod") or model


def _layer_status(path: str, layer: Any) -> TunerLayerStatus:
    """The state of a layer, or of a module trained beside adapters."""
    is_layer = isinstance(layer, BaseTunerLayer)
    read = layer.adapter_tensors if is_layer else layer.parameters_of
    parameters = {
        name: list(read(name)) for name in sorted(layer.scaling if is_layer else layer.adapters)
    }
    names = [
        name for name, own in parameters.items() if own
    ]  # a head may use the rows of the embedding it is tied to
    return TunerLayerStatus(
        name=path,
        module_type=f"{_method(layer)}.{type(layer).__name__}"
        if is_layer
        else type(layer).__name__,
        enabled=not layer.disable_adapters,
        active_adapters=list(layer.active_adapters),
        merged_adapters=list(layer.merged_adapters) if is_layer else [],
        requires_grad={name: _same(p.requires_grad for p in parameters[name]) for name in names},
        available_adapters=names,
        devices={name: sorted({p.device.type for p in parameters[name]}) for name in names},
        quantization_backend=_backend(layer.get_base_layer()) if is_layer else None,
    )


def _method(layer: BaseTunerLayer) -> str:
    """The name of a layer's method, in lower case."""
    for peft_type, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        if isinstance(layer, tuner.tuner_layer_cls):  # type: ignore[attr-defined]
            return PeftType(peft_type).value.lower()
    return type(layer).__module__.rpartition(".")[2]


def _backend(base: nn.Module) -> str | None:
    """What keeps a layer's weight in few bits."""
    form = quantization.storage_format(base)
    if form is not None:
        return form.name
    return type(base).__name__ if is_quantized(base) else None


def _kinds(model: nn.Module) -> tuple[str, str, dict[str, str]]:
    """The kinds of base model and tuner, and the method of each adapter."""
    if isinstance(model, BasePeftModel):
        methods = {
            name: PeftType(config.peft_type).value for name, config in model.peft_config.items()
        }
        return type(model.get_base_model()).__name__, type(model.base_model).__name__, methods
    is_known = hasattr(model, "config") and not isinstance(model, AdaptedModel)
    return type(model).__name__ if is_known else "other", "None", {}


def _same(values: Iterable[Any]) -> Any:
    """The value that all have, "irregular" if there are several."""
    first, *others = values
    return first if all(value == first for value in others) else "irregular"


def _active(
    layers: list[TunerLayerStatus], adapted: list[TunerLayerStatus]
) -> list[str] | Irregular:
    """The active adapters, if all layers agree on them, those apart that lack one."""
    active = _same(layer.active_adapters for layer in adapted or layers)
    for layer in layers if active != "irregular" else ():
        if layer not in adapted and layer.active_adapters != [
            name for name in active if name in layer.available_adapters
        ]:
            return "irregular"
    return active


def _merged(adapted: list[TunerLayerStatus]) -> list[str] | Irregular:
    """The merged adapters, if all layers that have them agree."""
    merged = list(dict.fromkeys(name for layer in adapted for name in layer.merged_adapters))
    agree = all(
        name in layer.merged_adapters
        for layer in adapted
        for name in merged
        if name in layer.available_adapters
    )
    return merged if agree else "irregular"
