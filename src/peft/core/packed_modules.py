# SPDX-License-Identifier: Apache-2.0
"""Modules that are targeted as a whole and adapted through their parameters.

`nn.MultiheadAttention` has the projections of query, key and value in one parameter, and reads the
weight of `out_proj` in place of calling it. So a layer adapts each of the two parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..base.errors import UnsupportedModuleError
from .base_layer import innermost
from .parameter_targets import ParameterTarget


def is_packed(module: nn.Module) -> bool:
    """Return whether a module is adapted through its parameters."""
    inner = innermost(module)
    # The quantizable subclass computes with layers of its own in place of the parameters.
    return isinstance(inner, nn.MultiheadAttention) and not hasattr(inner, "linear_Q")


def take(targets: dict[str, nn.Module], places: Mapping[str, list[str]]) -> list[ParameterTarget]:
    """Remove packed modules, and everything in them, from the targets; return their parameters.

    Raises:
        UnsupportedModuleError: A module has no packed parameter.
    """
    found: list[ParameterTarget] = []
    for path, module in list(targets.items()):
        if is_packed(module):
            for inner in [p for p in targets if p == path or p.startswith(f"{path}.")]:
                del targets[inner]
            found += _parts(path, innermost(module), places[path])
    return found


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
