# SPDX-License-Identifier: Apache-2.0
"""Functions for libraries that inject adapters into their own models, without a `PeftModel`.

The adapters may be of several methods. Each function takes all of an adapter: its layers, and the
parameters that they share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base.tensors import ordinary_tensors
from .base.validation import check_adapter
from .checkpoint.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from .config import TargetedConfig
from .core.adapted_model import AdaptedModel
from .core.layer import BaseTunerLayer
from .core.model_methods import tuner_of
from .mapping import inject_adapter_in_model
from .tuners.mixed import MixedModel

__all__ = [
    "cast_adapter_dtype", "delete_adapter", "get_peft_model_state_dict", "inject_adapter_in_model",
    "set_adapter", "set_peft_model_state_dict", "set_requires_grad",
]  # fmt: skip


def set_adapter(
    model: nn.Module,
    adapter_name: str | list[str],
    inference_mode: bool = False,
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> None:
    """Activate one adapter, or several whose deltas add up, and freeze the others.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        adapter_name: Name or list of names.
        inference_mode: True freezes the active adapters too.
        layer_cls: Class of the layers to switch.

    Raises:
        PeftValueError: There is no such adapter, no name is given, or the adapters can't be active
            together; nothing is changed.

    Example:
        >>> from peft import LoKrConfig
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("style", "subject"):
        ...     model = inject_adapter_in_model(LoKrConfig(target_modules=["0"]), model, name)
        >>> set_adapter(model, ["style", "subject"])
        >>> model[0].active_adapters
        ['style', 'subject']
    """
    _adapted(model, layer_cls).set_adapter(adapter_name, inference_mode)


def set_requires_grad(
    model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True
) -> None:
    """Unfreeze or freeze adapters, active or not.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        adapter_names: Name or names.
        requires_grad: False freezes them.

    Raises:
        PeftValueError: There is no such adapter; nothing is changed.
    """
    _adapted(model).set_requires_grad(adapter_names, requires_grad)


def delete_adapter(
    model: nn.Module,
    adapter_name: str,
    prefix: str,
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> list[str]:
    """Delete an adapter and its config. If no active adapter remains, the first by name becomes
    active.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        adapter_name: The adapter.
        prefix: Accepted for compatibility, without effect.
        layer_cls: Class of the layers to delete it from.

    Returns:
        Names of the adapters that are active afterwards.

    Raises:
        PeftValueError: There is no such adapter, or it is merged; nothing is changed.
    """
    adapted = _adapted(model, layer_cls)
    adapted.delete_adapter(adapter_name)
    return adapted.active_adapters


@ordinary_tensors()
def cast_adapter_dtype(
    model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True
) -> None:
    """Cast an adapter's floating-point parameters of 16 bits or fewer to float32, which makes
    training stable.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        adapter_name: The adapter.
        autocast_adapter_dtype: False casts nothing.

    Raises:
        PeftValueError: There is no such adapter.
    """
    adapted = _adapted(model)
    check_adapter(adapter_name, adapted.peft_config)
    if not autocast_adapter_dtype:
        return
    parameters: list[Tensor] = []
    for layer in adapted.tuner_layers():
        if adapter_name in layer.scaling:
            parameters += layer.adapter_parameters(adapter_name)
    for parameter in parameters:
        if parameter.is_floating_point() and parameter.element_size() < 4:
            parameter.data = parameter.data.to(torch.float32)


def _adapted(
    model: nn.Module, layer_cls: type[BaseTunerLayer] = BaseTunerLayer
) -> AdaptedModel[TargetedConfig]:
    """Return a model's tuner; for a model that adapters were injected into, one for all methods."""
    tuner = tuner_of(model) or model
    return tuner if isinstance(tuner, AdaptedModel) else MixedModel.of(tuner, layer_cls)
