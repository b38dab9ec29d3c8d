# SPDX-License-Identifier: Apache-2.0
"""Repeat layers of a model under an adapter (`layer_replication`): the copies share the base
weights, and each has an adapter of its own.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from ..base.containers import walk
from ..base.errors import PeftNotSupportedError, PeftValueError
from ..base.modules import get_submodules
from ..base.validation import is_int

LayerMap: TypeAlias = Sequence[Sequence[int]]
"""Ranges `[start, end)` of a model's layers, one after the other."""

Undo: TypeAlias = Callable[[], None]
"""A function that leaves a model as it was."""

# Names of the list of a model's layers.
_LISTS = ("layers", "layer", "h", "blocks")


def problems(name: str, value: object) -> Iterator[str]:
    """Require pairs of integers `[start, end]` with `0 ≤ start < end`, or None."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return
    if not isinstance(value, (list, tuple)) or not all(map(_is_range, value)):
        yield (
            f"`{name}`={value!r} must be a list of ranges `[start, end]` of layers, the end not "
            "included: [[0, 4], [2, 5]]."
        )


def _is_range(pair: object) -> bool:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(map(is_int, pair)):
        return False
    return 0 <= pair[0] < pair[1]


class ReplicatedLayers(nn.ModuleList):
    """A model's list of layers with some of them repeated.

    Args:
        layers: The model's own list.
        layer_map: The ranges of it.

    Attributes:
        layer_map: The ranges.
        original: The model's own list, not registered.
        settings: Values of the model's config that the number of layers changed.
    """

    def __init__(self, layers: nn.ModuleList, layer_map: LayerMap) -> None:
        order = [i for start, end in layer_map for i in range(start, end)]
        super().__init__([_sharing_copy(layers[i], place) for place, i in enumerate(order)])
        self.layer_map = [list(pair) for pair in layer_map]
        self.original = (layers,)
        self.settings: dict[str, object] = {}
        self.order = order
        self.train(layers.training)

    def __getitem__(self, index: int | slice) -> Any:
        """Return a layer, or a plain list of some."""
        if isinstance(index, slice):
            return nn.ModuleList(list(self)[index])
        return super().__getitem__(index)


def replicate(model: nn.Module, layer_map: LayerMap | None) -> Undo:
    """Repeat a model's layers, and return a function that undoes it.

    Nothing is done without a map, or if the layers are repeated by this map already.

    Args:
        model: A model with a list of layers.
        layer_map: The ranges.

    Raises:
        PeftValueError: The model has no such list or not as many layers, or other adapters need
            other layers.
    """
    if not layer_map:
        return _nothing
    _, present = _replicated(model)
    if present is not None and present.layer_map == [list(pair) for pair in layer_map]:
        return _nothing
    if present is not None or any("base_layer" in m._modules for _, m in walk(model)):
        raise PeftValueError(
            f"`layer_replication`={layer_map!r} would change the layers that other adapters have; "
            "add the adapter that repeats layers first, and others with the same option or none."
        )
    path, layers = _list_of_layers(model)
    if max(end for _, end in layer_map) > len(layers):
        raise PeftValueError(
            f"`layer_replication`={layer_map!r}: `{path}` has {len(layers)} layers; the ends of "
            "ranges are at most that."
        )
    replicated = ReplicatedLayers(layers, layer_map)
    parent, _, name = get_submodules(model, path)
    replicated.settings = _changed_settings(parent, model, layers, replicated.order)
    setattr(parent, name, replicated)
    return lambda: restore(model)


def restore(model: nn.Module) -> None:
    """Give a model its own layers back."""
    path, replicated = _replicated(model)
    if replicated is None:
        return
    (layers,) = replicated.original
    for place, i in enumerate(replicated.order):  # buffers are not shared once they are moved
        for name, buffer in replicated[place].named_buffers():
            parent, _, end = name.rpartition(".")
            setattr(layers[i].get_submodule(parent), end, buffer)
    parent, _, name = get_submodules(model, path)
    config = _config(parent, model)
    for key, value in replicated.settings.items():
        setattr(config, key, value)
    setattr(parent, name, layers)


def keep(model: nn.Module) -> None:
    """Leave the repeated layers in a model as its own, each with its own weights."""
    path, replicated = _replicated(model)
    if replicated is None:
        return
    seen: set[int] = set()
    for layer in replicated:
        for module in layer.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in seen:
                    fresh = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                    module._parameters[key] = fresh
        seen |= {id(parameter) for parameter in layer.parameters()}
    parent, _, name = get_submodules(model, path)
    setattr(parent, name, nn.ModuleList(replicated))


def same_list(model: nn.Module) -> Callable[[str, str], bool]:
    """Return a function that tells whether two paths lie in a list of repeated layers."""
    path, replicated = _replicated(model)
    if replicated is None:
        return lambda one, two: False
    return lambda one, two: one.startswith(f"{path}.") and two.startswith(f"{path}.")


def shared_parameters(model: nn.Module) -> set[int]:
    """Return the identities of the parameters of a list of repeated layers."""
    _, replicated = _replicated(model)
    return set() if replicated is None else {id(p) for p in replicated.original[0].parameters()}


def check_mergeable(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Raise `PeftNotSupportedError` if some layers share their base weight with a repeated one."""
    _, replicated = _replicated(model)
    users = Counter(() if replicated is None else _parameter_ids(replicated))
    for path, layer in layers.items() if users else ():
        if users[id(layer.get_base_layer()._parameters.get("weight"))] > 1:
            raise PeftNotSupportedError(
                f"`{path}`: Cannot merge adapters while layers are replicated, since the copies "
                "share the base weight; `merge_and_unload` gives each its own."
            )


