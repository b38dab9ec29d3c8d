# SPDX-License-Identifier: Apache-2.0
"""A model's own methods under signatures that also name what its adapters take out of a call.

Trainers drop those columns of a data set, and `generate` refuses those keyword arguments, that
`inspect.signature(model.forward)` does not name; and some libraries call `model.forward` itself,
past all hooks. An `Entry` takes the place of a model's `forward` or `generate`. It belongs to the
one model, not to its class, and goes with it through `copy.deepcopy` and pickle.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType, MethodType
from typing import Any

from torch import nn

from ..base.calls.arguments import positional_names

Function = Callable[..., Any]
# Carries a call out: (function, model, its positional and keyword arguments, names of the former) →
# what the function returns.
Conduct = Callable[[Function, Any, tuple[Any, ...], dict[str, Any], tuple[str, ...]], Any]


class Entry:
    """A method with further keyword arguments in its signature.

    Args:
        function: What is called in the end, with the model as its first argument.
        names: The further arguments.
        conduct: Carries a call out, and takes the further arguments out of it for that.
        model: The model, None for the function by itself.
        replaced: The attribute of the model whose place this takes, if the model and not only its
            class had one.
    """

    def __init__(
        self,
        function: Function,
        names: tuple[str, ...],
        conduct: Conduct,
        model: nn.Module | None = None,
        replaced: Any = None,
    ) -> None:
        self.function = function
        self.names = names
        self.conduct = conduct
        self.model = model
        self.replaced = replaced
        self.positional = positional_names(function)[1:]  # without the model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Carry a call out."""
        if self.model is None:
            return self.conduct(self.function, args[0], args[1:], kwargs, self.positional)
        return self.conduct(self.function, self.model, args, kwargs, self.positional)

    @property
    def __func__(self) -> Entry:
        """The function below the method, which is what wraps a model's methods asks for."""
        if self.model is None:
            raise AttributeError("__func__")
        return Entry(self.function, self.names, self.conduct)

    @property
    def __code__(self) -> CodeType:
        """The method's own code; `torch.export` asks a model's forward where it is written."""
        return self.function.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.function)
        given = list(signature.parameters.values())[0 if self.model is None else 1 :]
        named = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in self.names
        ]
        own = [parameter for parameter in named if parameter.name not in signature.parameters]
        rest = [parameter for parameter in given if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        return signature.replace(parameters=[*given[: len(given) - len(rest)], *own, *rest])


class _Unbound:
    """What is bound to its model already, as a function of the model."""

    def __init__(self, bound: Function) -> None:
        self.bound = bound

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.bound(*args, **kwargs)

    @property
    def __code__(self) -> CodeType:
        return self.bound.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.bound)
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        return signature.replace(parameters=[first, *signature.parameters.values()])


def put_entry(model: nn.Module, method: str, names: tuple[str, ...], conduct: Conduct) -> None:
    """Put an entry in the place of a model's method, if it has that."""
    present = getattr(model, method, None)
    if callable(present):
        function = present.__func__ if isinstance(present, MethodType) else _Unbound(present)
        setattr(model, method, Entry(function, names, conduct, model, vars(model).get(method)))


def remove_entries(model: nn.Module, *conducts: Conduct) -> None:
    """Give a model its methods back that are called in some ways, where nothing has wrapped an
    entry since.
    """
    for method, entry in list(vars(model).items()):
        if isinstance(entry, Entry) and entry.conduct in conducts:
            delattr(model, method)
            if entry.replaced is not None:
                setattr(model, method, entry.replaced)
