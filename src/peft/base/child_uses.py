# SPDX-License-Identifier: Apache-2.0
"""The children whose weights a module's code computes with, read from its compiled functions."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import NamedTuple

from torch import nn

# Attributes of a weight that say nothing of its values.
_PROPERTIES = frozenset(
    ("device", "dim", "dtype", "is_cuda", "is_meta", "is_quantized", "ndim", "numel", "shape")
).union(("element_size", "itemsize", "requires_grad", "size", "stride"))


class ChildUses(NamedTuple):
    """The children of a module by what its code does with them.

    Args:
        read: Children whose `weight` it computes with.
        called: Children that it calls or hands on.
    """

    read: frozenset[str]
    called: frozenset[str]


@cache
def child_uses(kind: type) -> ChildUses:
    """Return what a class's `forward`, and the methods that it uses, do with the module's children.

    Children that the code reaches in other ways than by `self.name` are not seen.
    """
    codes: dict[str, list[CodeType]] = {}
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, member in vars(owner).items():
            function = inspect.unwrap(member) if callable(member) else None
            code = getattr(function, "__code__", None)
            if code is not None and code.co_argcount:
                codes.setdefault(name, []).append(code)
    read, called, todo = set[str](), set[str](), ["forward"]
    while todo:
        for code in codes.pop(todo.pop(), ()):
            for name, path in _attribute_paths(code, code.co_varnames[0]):
                if name in codes:
                    todo.append(name)
                elif not path:
                    called.add(name)
                elif path[0] == "weight" and not _PROPERTIES.intersection(path[1:2]):
                    read.add(name)
    return ChildUses(frozenset(read), frozenset(called))


def _attribute_paths(code: CodeType, receiver: str) -> Iterator[tuple[str, list[str]]]:
    """Yield `("a", ["b", "c"])` for each `self.a.b.c` in a function and those in it; `receiver` is
    its name for `self`.
    """
    path: tuple[str, list[str]] | None = None
    is_self = False
    for step in dis.get_instructions(code):
        if isinstance(step.argval, CodeType):
            yield from _attribute_paths(step.argval, receiver)
        if step.opname in ("CACHE", "EXTENDED_ARG"):
            continue
        is_attribute = step.opname in ("LOAD_ATTR", "LOAD_METHOD")
        if is_attribute and is_self:
            path = step.argval, []
        elif is_attribute and path is not None:
            path[1].append(step.argval)
        elif path is not None:
            yield path
            path = None
        # A pair of loads is one instruction from Python 3.13 on.
        loaded = step.argval[-1:] if isinstance(step.argval, tuple) else (step.argval,)
        is_self = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and loaded == (receiver,)
