# SPDX-License-Identifier: Apache-2.0
"""Weights that accelerate offloads (`cpu_offload`, `disk_offload`, `dispatch_model`).

A hook on a module fills its parameters from a map of weights before each forward and puts them on
the meta device after it, so a value written into such a parameter is lost. Adapters are small, so
their offloading ends when they change. A weight with a merged adapter is put back into the map.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..base.containers import walk


class _Hook(Protocol):
    """The part of accelerate's `AlignDevicesHook` that is used here."""

    execution_device: int | str | torch.device
    weights_map: MutableMapping[str, Tensor]

    def pre_forward(self, module: nn.Module) -> object: ...

    def post_forward(self, module: nn.Module, output: object) -> object: ...


def init_empty_weights(include_buffers: bool | None = None) -> AbstractContextManager[None]:
    """Return a context in which modules are made without memory for their parameters, on the meta
    device; with `include_buffers` also without memory for their buffers.
    """
    import accelerate

    return accelerate.init_empty_weights(include_buffers=bool(include_buffers))


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device on which an offloaded module runs; None if it is not offloaded."""
    hook = _hook(module)
    return None if hook is None else torch.empty(0, device=hook.execution_device).device


def offloaded_values(
    model: nn.Module, tensors: Collection[int], adapters: Collection[str] | None
) -> dict[int, Tensor]:
    """Return the values of the offloaded ones of some tensors (ids of parameters), by id."""
    values = {}
    for _, module in walk(model, adapters) if tensors else ():
        if (hook := _hook(module)) is None:
            continue
        for name, parameter in module._parameters.items():
            if id(parameter) in tensors:
                values[id(parameter)] = hook.weights_map[name]
    return values


def end_offloading(module: nn.Module) -> None:
    """Load a module's own parameters on the device where it runs, permanently."""
    hook, device = _hook(module), execution_device(module)
    if hook is None:
        return
    loaded = {
        name: nn.Parameter(hook.weights_map[name].to(device), parameter.requires_grad)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    sys.modules["accelerate.hooks"].remove_hook_from_module(module)
    module._parameters.update(loaded)


def is_offloaded(module: nn.Module) -> bool:
    """Return whether a module's weights are elsewhere until it is called."""
    return _hook(module) is not None


@contextmanager
def loaded_weights(layer: nn.Module, adapters: Collection[str] | None) -> Iterator[None]:
    """Context that loads the weights of a layer and some or (with None) all adapters, and stores
    replaced ones.
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


def _hook(module: nn.Module) -> _Hook | None:
    """Return the hook that offloads a module's own parameters, or None."""
    hook = vars(module).get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    return next((inner for inner in hooks if getattr(inner, "offload", False)), None)


def _store(weights: Any, name: str, value: Tensor) -> None:
    """Put a value into a map of offloaded weights, in memory, where it hides a value on disk."""
    while hasattr(weights, "prefix"):
        name, weights = weights.prefix + name, weights.dataset
    getattr(weights, "state_dict", weights)[name] = value.to("cpu")
