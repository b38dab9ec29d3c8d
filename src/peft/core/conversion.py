# SPDX-License-Identifier: Apache-2.0
"""Find the adapter, the layers and the checkpoint root of a model for a conversion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor, nn

from ..base.constants import MODEL_ROOT
from ..base.containers import walk
from ..base.errors import PeftError, PeftValueError, UnsupportedModuleError
from ..base.registry import PeftType
from ..base.tables import alike, table
from ..base.validation import check_adapter
from ..checkpoint.files import write_adapter
from ..config import PeftConfig
from .adapter_choice import active_in, adapter_meant
from .adapters import check_readable
from .combining import outer_path
from .layer import BaseTunerLayer
from .model_methods import tuner_of
from .skeleton import base_class_of

if TYPE_CHECKING:
    from typing_extensions import Self

C = TypeVar("C", bound=PeftConfig)


class Conversion(tuple[C, dict[str, Tensor]], Generic[C]):
    """An adapter made of others: the pair `(config, state_dict)`; subclasses add its errors.

    Attributes:
        config: Its config.
        state_dict: Its tensors by checkpoint key.
    """

    def __new__(cls, config: C, state_dict: dict[str, Tensor]) -> Self:  # noqa: D102
        return super().__new__(cls, (config, state_dict))

    def __getnewargs__(self) -> tuple[C, dict[str, Tensor]]:
        return self.config, self.state_dict

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._size()}; print it for a table>"

    def __str__(self) -> str:
        """Return a table of the errors."""
        errors: dict[str, float] = getattr(self, "errors", {})
        cells = {name: (f"{error:.3g}",) for name, error in errors.items()}
        rows = [("layer or adapter", "error"), *alike(cells)]
        return "\n".join([self._size(), *([table(rows, right=[1])] if cells else [])])

    def _size(self) -> str:
        """Return method, rank, numbers and error in words."""
        method = PeftType(self.config.peft_type).value
        number = sum(tensor.numel() for tensor in self.state_dict.values())
        total: float | None = getattr(self, "error", None)
        error = "" if total is None else f", error {total:.3g}"
        rank = getattr(self.config, "r", None)
        return f"{method} r={rank}, {len(self.state_dict)} tensors, {number:,} parameters{error}"

    @property
    def config(self) -> C:  # noqa: D102
        return self[0]

    @property
    def state_dict(self) -> dict[str, Tensor]:  # noqa: D102
        return self[1]


def config_of(model: nn.Module, adapter_name: str) -> Any:
    """Return the config of an adapter of a `PeftModel` or of a model with injected adapters."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        raise UnsupportedModuleError(
            "Could not detect any layer that supports LoRA conversion: the model has no adapters."
        )
    check_adapter(adapter_name, configs)
    return configs[adapter_name]


def name_of(model: nn.Module, adapter_name: str | None) -> str:
    """Return the given name, else "default", the only active or the only one; else raise."""
    configs = getattr(model, "peft_config", None)
    if adapter_name is not None or not configs or not isinstance(configs, dict):
        return "default" if adapter_name is None else adapter_name  # which `config_of` looks for
    active = active_in(layer for _, layer in walk(model) if isinstance(layer, BaseTunerLayer))
    return adapter_meant(None, configs, active)


def root_of(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the base model, and the start of its checkpoint keys."""
    tuner = tuner_of(model)
    return (model, "") if tuner is None else (tuner.model, MODEL_ROOT)


def layers_with(root: nn.Module, adapter_name: str) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Yield paths and layers that have an adapter; raise if it has no values yet."""
    for path, module in walk(root):
        if isinstance(module, BaseTunerLayer) and adapter_name in module.scaling:
            if any(parameter.is_meta for parameter in module.adapter_parameters(adapter_name)):
                raise PeftValueError(
                    f"`{path}`: the adapter is on the meta device and has no values yet; load them "
                    "first."
                )
            yield outer_path(path), module


@contextmanager
def naming_layer(path: str) -> Iterator[None]:
    """Context whose errors begin with a layer's path."""
    try:
        yield
    except PeftError as error:
        raise type(error)(f"`{path}`: {error}") from None


def write_conversion(folder: Path, model: nn.Module, converted: Conversion[C]) -> None:
    """Write a conversion as `save_pretrained` writes an adapter."""
    config, state = converted
    root, prefix = root_of(model)
    state = {key if prefix else MODEL_ROOT + key: tensor for key, tensor in state.items()}
    text = replace(config, inference_mode=True).to_json(base_class_of(root, config))
    write_adapter(folder, state, text)


def check_convertible(layers: dict[str, BaseTunerLayer], adapter_name: str) -> None:
    """Raise `UnsupportedModuleError` if a layer has no delta, or there are no layers."""
    unfit = [own for own in layers.values() if not own.supports_lora_conversion(adapter_name)]
    if unfit or not layers:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in unfit}))
        raise UnsupportedModuleError(
            f"Some module types on this model do not support LoRA conversion: {kinds}."
            if unfit
            else "Could not detect any layer that supports LoRA conversion and has adapter "
            f"{adapter_name}."
        )
    for path, layer in layers.items():
        with naming_layer(path):
            check_readable(layer, adapter_name)
        base = layer.get_base_layer()
        weight = base._parameters.get("weight")
        is_absent = weight is not None and weight.is_meta and not hasattr(base, "_hf_hook")
        if is_absent and layer.decomposition(adapter_name) is not None:
            raise PeftValueError(
                f"`{path}`: with weight decomposition (DoRA) the delta depends on the base model's "
                "weight, which has no values here; load the adapter into the base model."
            )
