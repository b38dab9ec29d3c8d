# SPDX-License-Identifier: Apache-2.0
"""Modules that are targeted as a whole and adapted through their parameters.

`nn.MultiheadAttention` has the projections of query, key and value in one parameter, and reads the
weight of `out_proj` in place of calling it. So a layer adapts each of the two parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from ..base.errors import UnsupportedModuleError
from .base_layer import innermost
from .parameter_targets import ParameterTarget


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
            for inner in [p for p in targets if p == path or p.startswith(f"{path}.")]:
                del targets[inner]
            found += _parts(path, innermost(module), places[path])
    taken = {(id(target.module), target.name) for target in found}
    others = [target for target in named if (id(target.module), target.name) not in taken]
    problems = [text for target in others for text in _problems(model, target)]
    if problems:
        raise UnsupportedModuleError(" ".join(problems))
    return others + found


def _problems(model: nn.Module, target: ParameterTarget) -> Iterator[str]:
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
    output = innermost(module.out_proj)  # type: ignore[arg-type]
    inside = f"{path}.base_layer.out_proj"
    return [
        ParameterTarget(path, "in_proj_weight", module, tuple(places), part_of=path),
        ParameterTarget(inside, "weight", output, (inside,), part_of=path),
    ]
