# SPDX-License-Identifier: Apache-2.0
"""Going through a model without going through all of its adapters, so that what is done to one
costs the same beside a thousand.

What belongs to an adapter lies in containers by adapter name. They are recognised by their type,
and only the entries of the adapters asked for are gone into.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class AdapterContainer:
    """What marks a module as a container with an entry for each adapter."""


class AdapterModuleDict(AdapterContainer, nn.ModuleDict):
    """Modules by adapter name."""


def walk(
    root: nn.Module,
    adapters: Collection[str] | None = (),
    repeated: bool = False,
    closed: tuple[type, ...] = (),
) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their paths in the order of `named_modules`, without the entries that containers
    have for adapters.

    Args:
        root: Where to begin.
        adapters: The adapters whose entries are gone into, by default none; None for all.
        repeated: Give a module that sits in several places at each of them, not only at the first.
        closed: Classes of modules that are not gone into.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), AdapterModuleDict({"a": nn.Identity(), "b": nn.Identity()}))
        >>> [path for path, _ in walk(model)], [path for path, _ in walk(model, ["b"])]
        (['', '0', '1'], ['', '0', '1', '1.b'])
    """
    seen: set[nn.Module] = set()
    waiting = [("", root)]
    while waiting:
        path, module = waiting.pop()
        if not repeated:
            if module in seen:
                continue
            seen.add(module)
        yield path, module
        if module._modules and not isinstance(module, closed):
            inner = _chosen(module._modules, module, adapters)
            waiting += [
                (f"{path}.{name}" if path else name, child) for name, child in reversed(inner)
            ]


def named_tensors(
    modules: Iterable[tuple[str, nn.Module]],
    adapters: Collection[str] | None = (),
    buffers: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a walk's modules, each once, by its first name; in containers those of some
    adapters. With them buffers.
    """
    seen: set[int] = set()
    for path, module in modules:
        for tensors in (module._parameters, module._buffers) if buffers else (module._parameters,):
            for name, tensor in _chosen(tensors, module, adapters):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{path}.{name}" if path else name, tensor


def state_of(
    root: nn.Module, adapters: Collection[str] | None, prefix: str = "", into: Any = None
) -> dict[str, Any]:
    """`root.state_dict(keep_vars=True)`, its modules' own ways of making theirs included, without
    the entries of adapters other than those given; None for all.
    """
    state: Any = {} if into is None else into
    if type(root).state_dict is not nn.Module.state_dict:
        return root.state_dict(destination=state, prefix=prefix, keep_vars=True)
    for before in root._state_dict_pre_hooks.values():
        before(root, prefix, True)
    if adapters is not None and isinstance(root, AdapterContainer):
        container: Any = root
        entries = {prefix + name: container[name] for name in adapters if name in container}
        state.update({key: entry for key, entry in entries.items() if isinstance(entry, Tensor)})
    else:
        root._save_to_state_dict(state, prefix, True)
    for name, child in _chosen(root._modules, root, adapters):
        state = state_of(child, adapters, f"{prefix}{name}.", state)
    for after in root._state_dict_hooks.values():
        changed = after(root, state, prefix, {"version": root._version})
        state = state if changed is None else changed
    return state


def _chosen(
    entries: Mapping[str, T | None], module: nn.Module, adapters: Collection[str] | None
) -> list[tuple[str, T]]:
    """Of a module's modules, parameters or buffers those that are looked at, with their names."""
    if adapters is None or not isinstance(module, AdapterContainer):
        return [(name, entry) for name, entry in entries.items() if entry is not None]
    return [(name, entry) for name in adapters if (entry := entries.get(name)) is not None]
