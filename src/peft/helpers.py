# SPDX-License-Identifier: Apache-2.0
"""Helpers for models with adapters: signatures, temporary scales, a check of folders."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING

from torch import nn

from .base.calls.running import changing
from .base.containers import modules_of
from .base.errors import PeftTypeError, PeftValueError
from .base.placeholders import placeholders
from .base.temporary import Change, TemporaryValues
from .config import PeftConfig
from .core.layer import BaseTunerLayer
from .peft_model import PeftModel

__all__ = [
    "DoraCaching", "check_if_peft_model", "disable_input_dtype_casting", "rescale_adapter_scale",
    "update_forward_signature", "update_generate_signature", "update_signature",
]  # fmt: skip


# Names of the interface that this package does not implement; each is a placeholder.
KappaTuneSelector: type
MontecloraTrainerMixin: type
find_kappa_target_modules: type

# What contexts change: the scales by layer, adapter and configured scale, the casts of inputs by
# layer.
_SCALES: TemporaryValues[float] = TemporaryValues()
_CASTING: TemporaryValues[bool] = TemporaryValues()

if not TYPE_CHECKING:  # a type checker would take any name for one that exists
    __getattr__ = placeholders(__name__)


class DoraCaching:
    """A context for evaluation with DoRA adapters, accepted for compatibility. All steps of one
    `generate` share the norms of DoRA without it; a single call of the model computes them once.

    Args:
        enabled: Accepted, without effect.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __call__(self, enabled: bool = True) -> None:
        """Do nothing; there it switches caching on or off for good."""
        self.enabled = enabled

    def __enter__(self) -> None:
        """Begin the context."""

    def __exit__(self, *error: object) -> None:
        """End the context."""


def update_forward_signature(model: nn.Module) -> None:
    """Show the signature and docstring of the base model's `forward` on a `PeftModel`'s. They list
    the adapter's arguments (`task_ids`) too.

    Args:
        model: A `PeftModel`, changed in place.

    Raises:
        PeftTypeError: `model` is not a `PeftModel`.

    Example:
        >>> from peft import PolyConfig, get_peft_model
        >>> base = nn.Sequential(nn.Linear(8, 8))
        >>> model = get_peft_model(base, PolyConfig(target_modules=["0"]))
        >>> update_forward_signature(model)
        >>> list(inspect.signature(model.forward).parameters)
        ['input', 'task_ids', 'routing_mask']
    """
    _update(model, "forward")


def update_generate_signature(model: nn.Module) -> None:
    """Show the signature and docstring of the base model's `generate` on a `PeftModel`'s. They list
    the adapter's arguments (`task_ids`) too.

    Args:
        model: A `PeftModel`, changed in place; nothing changes if its base has no `generate`.

    Raises:
        PeftTypeError: `model` is not a `PeftModel`.
    """
    _update(model, "generate")


def update_signature(model: nn.Module, method: str = "all") -> None:
    """Call `update_forward_signature`, `update_generate_signature`, or both.

    Args:
        model: A `PeftModel`, changed in place.
        method: "forward", "generate" or "all".

    Raises:
        PeftTypeError: `model` is not a `PeftModel`.
        PeftValueError: `method` is none of these.
    """
    if method not in ("forward", "generate", "all"):
        raise PeftValueError(
            f"`method`={method!r} is not supported; choose one of 'forward', 'generate' and 'all'."
        )
    for name in ("forward", "generate") if method == "all" else (method,):
        _update(model, name)


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Return True if this package can read the adapter config in a local folder or a repository on
    the Hub.

    Args:
        model_name_or_path: The folder, or the repository's id.
    """
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # after any error there is no adapter to use
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scale of all adapters inside a context; the old scales return at its end. An
    adapter that is replaced meanwhile by one with another scale keeps its own.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        multiplier: Factor on the scales; with 0 the adapters add nothing.

    Raises:
        PeftTypeError: `multiplier` is not a number.
        PeftValueError: The model has no adapters, or they are merged; nothing is changed.

    Example:
        >>> from peft import LoKrConfig, get_peft_model
        >>> base = nn.Sequential(nn.Linear(8, 8))
        >>> model = get_peft_model(base, LoKrConfig(target_modules=["0"]))
        >>> with rescale_adapter_scale(model, 0.5):
        ...     model.base_model.model[0].scaling
        {'default': 0.5}
    """
    if not isinstance(multiplier, (int, float)):
        raise PeftTypeError(f"Argument multiplier should be of type float, got {type(multiplier)}.")
    layers = [layer for _, layer in modules_of(model, BaseTunerLayer)]
    if not layers:
        raise PeftValueError(
            "The model has no adapters whose scale could be changed: scaling is only supported for "
            "models with `LoraLayer`s, or layers of another method of this package."
        )
    if any(layer.merged for layer in layers):
        raise PeftValueError(
            "Adapters are merged, so their scale is in the weights; call `unmerge_adapter` first."
        )
    changes: list[tuple[BaseTunerLayer, str, float, Change[float]]] = []
    try:
        with changing(model, None), _SCALES.lock:
            for layer in layers:
                layer.scaling = dict(layer.scaling)  # a caller may keep the old one to compare with
                for name, scale in layer.scaling.items():
                    base = layer.base_scaling(name)
                    key = (layer, name, base)
                    change = _SCALES.begin(key, float(scale), lambda s: s * multiplier)
                    changes.append((*key, change))
                    layer.hold_scale(name, change.change(change.before))
        yield
    finally:
        # The scales must return.
        with changing(model, None if changes else (), patience=math.inf), _SCALES.lock:
            for layer, name, base, change in changes:
                scale = _SCALES.end(change)
                if name in layer.scaling and layer.base_scaling(name) == base:
                    layer.hold_scale(name, scale)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Keep adapters from casting their input to a narrower dtype of their parameters, inside a
    context. It is for parameters that are stored in a narrow dtype and cast when they are used.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        active: False changes nothing.
    """
    layers = [layer for _, layer in modules_of(model, BaseTunerLayer)] if active else []
    changes: list[tuple[BaseTunerLayer, Change[bool]]] = []
    try:
        with _CASTING.lock:
            for layer in layers:
                change = _CASTING.begin(layer, layer.cast_input_dtype_enabled, lambda _: False)
                changes.append((layer, change))
                layer.cast_input_dtype_enabled = False
        yield
    finally:
        with _CASTING.lock:
            for layer, change in changes:
                layer.cast_input_dtype_enabled = _CASTING.end(change)


def _update(model: nn.Module, name: str) -> None:
    """Show the base model's signature and docstring on a method of a `PeftModel`."""
    if not isinstance(model, PeftModel):
        raise PeftTypeError(f"A signature is updated on a PeftModel, got {type(model)}.")
    base = model.get_base_model()
    shown = getattr(base, name, None)
    if shown is None:
        return

    def method(self: PeftModel, *args: object, **kwargs: object) -> object:
        return getattr(type(self), name)(self, *args, **kwargs)

    signature = inspect.signature(shown)
    receiver = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [receiver, *signature.parameters.values()]
    vars(method)["__signature__"] = signature.replace(parameters=parameters)
    method.__name__, method.__doc__ = name, getattr(type(base), name, shown).__doc__
    setattr(model, name, MethodType(method, model))
