# SPDX-License-Identifier: Apache-2.0
"""Walks over a model that skip other adapters, so that work on one adapter costs the same with a
thousand.

The tensors and modules of adapters are in containers, by adapter name. Containers are subclasses of
`AdapterContainer`; a walk enters only the entries of the adapters that it is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
# Tensors by name, and what modules add by `get_extra_state`.
StateDict: TypeAlias = dict[str, Any]


class AdapterContainer:
    """Base class of modules that are containers with an entry for each adapter."""

    def make_room(self, adapter_name: str, entry: Any) -> None:
        """Take the memory that putting in an entry needs beside the entry itself."""


class WeightFollower:
    """Base class of modules around a layer whose weight another, adapted layer owns."""


class AdapterModuleDict(AdapterContainer, nn.ModuleDict, Generic[M]):
    """Modules by adapter name."""

    __module__ = "peft.tuners.tuners_utils"

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> M: ...


def walk(
    root: nn.Module,
    adapters: Collection[str] | None = (),
    repeated: bool = False,
    closed: tuple[type, ...] = (),
) -> Iterator[tuple[str, nn.Module]]:
    """Yield paths and modules in the order of `named_modules`, without the entries of other
    adapters.

    Args:
        root: The module to start from.
        adapters: Adapters whose entries are entered, by default none; None for all.
        repeated: Yield a module with several paths at each of them, not only at the first.
        closed: Classes of modules that are not entered.

    Example:
        >>> adapters = AdapterModuleDict({"a": nn.Identity(), "b": nn.Identity()})
        >>> model = nn.Sequential(nn.Linear(2, 2), adapters)
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


def modules_of(root: nn.Module, kind: type[M]) -> Iterator[tuple[str, M]]:
    """Yield the paths and the modules of a class, adapters' entries left out."""
    return ((path, module) for path, module in walk(root) if isinstance(module, kind))


def named_tensors(
    modules: Iterable[tuple[str, nn.Module]],
    adapters: Collection[str] | None = (),
    buffers: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters (and buffers) of a walk's modules, each once, by its first name."""
    seen: set[int] = set()
    for path, module in modules:
        for tensors in (module._parameters, module._buffers) if buffers else (module._parameters,):
            for name, tensor in _chosen(tensors, module, adapters):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{path}.{name}" if path else name, tensor


def state_of(
    root: nn.Module,
    adapters: Collection[str] | None,
    prefix: str = "",
    into: StateDict | None = None,
) -> StateDict:
    """Return `root.state_dict(keep_vars=True)`, hooks run, without entries of other adapters."""
    state: StateDict = {} if into is None else into
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
    """Return those of a module's modules, parameters or buffers that a walk includes."""
    if adapters is None or not isinstance(module, AdapterContainer):
        return [(name, entry) for name, entry in entries.items() if entry is not None]
    return [(name, entry) for name in adapters if (entry := entries.get(name)) is not None]
