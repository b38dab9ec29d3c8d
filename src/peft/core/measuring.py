# SPDX-License-Identifier: Apache-2.0
"""Run a model to measure what its layers see, and leave it as it was, also after an error.

Initializations from data and routers from data collect a statistic of each layer's input:

    with watched_inputs(model, layers, note):
        for batch in data:
            model(**batch)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import torch
from torch import nn

Note: TypeAlias = Callable[[str, tuple[object, ...]], None]
"""A function of a layer's path and the positional arguments of a call of it."""


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Context with a model in training or evaluation mode; afterwards each module is in its own."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def watched_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], note: Note, *, training: bool = False
) -> Iterator[None]:
    """Context in which `note(path, args)` is called before every call of some layers.

    The model is in evaluation mode (or `training`) and computes no gradients. Hooks and modes are
    as before afterwards. An error of `note` ends the call of the model.

    Args:
        model: The model that will be run.
        layers: Modules of it by path; a layer with adapters is watched as a whole.
        note: Takes the path and the call's positional arguments, without gradients.
        training: Run in training mode.

    Example:
        >>> model, sums = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), {}
        >>> def note(path, args):
        ...     sums[path] = sums.get(path, 0) + args[0].sum(0)
        >>> with watched_inputs(model, {"0": model[0]}, note):
        ...     _ = model(torch.ones(4, 2)), model(torch.ones(1, 2))
        >>> sums
        {'0': tensor([5., 5.])}
    """
    with ExitStack() as stack:
        stack.enter_context(in_mode(model, training))
        for path, layer in layers.items():
            handle = layer.register_forward_pre_hook(_noting(path, note))
            stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        yield


def _noting(path: str, note: Note) -> Callable[[nn.Module, tuple[object, ...]], None]:
    """Return a hook that passes a layer's arguments on."""

    def hook(module: nn.Module, args: tuple[object, ...]) -> None:
        with torch.no_grad():
            note(path, args)

    return hook
