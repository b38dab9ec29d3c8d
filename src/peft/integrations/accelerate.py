# SPDX-License-Identifier: Apache-2.0
"""The only file that knows how accelerate keeps weights elsewhere between calls (`cpu_offload`,
`disk_offload`, `dispatch_model`).

A hook on a module fills its parameters from a map before each forward and puts them on the meta
device after it. What is written into such a parameter is lost. So adapters, which are small, are
brought back for good when they change, and a weight that is merged into is put back into the map.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.containers import walk


def execution_device(module: nn.Module) -> torch.device | None:
    """Where an offloaded module's weights are when it runs; None for a module that is not
    offloaded.
    """
    hook = _hook(module)
    return None if hook is None else torch.empty(0, device=hook.execution_device).device


def stored(
    model: nn.Module, tensors: Collection[int], adapters: Collection[str] | None
) -> dict[int, Tensor]:
    """Of the tensors with these ids, which are the model's own or some adapters', those that are
    offloaded: their values by id.
    """
    found = {}
    for _, module in walk(model, adapters) if tensors else ():
        hook = _hook(module)
        for name, parameter in module._parameters.items() if hook is not None else ():
            if id(parameter) in tensors:
                found[id(parameter)] = hook.weights_map[name]
    return found


def bring_back(module: nn.Module) -> None:
    """End the offloading of a module's own parameters; they stay where it runs."""
    hook, device = _hook(module), execution_device(module)
    if hook is None:
        return
    values = {
        name: hook.weights_map[name].to(device)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    trained = {name: module._parameters[name].requires_grad for name in values}  # type: ignore[union-attr]
    sys.modules["accelerate.hooks"].remove_hook_from_module(module)
    for name, value in values.items():
        module._parameters[name] = nn.Parameter(value, requires_grad=trained[name])


@contextmanager
def at_hand(layer: nn.Module, adapters: Collection[str]) -> Iterator[None]:
    """The weights of a layer and of some of its adapters loaded; what takes their place meanwhile
    is kept.
    """
    hooked = [
        (module, hook) for _, module in walk(layer, adapters) if (hook := _hook(module)) is not None
    ]
    for module, hook in hooked:
        hook.pre_forward(module)
    before = {
        (id(module), name): p.data_ptr()
        for module, _ in hooked
        for name, p in module._parameters.items()
        if p is not None
    }
    try:
        yield
    finally:
        for module, hook in hooked:
            for name, parameter in module._parameters.items():
                if (
                    parameter is not None
                    and not parameter.is_meta
                    and parameter.data_ptr() != before[id(module), name]
                ):
                    _store(hook.weights_map, name, parameter.detach())
            hook.post_forward(module, None)


def _hook(module: nn.Module) -> Any:
    """The hook that offloads a module's own parameters, or None."""
    hook: Any = vars(module).get("_hf_hook")
    several = getattr(hook, "hooks", (hook,))
    return next((one for one in several if getattr(one, "offload", False)), None)


def _store(weights: Any, name: str, value: Tensor) -> None:
    """Put a value into a map of offloaded weights, in memory; there it goes before what is on disk."""
    while hasattr(weights, "prefix"):
        name, weights = weights.prefix + name, weights.dataset
    getattr(weights, "state_dict", weights)[name] = value.to("cpu")
