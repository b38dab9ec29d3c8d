# SPDX-License-Identifier: Apache-2.0
"""The link between a model and its tuner: the tuner's methods on the model, with signature and
documentation.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

from torch import nn

if TYPE_CHECKING:
    from .adapted_model import AdaptedModel

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound=type)


def forwarded(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Return a method that calls the tuner's `method`, with its name, signature and docstring."""
    name = method.__name__

    @wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        return getattr(self.base_model, name)(*args, **kwargs)

    return call


def methods_of(tuner_cls: type[AdaptedModel]) -> Callable[[T], T]:
    """Register the decorated class as the methods that a model around a tuner of `tuner_cls` has.

    Example:
        >>> from peft.core.tuner import BaseTuner
        >>> class Doubling(BaseTuner):
        ...     def double(self, x: int) -> int:
        ...         return 2 * x
        >>> @methods_of(Doubling)
        ... class DoublingMethods:
        ...     double = forwarded(Doubling.double)
        >>> Doubling.model_methods.__name__
        'DoublingMethods'
    """

    def register(methods: T) -> T:
        tuner_cls.model_methods = methods
        return methods

    return register


class _Combined(type):
    """The metaclass of the classes that `around` makes, which pickle can't find by name."""


@cache
def around(model_cls: type, tuner_cls: type[AdaptedModel]) -> type:
    """Return the subclass of a model's class, of the same name, with a tuner's `model_methods`."""
    methods = tuner_cls.model_methods
    if methods is None or issubclass(model_cls, methods):
        return model_cls
    named = {name: getattr(model_cls, name) for name in ("__doc__", "__module__", "__qualname__")}
    return _Combined(
        model_cls.__name__, (methods, model_cls), {**named, "_made_of": (model_cls, tuner_cls)}
    )


def _pickled(cls: _Combined) -> str | tuple[Callable[..., _Combined], tuple[type, ...]]:
    """Return the way to make a class again: of its parts, or by its name for a further subclass."""
    if "_made_of" not in vars(cls):
        return cls.__qualname__
    model_cls, tuner_cls = vars(cls)["_made_of"]
    return model_cls._around, (tuner_cls,)


copyreg.pickle(_Combined, _pickled)


def is_tuner(module: nn.Module | None) -> bool:
    """Return whether a module is a `BaseTuner` or a `MixedModel`."""
    return hasattr(type(module), "model_methods")


def tuner_of(model: nn.Module) -> AdaptedModel | None:
    """Return the tuner of a `PeftModel`, None for any other model."""
    tuner = model._modules.get("base_model")
    return cast("AdaptedModel", tuner) if is_tuner(tuner) else None
