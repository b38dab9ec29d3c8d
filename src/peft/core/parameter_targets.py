# SPDX-License-Identifier: Apache-2.0
"""Find the parameters that a config targets, check them, and put the layers that adapt them around
their modules.

A packed module is targeted as a whole and adapted through its parameters: `nn.MultiheadAttention`
has the projections of query, key and value in one parameter, and reads the weight of `out_proj` in
place of calling it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from ..base.errors import (
    NoMatchingPeftModuleError,
    PeftValueError,
    PeftWarning,
    UnsupportedModuleError,
    warn,
)
from ..base.geometry import Geometry
from ..base.modules import get_submodules
from ..config import TargetedConfig
from . import targets as _targets
from .adapted_parameters import attach, layers_of, parameter_names, parameter_shape, plain_parameter
from .adapters import adopt
from .base_layer import innermost
from .layer import BaseTunerLayer
from .parameter_layer import ParameterLayer, parameter_geometry
from .unmatched_names import counted_names, with_near_misses


class ParameterTarget(NamedTuple):
    """A parameter that an adapter adapts.

    Args:
        path: Path of its module.
        name: Its name in the module.
        module: The module itself, below all adapters.
        places: All paths of the module, several where the model shares it.
        part_of: Path of the module that is targeted as a whole, and this parameter with it.
    """

    path: str
    name: str
    module: nn.Module
    places: tuple[str, ...]
    part_of: str | None = None

    @property
    def key(self) -> str:
        """The parameter's path in the model without adapters."""
        return f"{self.plain_path}.{self.name}"

    @property
    def plain_path(self) -> str:
        """The path of its module in the model without adapters."""
        return self.path.replace(".base_layer", "")

    @property
    def pattern_path(self) -> str:
        """The path that patterns of ranks match."""
        return self.part_of or self.key

    @property
    def size(self) -> Geometry:
        """The size of the linear map, or of one expert's."""
        return parameter_geometry(self.module, self.name)


def find(
    config: TargetedConfig, root: nn.Module, modules: Mapping[str, nn.Module], is_new: bool = True
) -> list[ParameterTarget]:
    """Return the targeted parameters in the order of their registration.

    Args:
        config: A config with `target_parameters`: ends of parameters' paths, or whole ones.
        root: The model.
        modules: Its modules by path, as they are without adapters.
        is_new: Warn of names that match no parameter.

    Raises:
        NoMatchingPeftModuleError: No parameter has any of the names.
        PeftValueError: A parameter lies on the model itself.
    """
    names = list(config.target_parameters or ())
    if own := [name for name in names if name in parameter_names(root)]:
        raise PeftValueError(
            "Targeting an nn.Parameter on the top-level module is not supported (parameter "
            f"'{own[0]}'); put the model into another module, or target parameters of its modules."
        )
    found: dict[int, list[ParameterTarget]] = {}
    places: dict[int, list[str]] = {}
    every: list[str] = []
    for path, module in modules.items():
        inner = innermost(module)
        places.setdefault(id(inner), []).append(path)
        if id(inner) in found:
            continue
        keys = {name: f"{path}.{name}" for name in parameter_names(inner)}
        every += keys.values()
        found[id(inner)] = [
            ParameterTarget(path, name, inner, ())
            for name, key in keys.items()
            if _targets.named(names, key)
        ]
    result = [
        target._replace(places=tuple(places[identity]))
        for identity, own_targets in found.items()
        for target in own_targets
    ]
    if is_new or not result:
        _report_unmatched(names, result, every)
    return result


def _report_unmatched(
    names: Sequence[str], found: Sequence[ParameterTarget], every: Collection[str]
) -> None:
    """Raise if no parameter was found, and warn of names that match none."""
    keys = [target.key for target in found]
    idle = [name for name in names if not any(_targets.named([name], key) for key in keys)]
    if not idle:
        return
    there = f" Its parameters are called {counted_names(every)}." if every else ""
    message = f"`target_parameters` names {with_near_misses(idle, every)}: the model has no such "
    if not found:
        raise NoMatchingPeftModuleError(f"{message}parameter.{there}")
    warn(f"{message}parameter.", PeftWarning)


