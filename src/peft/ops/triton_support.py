# SPDX-License-Identifier: Apache-2.0
"""Run a Triton kernel in place of plain operations on devices where both agree.

On a GPU a chain of small operations takes the time of its launches. `with_kernel` gives a function
of plain operations a kernel that computes the same in one launch, from the file `<name>_triton.py`
beside its own `<name>.py`. Such a file needs Triton, so it is imported at the first use of the
kernel. The plain operations stay: they are the reference, and serve all other cases.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from ..base.errors import PeftWarning
from .dispatch import PLAIN_TENSORS, is_eager

P = ParamSpec("P")
R = TypeVar("R")

Result = Tensor | tuple[Tensor, ...]
"""One tensor, or several."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton interprets kernels instead of compiling them; they run on any device then."""


class Trial(NamedTuple):
    """A comparison of a function that runs kernels with plain operations, on an example."""

    ours: Callable[..., Result]
    plain: Callable[..., Result]
    example: Callable[[torch.device], tuple[object, ...]]


# The outcome of each trial, by its function with kernels and the device.
_TRIED: dict[tuple[Callable[..., Result], torch.device], bool] = {}


def with_kernel(
    operands: int,
    example: Callable[[torch.device], tuple[object, ...]],
    reference: Callable[..., Result] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give a function of plain operations a kernel that replaces it where possible.

    The module `…_triton` beside the function's own has a function of the same name and arguments,
    and `fits`, which returns whether the kernel supports given arguments. Before its first use on a
    device the kernel is tried on an example there, values and gradients.

    Args:
        operands: How many of the arguments, the first ones, the kernel reads as contiguous tensors.
        example: Makes arguments to try the kernel with on a device.
        reference: The plain operations to compare with, by default the function itself.
    """

    def decorate(plain: Callable[P, R]) -> Callable[P, R]:
        module = f"{plain.__module__}_triton"

        @functools.wraps(plain)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if can_launch(*args[:operands]):  # type: ignore[arg-type]
                kernels = importlib.import_module(module)
                ours = getattr(kernels, plain.__name__)
                trial = Trial(ours, reference or plain, example)  # type: ignore[arg-type]
                device = cast(Tensor, args[0]).device
                if kernels.fits(*args, **kwargs) and agrees(trial, device):
                    return ours(*args, **kwargs)
            return plain(*args, **kwargs)

        return run

    return decorate


def can_launch(*tensors: Tensor) -> bool:
    """Return whether a kernel can read tensors as they are; nothing waits for the device.

    It can in eager mode (compilers fuse by themselves, transforms must see the operations), if all
    are plain, contiguous and on one GPU of compute capability 8 or more, and Triton is installed.
    """
    device = tensors[0].device
    if torch.compiler.is_compiling() or not has_triton(device) or not is_eager():
        return False  # a compiler must not trace the cache of `has_triton`
    for tensor in tensors:
        if (
            type(tensor) not in PLAIN_TENSORS
            or tensor.device != device
            or not tensor.is_contiguous()
        ):
            return False
    return True


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Return whether Triton is installed and made for a device: a GPU with bfloat16."""
    if (device.type != "cuda" and not INTERPRETED) or importlib.util.find_spec("triton") is None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def agrees(trial: Trial, device: torch.device) -> bool:
    """Return whether a function with kernels computes the same on a device as plain operations.

    Values and gradients of an example are compared once on each device. If they differ, or the
    kernel raises, a warning says so and it is not used there.
    """
    agreed = _TRIED.get((trial.ours, device))
    if agreed is None:
        if torch._C._current_graph_task_id() != -1 or (
            device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        ):
            return False  # not tried inside a backward, or while a graph is captured
        difference = _difference(trial, device)
        agreed = _TRIED[trial.ours, device] = difference is None
        if not agreed:
            warnings.warn(
                f"{trial.ours.__module__} is not used on {device}, but plain operations: "
                f"{difference}",
                PeftWarning,
                stacklevel=2,
            )
    return agreed


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which the tensor's device is the current one, where Triton launches."""
    return _on(tensor.device) if tensor.is_cuda else nullcontext()


def _on(device: torch.device) -> AbstractContextManager[object]:
    return (
        nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
    )


def _difference(trial: Trial, device: torch.device) -> str | None:
    """Return the difference that a trial shows, or None; runs in a thread of its own."""
    found: list[str | None] = []

    def run() -> None:
        try:
            both = [
                _values_and_gradients(function, trial, device)
                for function in (trial.ours, trial.plain)
            ]
            same = all(
                torch.allclose(one, other, rtol=1e-3, atol=1e-5)
                for one, other in zip(*both, strict=True)
            )
            found.append(None if same else "results differ")
        except Exception as error:  # a compiler raises errors of any kind
            found.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def _values_and_gradients(
    function: Callable[..., Result], trial: Trial, device: torch.device
) -> list[Tensor]:
    """Return results for the example and its gradients, without advancing the random numbers."""
    cuda = device.type == "cuda"
    with (
        _on(device) if cuda else nullcontext(),
        torch.random.fork_rng([device.index] if cuda else []),
    ):
        arguments = trial.example(device)
        results = function(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        trained = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        return [
            *results,
            *torch.autograd.grad(results, trained, [result.detach().cos() for result in results]),
        ]
