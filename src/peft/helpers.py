# SPDX-License-Identifier: Apache-2.0
"""Small helps in using adapters: signatures of the base model, scales and precision for a while, a
look at a folder.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from .base.containers import walk
from .base.errors import PeftTypeError, PeftValueError
from .base.placeholders import placeholder
from .config import PeftConfig
from .core.base_peft_model import BasePeftModel
from .core.layer import BaseTunerLayer

__all__ = [
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


# Names of the interface that are not provided here; a class stands for each.
DoraCaching: Any
KappaTuneSelector: Any
MontecloraTrainerMixin: Any
find_kappa_target_modules: Any

if not TYPE_CHECKING:  # to which any name would be right

    def __getattr__(name: str) -> Any:
        return placeholder(name, __name__)


def update_forward_signature(model: Any) -> None:
    """Give a `PeftModel`'s `forward` the signature and docstring of its base model's, which name
    what the adapter's method takes too (`task_ids`).

    Args:
        model: The model, changed in place.

    Raises:
        PeftTypeError: It is no `PeftModel`.

    Example:
        >>> import inspect, torch
        >>> from peft import PolyConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), PolyConfig(target_modules=["0"]))
        >>> update_forward_signature(model)
        >>> list(inspect.signature(model.forward).parameters)
        ['input', 'task_ids', 'routing_mask']
    """
    _update(model, "forward")


def update_generate_signature(model: Any) -> None:
    """Give a `PeftModel`'s `generate` the signature and docstring of its base model's, which name
    what the adapter's method takes too (`task_ids`).

    Args:
        model: The model, changed in place; one whose base has no `generate` stays as it is.

    Raises:
        PeftTypeError: It is no `PeftModel`.
    """
    _update(model, "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """`update_forward_signature`, `update_generate_signature`, or both.

    Args:
        model: A `PeftModel`, changed in place.
        method: "forward", "generate" or "all".

    Raises:
        PeftTypeError: `model` is no `PeftModel`.
        PeftValueError: Another `method`.
    """
    if method not in ("forward", "generate", "all"):
        raise PeftValueError(
            f"`method`={method!r} is not supported; choose one of 'forward', 'generate' and 'all'."
        )
    for name in ("forward", "generate") if method == "all" else (method,):
        _update(model, name)


def check_if_peft_model(model_name_or_path: str | os.PathLike) -> bool:
    """Whether a local folder or a repository on the Hub holds an adapter that this package can
    read.

    Args:
        model_name_or_path: The folder, or the repository's id.
    """
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # whatever is wrong with it, it is no adapter to be used
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """A context in which all adapters count `multiplier` times as much; their scales are afterwards
    what they were.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        multiplier: Zero is to the output as if there were no adapters.

    Raises:
        PeftTypeError: `multiplier` is no number.
        PeftValueError: The model has no adapters, or they are merged; nothing is changed.

    Example:
        >>> import torch
        >>> from peft import LoKrConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoKrConfig(target_modules=["0"]))
        >>> with rescale_adapter_scale(model, 0.5):
        ...     model.base_model.model[0].scaling
        {'default': 0.5}
    """
    if not isinstance(multiplier, (int, float)):
        raise PeftTypeError(f"Argument multiplier should be of type float, got {type(multiplier)}.")
    layers = [module for _, module in walk(model) if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise PeftValueError(
            "The model has no adapters whose scale could be changed: scaling is only supported for "
            "models with `LoraLayer`s, or "
            "layers of another method of this package."
        )
    if any(layer.merged for layer in layers):
        raise PeftValueError(
            "Adapters are merged, so their scale is in the weights; call `unmerge_adapter` first."
        )
    before = [
        (layer, name, float(scale)) for layer in layers for name, scale in layer.scaling.items()
    ]
    for layer in layers:
        layer.scaling = dict(layer.scaling)  # callers may hold the one that was, to compare
    try:
        for layer, name, scale in before:
            layer.hold_scale(name, scale * multiplier)
        yield
    finally:
        for layer, name, scale in before:
            if name in layer.scaling:
                layer.hold_scale(name, scale)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """A context in which adapters do not cast their input to the precision of their parameters
    where that is narrower.

    It is for who keeps parameters in a narrow format and casts them when they are used.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        active: False makes it a context in which nothing is changed.
    """
    layers = (
        [module for _, module in walk(model) if isinstance(module, BaseTunerLayer)]
        if active
        else []
    )
    before = [layer.cast_input_dtype_enabled for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


def _update(model: Any, name: str) -> None:
    """Show the base model's signature on a method of a `PeftModel`."""
    if not isinstance(model, BasePeftModel):
        raise PeftTypeError(f"A signature is updated on a PeftModel, got {type(model)}.")
    shown = getattr(model.get_base_model(), name, None)
    if shown is None:
        return

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self), name)(self, *args, **kwargs)

    signature = inspect.signature(shown)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # type: ignore[attr-defined]
    method.__name__, method.__doc__ = (
        name,
        getattr(type(model.get_base_model()), name, shown).__doc__,
    )
    setattr(model, name, MethodType(method, model))
