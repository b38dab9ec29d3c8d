# SPDX-License-Identifier: Apache-2.0
"""A model's own methods under signatures that also name what its adapters take out of a call.

Trainers drop those columns of a data set, and `generate` refuses those keyword arguments, that `inspect.signature(model.forward)`
does not name. An `Entry` takes the place of a model's `forward` or `generate` and names them. It belongs to the one model, not to
its class, and goes with it through `copy.deepcopy` and pickle.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

from torch import nn

Context = Callable[[tuple[Any, ...], dict[str, Any]], AbstractContextManager[Any]]


class Entry:
    """A method with further keyword arguments in its signature.

    Args:
        function: What is called; with a `module` as its first argument, as a method is.
        names: The further arguments.
        context: Entered for the whole of a call with its positional and keyword arguments; takes its own out of the latter. By
            default they go on to `function`.
        module: The model, None for the function by itself.
        replaced: The attribute of the model whose place this takes, if the model rather than its class had one.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        names: tuple[str, ...],
        context: Context | None = None,
        module: nn.Module | None = None,
        replaced: Any = None,
    ) -> None:
        self.function = function
        self.names = names
        self.context = context
        self.module = module
        self.replaced = replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = () if self.module is None else (self.module,)
        if self.context is None:
            return self.function(*own, *args, **kwargs)
        with self.context(args, kwargs):
            return self.function(*own, *args, **kwargs)

    @property
    def __func__(self) -> Entry:
        """The function below the method; what wraps a model's methods asks for it."""
        if self.module is None:
            raise AttributeError("__func__")
        return Entry(self.function, self.names, self.context)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.function)
        given = list(signature.parameters.values())[0 if self.module is None else 1 :]
        named = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in self.names]
        own = [parameter for parameter in named if parameter.name not in signature.parameters]
        rest = [parameter for parameter in given if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        return signature.replace(parameters=[*given[: len(given) - len(rest)], *own, *rest])


def name_arguments(model: nn.Module, method: str, names: tuple[str, ...], context: Context | None = None) -> None:
    """Put an entry in the place of a model's method, if it has that."""
    present = getattr(model, method, None)
    if isinstance(present, MethodType):
        entry = Entry(present.__func__, names, context, model, vars(model).get(method))
    elif callable(present):
        entry = Entry(present, names, context, replaced=present)
    else:
        return
    setattr(model, method, entry)


def restore_methods(model: nn.Module) -> None:
    """Undo `name_arguments`, where nothing has wrapped an entry since."""
    for method, entry in list(vars(model).items()):
        if isinstance(entry, Entry):
            delattr(model, method)
            if entry.replaced is not None:
                setattr(model, method, entry.replaced)
