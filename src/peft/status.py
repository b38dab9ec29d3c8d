# SPDX-License-Identifier: Apache-2.0
"""State of the adapters in a model: of each layer, and of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .base.containers import walk
from .base.errors import PeftTypeError, PeftValueError, warn
from .base.registry import PEFT_TYPE_TO_TUNER_MAPPING, PeftType
from .base.tables import alike, table
from .core.auxiliary import AuxiliaryTrainingWrapper
from .core.layer import BaseTunerLayer
from .core.model_methods import is_tuner, tuner_of
from .core.weights import is_quantized
from .integrations.distributed import full_sizes, is_flattened, unwrap_model
from .integrations.quantization import storage_format

Irregular = Literal["irregular"]
T = TypeVar("T")


@dataclass
class TunerLayerStatus:
    """State of one layer.

    Args:
        name: Its path in the model.
        module_type: Method and class ("lokr.Linear"); the class alone for a module that is trained
            beside the adapters.
        enabled: False if its adapters are switched off.
        active_adapters: Names of the model's active adapters; the layer may lack some of them.
        merged_adapters: Names of the adapters whose delta is in the weight.
        requires_grad: True for a trainable adapter, by name; "irregular" if only some of its
            parameters are trainable.
        available_adapters: Names of the adapters that the layer has, sorted.
        devices: Kinds of the devices of each adapter's parameters, by name.
        quantization_backend: Storage format of a quantized base weight, None for other weights.
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
    """State of a model's adapters. A value that differs from layer to layer is "irregular".

    Args:
        base_model_type: The base model's class; "other" for a model that is neither a `PeftModel`
            nor one of transformers.
        adapter_model_type: The tuner's class; "None" for a model that adapters were injected into.
        peft_types: The method of each adapter; empty for a model that adapters were injected into.
        trainable_params, total_params: Numbers of the model's parameters.
        num_adapter_layers: Number of layers with adapters.
        enabled: False if the adapters are switched off.
        active_adapters: Names of the active adapters.
        merged_adapters: Names of the merged adapters, compared over the layers that have them.
        requires_grad: True for a trainable adapter, by name.
        available_adapters: Names of all adapters, sorted.
        devices: Kinds of the devices of each adapter's parameters, by name, sorted.
        quantization_backend: Storage format of quantized base weights, None for other weights.
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

    def __str__(self) -> str:
        """Return a table of the adapters."""
        share = self.trainable_params / max(self.total_params, 1)
        kind = self.base_model_type
        kind = kind if self.adapter_model_type == "None" else f"{self.adapter_model_type} on {kind}"
        rows = [("adapter", "method", "state", "trainable", "devices")]
        for name in self.available_adapters:
            trainable = self.requires_grad[name]
            rows.append(
                (
                    name,
                    self.peft_types.get(name, "?"),
                    self._state(name),
                    trainable if isinstance(trainable, str) else "yes" if trainable else "no",
                    ", ".join(self.devices[name]),
                )
            )
        lines = [
            f"{kind}: {self.num_adapter_layers} layers with adapters, {self.trainable_params:,} of "
            f"{self.total_params:,} parameters trainable ({share:.2%})",
            table(rows),
        ]
        if self.quantization_backend is not None:
            lines.append(f"base weights: {self.quantization_backend}")
        return "\n".join(lines)

    def _state(self, name: str) -> str:
        """Return the state of an adapter in words."""
        words = [
            word
            for word, names in (("active", self.active_adapters), ("merged", self.merged_adapters))
            if name in names and names != "irregular"
        ]
        if "irregular" in (self.active_adapters, self.merged_adapters, self.enabled):
            words.append("not the same in all layers")
        if self.enabled is False:
            words.append("disabled")
        return ", ".join(words) or "inactive"


class LayerStatuses(list[TunerLayerStatus]):
    """The states of layers. Print them for a table."""

    def __str__(self) -> str:
        cells = {
            layer.name: (
                layer.module_type,
                ", ".join(layer.available_adapters),
                ", ".join(layer.active_adapters) if layer.enabled else "(disabled)",
                ", ".join(layer.merged_adapters),
                ", ".join(name for name, trains in layer.requires_grad.items() if trains),
            )
            for layer in self
        }
        heading = ("layer", "class", "adapters", "active", "merged", "trainable")
        return table([heading, *alike(cells)])


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the state of each layer with adapters, and of each module that is trained beside them.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.

    Returns:
        The states, in the order of the layers in the model; printing them shows a table.

    Raises:
        PeftTypeError: `model` is not a torch module.
        PeftValueError: The model has no adapters.

    Example:
        >>> from peft import LoKrConfig, get_peft_model
        >>> base = nn.Sequential(nn.Linear(8, 8))
        >>> model = get_peft_model(base, LoKrConfig(target_modules=["0"]))
        >>> get_layer_status(model)[0].module_type
        'lokr.Linear'
    """
    model = _inside(model)
    searched = tuner_of(model) or model
    result = LayerStatuses(
        _layer_status(path, module)
        for path, module in walk(searched)
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    )
    if not result:
        raise PeftValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that "
            "you have PEFT adapters injected in the model."
        )
    return result


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the state of a model's adapters, summed up over its layers.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.

    Raises:
        PeftTypeError: `model` is not a torch module.
        PeftValueError: The model has no adapters.

    Example:
        >>> from peft import LoKrConfig, get_peft_model
        >>> base = nn.Sequential(nn.Linear(8, 8))
        >>> status = get_model_status(get_peft_model(base, LoKrConfig(target_modules=["0"])))
        >>> status.active_adapters, status.enabled, status.requires_grad
        (['default'], True, {'default': True})
    """
    layers = get_layer_status(model)
    # The others are modules that are trained beside the adapters.
    adapted = [layer for layer in layers if "." in layer.module_type]
    names = sorted({name for layer in layers for name in layer.available_adapters})
    by_name = {
        name: [layer for layer in layers if name in layer.available_adapters] for name in names
    }
    base, tuner, methods = _kinds(_inside(model))
    trainable, total = count_parameters(model)
    return TunerModelStatus(
        base_model_type=base,
        adapter_model_type=tuner,
        peft_types=methods,
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common([layer.enabled for layer in layers]),
        active_adapters=_active(layers, adapted),
        merged_adapters=_merged(adapted),
        requires_grad={
            name: _common([layer.requires_grad[name] for layer in with_adapter])
            for name, with_adapter in by_name.items()
        },
        available_adapters=names,
        devices={
            name: sorted({device for layer in with_adapter for device in layer.devices[name]})
            for name, with_adapter in by_name.items()
        },
        quantization_backend=_common([layer.quantization_backend for layer in adapted] or [None]),
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trainable and of all parameters of a model."""
    trainable = total = 0
    full, is_cut = full_sizes(model), False
    for parameter in model.parameters():
        if is_lazy(parameter):
            continue  # its size is not known yet
        # ZeRO-3 empties parameters, and FSDP1 leaves each process a slice.
        own = parameter.numel() or getattr(parameter, "ds_numel", 0)
        count = full.get(id(parameter), own)
        is_cut |= is_flattened(parameter) and id(parameter) not in full
        if type(parameter).__name__ == "Params4bit":
            # Two weights a byte.
            count *= 2 * getattr(parameter, "quant_storage", torch.uint8).itemsize
        total += count
        trainable += count if parameter.requires_grad else 0
    if is_cut:
        warn(
            "The numbers of parameters are those of this process's slices: a "
            "FullyShardedDataParallel module around this model holds the others. Pass that module "
            "to `get_model_status` for all of them."
        )
    return trainable, total