def check(
    targets: Sequence[ParameterTarget], adapted: Mapping[str, nn.Module], supported: bool, name: str
) -> None:
    """Check that parameters can be adapted.

    Args:
        targets: The parameters.
        adapted: Modules that the adapter adapts or trains in full, by path.
        supported: False if the method has no adapters for parameters.
        name: The method's name, for messages.

    Raises:
        UnsupportedModuleError: The method can't adapt parameters, or not ones of this kind.
        PeftValueError: A parameter's module is adapted as a whole, or has adapted ones inside.
    """
    if targets and not supported:
        raise UnsupportedModuleError(
            f"{name} has no adapters for parameters; leave out `target_parameters`."
        )
    problems = [f"`{target.key}`: {text}" for target in targets for text in _problems(target)]
    if problems:
        raise UnsupportedModuleError(" ".join(problems))
    for target in targets:
        for path, module in adapted.items():
            if innermost(module) is target.module:
                raise PeftValueError(_wrapped_twice(target))
            if _targets.is_inside(path, target.path) or _targets.is_inside(target.path, path):
                raise PeftValueError(
                    f"`{target.key}`: `{path}` is adapted too, and one lies inside the other; "
                    "leave out one of them."
                )


def _wrapped_twice(target: ParameterTarget) -> str:
    return (
        f"Trying to wrap an `nn.Parameter` of layer '{target.path}' of type "
        f"{type(target.module).__name__}, which is not a valid target. Make sure that this layer "
        "is not also targeted with `target_modules`; `target_modules=[]` targets no modules."
    )


def _problems(target: ParameterTarget) -> Iterator[str]:
    """Yield the reasons why a parameter can't be adapted."""
    try:
        parameter_geometry(target.module, target.name)
    except PeftValueError as error:
        shape = list(parameter_shape(target.module, target.name))
        yield str(error) if shape else "it is a number."
        return
    parameter = plain_parameter(target.module, target.name)
    held = [*target.module._parameters, *target.module._buffers]
    scales = [n for n in held if n.startswith(target.name) and "scale" in n[len(target.name) :]]
    if not parameter.is_floating_point() or (parameter.dtype.itemsize == 1 and scales):
        beside = f" with `{scales[0]}` beside it" if scales else ""
        yield (
            f"it is stored as {parameter.dtype}{beside}, so adding a delta to it would not add to "
            "the weight; load the model without quantization of this parameter."
        )


def twice_reason(path: str, module: nn.Module) -> str | None:
    """Return the reason why a module can't be adapted as a whole, if its parameters are."""
    if held := layers_of(innermost(module)):
        return f"`{path}`: its parameters {', '.join(held)} have adapters; leave it out."
    return None


def layers_around(module: nn.Module) -> Iterator[ParameterLayer]:
    """Yield the layers around a module that adapt its parameters, from the outside."""
    while (inner := module._modules.get("base_layer")) is not None:
        if isinstance(module, ParameterLayer):
            yield module
        module = inner


def nested_paths(targets: Iterable[ParameterTarget]) -> dict[str, ParameterTarget]:
    """Return the path of each parameter's layer in a file: the first registered parameter of a
    module has the innermost.
    """
    by_path: dict[str, list[ParameterTarget]] = {}
    for target in targets:
        by_path.setdefault(target.path, []).append(target)
    return {
        path + ".base_layer" * (len(own) - 1 - i): target
        for path, own in by_path.items()
        for i, target in enumerate(own)
    }


def targets_of(layers: Mapping[str, BaseTunerLayer]) -> list[ParameterTarget]:
    """Return the parameters that layers adapt, by the layers' paths in a file."""
    own = {path: layer for path, layer in layers.items() if isinstance(layer, ParameterLayer)}
    found = []
    for path in sorted(own, key=len, reverse=True):
        outer = path.rpartition(".base_layer.")[0]
        is_packed = bool(outer) or isinstance(innermost(own[path]), nn.MultiheadAttention)
        plain = re.sub(r"(\.base_layer)+$", "", path)
        found.append(
            ParameterTarget(
                plain,
                own[path].parameter_name,
                innermost(own[path]),
                (),
                (outer or plain) if is_packed else None,
            )
        )
    return found