def _nothing() -> None:
    """Undo nothing."""


def _parameter_ids(root: nn.Module) -> Iterator[int]:
    """Yield the identity of each parameter, as often as a module has it."""
    for _, module in walk(root):
        yield from (id(p) for p in module._parameters.values() if p is not None)


def _replicated(model: nn.Module) -> tuple[str, ReplicatedLayers | None]:
    """Return the path of the list of repeated layers in a model, and the list, if there is one."""
    found = ((path, m) for path, m in walk(model) if isinstance(m, ReplicatedLayers))
    return next(found, None) or ("", None)


def _list_of_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the outermost list of a model's layers, with its path."""
    found = [
        (path, module)
        for path, module in walk(model)
        if isinstance(module, nn.ModuleList) and path.rpartition(".")[2] in _LISTS
    ]
    depth = min((path.count(".") for path, _ in found), default=0)
    outermost = [(path, module) for path, module in found if path.count(".") == depth]
    if len(outermost) != 1:
        raise PeftValueError(
            "Could not locate the layers attribute in the model: `layer_replication` is for models "
            "with one nn.ModuleList of layers called "
            f"{', '.join(map(repr, _LISTS))}; this one has {len(outermost)}."
        )
    return outermost[0]


def _sharing_copy(layer: nn.Module, place: int) -> nn.Module:
    """Return a copy of a layer with the same parameters and buffers, which knows its place."""
    tensors = [*layer.parameters(), *layer.buffers()]
    result = copy.deepcopy(layer, {id(tensor): tensor for tensor in tensors})
    for module in result.modules():
        if is_int(getattr(module, "layer_idx", None)):
            vars(module)["layer_idx"] = place
    return result


def _config(parent: nn.Module, model: nn.Module) -> Any:
    """Return the config that counts a model's layers."""
    own = getattr(parent, "config", None)
    return own if hasattr(own, "num_hidden_layers") else getattr(model, "config", None)


def _changed_settings(
    parent: nn.Module, model: nn.Module, layers: nn.ModuleList, order: list[int]
) -> dict[str, object]:
    """Set the values of a config that depend on the number of layers; return the former ones."""
    config = _config(parent, model)
    if getattr(config, "num_hidden_layers", None) != len(layers):
        return {}
    lists = {
        name: value
        for name, value in vars(config).items()
        if name.endswith("layer_types") and isinstance(value, list) and len(value) == len(layers)
    }
    before = {"num_hidden_layers": len(layers), **lists}
    config.num_hidden_layers = len(order)
    for name, value in lists.items():
        setattr(config, name, [value[i] for i in order])
    return before
