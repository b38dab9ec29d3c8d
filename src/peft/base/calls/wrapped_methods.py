# SPDX-License-Identifier: Apache-2.0
"""Wrap a model's methods, so that their signatures also name the arguments of its adapters.

Trainers drop data columns, and `generate` refuses keyword arguments, that
`inspect.signature(model.forward)` does not name; some libraries call `model.forward` itself, past
all hooks. A `WrappedMethod` therefore replaces a `forward` or `generate`: on one model, not on its
class, and it is copied and pickled with the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from types import CodeType, MethodType
from typing import NamedTuple, TypeAlias, cast

from torch import nn

from ..containers import walk
from .arguments import bind_arguments, positional_names

Function: TypeAlias = Callable[..., object]


class MethodCall(NamedTuple):
    """A call of a wrapped method, with the names of arguments that can be passed by position."""

    function: Function
    module: nn.Module
    args: tuple[object, ...]
    kwargs: dict[str, object]
    names: tuple[str, ...]

    def arguments(self) -> dict[str, object]:
        """Return the arguments by name."""
        return bind_arguments(self.names, self.args, self.kwargs)

    def run(self, excluded: Collection[str] = ()) -> object:
        """Call the method, without `excluded` keyword arguments that it does not name itself."""
        dropped = set(excluded).difference(self.names)
        kwargs = {name: value for name, value in self.kwargs.items() if name not in dropped}
        return self.function(self.module, *self.args, **kwargs)


Handler: TypeAlias = Callable[[MethodCall], object]


class WrappedMethod:
    """A method with further keyword arguments in its signature.

    Args:
        function: The method, as a function of the module and its arguments.
        names: The further arguments.
        handler: Runs a call, without the further arguments.
        module: The module; None for the function itself.
        replaced: The attribute that this replaces, if the module had one beside its class's.
    """

    def __init__(
        self,
        function: Function,
        names: tuple[str, ...],
        handler: Handler,
        module: nn.Module | None = None,
        replaced: object = None,
    ) -> None:
        self.function = function
        self.names = names
        self.handler = handler
        self.module = module
        self.replaced = replaced
        self.positional = positional_names(function)[1:]  # without the module

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Pass a call to the handler."""
        module = self.module
        if module is None:
            module, args = cast(nn.Module, args[0]), args[1:]
        return self.handler(MethodCall(self.function, module, args, kwargs, self.positional))

    @property
    def __func__(self) -> WrappedMethod:
        """The function of the method, for code that wraps methods again."""
        if self.module is None:
            raise AttributeError("__func__")
        return WrappedMethod(self.function, self.names, self.handler)

    @property
    def __code__(self) -> CodeType:
        """The code of the method; `torch.export` reads where a forward is defined."""
        return self.function.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.function)
        present = list(signature.parameters.values())[0 if self.module is None else 1 :]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in self.names
            if name not in signature.parameters
        ]
        rest = [p for p in present if p.kind is inspect.Parameter.VAR_KEYWORD]
        return signature.replace(parameters=[*present[: len(present) - len(rest)], *added, *rest])


class _Unbound:
    """A bound method as a function of its module."""

    def __init__(self, bound: Function) -> None:
        self.bound = bound

    def __call__(self, module: nn.Module, *args: object, **kwargs: object) -> object:
        return self.bound(*args, **kwargs)

    @property
    def __code__(self) -> CodeType:
        return self.bound.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.bound)
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        return signature.replace(parameters=[first, *signature.parameters.values()])


def wrap_method(module: nn.Module, method: str, names: tuple[str, ...], handler: Handler) -> None:
    """Pass the calls of a module's method to a handler, if the module has that method.

    The handler is a function at the top level, since copies of the module share it.
    """
    present = getattr(module, method, None)
    if callable(present):
        function = present.__func__ if isinstance(present, MethodType) else _Unbound(present)
        replaced = vars(module).get(method)
        setattr(module, method, WrappedMethod(function, names, handler, module, replaced))


def is_wrapped(module: nn.Module, method: str) -> bool:
    """Return whether a module's method is a wrapped one that nothing has replaced since."""
    return isinstance(vars(module).get(method), WrappedMethod)


def unwrap_methods(model: nn.Module, *handlers: Function) -> None:
    """Restore the methods that some handlers run, unless other code has wrapped them since."""
    for _, module in walk(model):
        for method, wrapped in list(vars(module).items()):
            if isinstance(wrapped, WrappedMethod) and wrapped.handler in handlers:
                delattr(module, method)
                if wrapped.replaced is not None:
                    setattr(module, method, wrapped.replaced)