def layer_for(
    model: nn.Module, path: str, name: str, layer_cls: type[BaseTunerLayer]
) -> ParameterLayer | None:
    """Return the layer of a method that adapts a parameter of the module at `path`, or None."""
    return next(
        (
            layer
            for layer in layers_around(model.get_submodule(path))
            if isinstance(layer, layer_cls) and layer.parameter_name == name
        ),
        None,
    )


def put_layers(
    model: nn.Module,
    made: Iterable[tuple[ParameterTarget, ParameterLayer]],
    layer_cls: type[BaseTunerLayer],
) -> None:
    """Put new layers around the modules of their parameters; layers of the method that are there
    adopt theirs.
    """
    for target, layer in made:
        known = layer_for(model, target.path, target.name, layer_cls)
        if known is not None:
            adopt(known, layer)
        else:
            _insert(model, target, layer)


def _insert(model: nn.Module, target: ParameterTarget, layer: ParameterLayer) -> None:
    """Put a new layer among those around a module: layers of earlier parameters stay inside."""
    order = parameter_names(target.module)
    outer: BaseTunerLayer | None = None
    inside = model.get_submodule(target.path)
    while isinstance(inside, ParameterLayer) and order.index(inside.parameter_name) > order.index(
        target.name
    ):
        outer, inside = inside, inside.base_layer
    held = layers_of(target.module).get(target.name, [])
    if held:  # a layer of another method
        layer._merges = held[0]._merges  # type: ignore[attr-defined]
    layer.base_layer = inside
    attach(target.module, target.name, [*held, layer])
    if outer is not None:
        outer.base_layer = layer
        return
    for place in target.places:
        parent, _, child = get_submodules(model, place)
        setattr(parent, child, layer)


def is_packed(module: nn.Module) -> bool:
    """Return whether a module is adapted through its parameters."""
    inner = innermost(module)
    # The quantizable subclass computes with layers of its own in place of the parameters.
    return isinstance(inner, nn.MultiheadAttention) and not hasattr(inner, "linear_Q")


def with_parts(
    model: nn.Module,
    named: list[ParameterTarget],
    targets: dict[str, nn.Module],
    places: Mapping[str, list[str]],
) -> list[ParameterTarget]:
    """Return the parameters that a config names, and those of the targeted packed modules, which
    are removed from the targets with everything in them.

    Raises:
        UnsupportedModuleError: A module has no packed parameter, or a named one is that of a packed
            module and not a projection.
    """
    found: list[ParameterTarget] = []
    for path, module in list(targets.items()):
        if is_packed(module):
            for inner in [p for p in targets if _targets.is_inside(p, path)]:
                del targets[inner]
            found += _parts(path, innermost(module), places[path])
    taken = {(id(target.module), target.name) for target in found}
    others = [target for target in named if (id(target.module), target.name) not in taken]
    problems = [text for target in others for text in _packed_problems(model, target)]
    if problems:
        raise UnsupportedModuleError(" ".join(problems))
    return others + found


def _packed_problems(model: nn.Module, target: ParameterTarget) -> Iterator[str]:
    """Yield the reason why a parameter of a packed module can't be adapted by itself."""
    parent = innermost(model.get_submodule(target.path.rpartition(".")[0]))
    is_inside = is_packed(parent) and target.path.endswith("out_proj")
    if is_inside or (is_packed(target.module) and not target.name.endswith("_proj_weight")):
        yield (
            f"`{target.key}`: of an nn.MultiheadAttention, `in_proj_weight` can be adapted by "
            "itself; name the whole module in `target_modules` to adapt `out_proj` too."
        )


def _parts(path: str, module: nn.Module, places: list[str]) -> list[ParameterTarget]:
    """Return the parameters of a packed module; the path of a nested one is that in a file."""
    if module._parameters.get("in_proj_weight") is None:
        raise UnsupportedModuleError(
            f"`{path}`: Only same embed for query/key/value is supported as of now for "
            "MultiheadAttention; this one has `kdim` or `vdim`. Name its matrices in "
            f"`target_parameters` instead: ['{path}.q_proj_weight', …]."
        )
    output = innermost(module.get_submodule("out_proj"))
    inside = f"{path}.base_layer.out_proj"
    return [
        ParameterTarget(path, "in_proj_weight", module, tuple(places), part_of=path),
        ParameterTarget(inside, "weight", output, (inside,), part_of=path),
    ]