def _inside(model: nn.Module) -> nn.Module:
    """Return the model inside modules that compile, replicate or shard it."""
    if not isinstance(model, nn.Module):
        raise PeftTypeError(f"The state of adapters is that of a model, got {type(model)}.")
    inner: nn.Module | None = model
    while inner is not None:
        model = unwrap_model(inner)
        parts = model._modules
        inner = parts.get("_orig_mod") or parts.get("_fsdp_wrapped_module")
    return model


def _layer_status(path: str, layer: BaseTunerLayer | AuxiliaryTrainingWrapper) -> TunerLayerStatus:
    """Return the state of a layer, or of a module that is trained beside the adapters."""
    by_name: dict[str, list[Tensor]]
    kind, merged, backend = type(layer).__name__, list[str](), None
    if isinstance(layer, BaseTunerLayer):
        kind, merged = f"{_method(layer)}.{kind}", list(layer.merged_adapters)
        backend = _backend(layer.holder)
        by_name = {name: list(layer.adapter_tensors(name)) for name in sorted(layer.scaling)}
    else:
        by_name = {name: list(layer.parameters_of(name)) for name in sorted(layer.adapters)}
    # An output head has no tensors where it uses the rows of the embedding that it is tied to.
    by_name = {name: tensors for name, tensors in by_name.items() if tensors}
    return TunerLayerStatus(
        name=path,
        module_type=kind,
        enabled=not layer.disable_adapters,
        active_adapters=list(layer.active_adapters),
        merged_adapters=merged,
        requires_grad={
            name: _common([tensor.requires_grad for tensor in tensors])
            for name, tensors in by_name.items()
        },
        available_adapters=list(by_name),
        devices={
            name: sorted({tensor.device.type for tensor in tensors})
            for name, tensors in by_name.items()
        },
        quantization_backend=backend,
    )


def _method(layer: BaseTunerLayer) -> str:
    """Return the name of a layer's method, in lower case."""
    for peft_type, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        if isinstance(layer, tuner.tuner_layer_cls):
            return PeftType(peft_type).value.lower()
    return type(layer).__module__.rpartition(".")[2]


def _backend(base: nn.Module) -> str | None:
    """Return the storage format of a layer's weight; the layer's class if the format is unknown."""
    if known := storage_format(base):
        return known.name
    return type(base).__name__ if is_quantized(base) else None


def _kinds(model: nn.Module) -> tuple[str, str, dict[str, str]]:
    """Return `base_model_type`, `adapter_model_type` and `peft_types` of a model's status."""
    tuner = tuner_of(model)
    if tuner is not None:
        methods = {
            name: PeftType(config.peft_type).value for name, config in tuner.peft_config.items()
        }
        return type(tuner.model).__name__, type(tuner).__name__, methods
    is_known = hasattr(model, "config") and not is_tuner(model)
    return type(model).__name__ if is_known else "other", "None", {}


def _common(values: Sequence[T]) -> T | Irregular:
    """Return the value that all have, "irregular" if there are several."""
    return values[0] if all(value == values[0] for value in values) else "irregular"


def _active(
    layers: list[TunerLayerStatus], adapted: list[TunerLayerStatus]
) -> list[str] | Irregular:
    """Return the active adapters if all `adapted` layers agree; other modules may lack some."""
    active = _common([layer.active_adapters for layer in adapted or layers])
    if active == "irregular":
        return active
    for layer in layers:
        active_here = [name for name in active if name in layer.available_adapters]
        is_follower = not layer.available_adapters  # the parameters are another module's
        is_companion = "." not in layer.module_type and not is_follower
        if is_companion and layer.active_adapters != active_here:
            return "irregular"
    return active


def _merged(adapted: list[TunerLayerStatus]) -> list[str] | Irregular:
    """Return the merged adapters if all layers that have them agree."""
    merged = list(dict.fromkeys(name for layer in adapted for name in layer.merged_adapters))
    for layer in adapted:
        merged_elsewhere = set(merged).difference(layer.merged_adapters)
        if merged_elsewhere.intersection(layer.available_adapters):
            return "irregular"
    return merged
