# SPDX-License-Identifier: Apache-2.0
"""Where kernels of our own can run: what stands between plain operations on tensors and Triton,
which need not be there.

On a GPU a chain of small operations costs its launches, whatever it computes. A tuner may have one
kernel in place of such a chain, in a file `kernels.py` or `…_kernels.py` of its own; `kernels.py`
beside this one has what they all share. Such a file needs Triton and so is imported by who asked
`can_launch` or `has_triton`, never at the top; the plain operations stay, as the reference and for
all other cases.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import PeftWarning
from .dispatch import is_eager

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets kernels instead of compiling them; they run on any device then."""

# Whether a function with kernels has done on a device what it should.
_TRIED: dict[tuple[Callable[..., Any], torch.device], bool] = {}


def can_launch(*tensors: Tensor) -> bool:
    """Whether a kernel can take tensors as they are, in place of plain operations.

    It can in eager mode (a compiler fuses the operations itself, a transform has to see them), if
    all are plain, contiguous and on one GPU of this decade, and Triton is installed. Nothing waits
    for the device.

    Args:
        tensors: What the kernel reads.
    """
    device = tensors[0].device
    if not (is_eager() and has_triton(device)):
        return False
    for tensor in tensors:
        if (
            type(tensor) not in (nn.Parameter, Tensor)
            or tensor.device != device
            or not tensor.is_contiguous()
        ):
            return False
    return True


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton is installed and made for a device: a GPU that knows bfloat16."""
    if (device.type != "cuda" and not INTERPRETED) or importlib.util.find_spec("triton") is None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def agrees(
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    example: Callable[[torch.device], tuple[Any, ...]],
    device: torch.device,
) -> bool:
    """Whether a function with kernels does on a device what plain operations do.

    Which GPUs, compilers and versions of Triton it will meet is not known, so it is tried: once for
    a device, before it is used there, values and gradients of one small example. If it differs or
    raises, one is warned, and it is not used there.

    Args:
        ours: The function with kernels.
        plain: The same in plain operations.
        example: Makes arguments of both on a device.
        device: Where.
    """
    known = _TRIED.get((ours, device))
    if known is None:
        if torch._C._current_graph_task_id() != -1 or (
            device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        ):
            return False  # inside a backward, or while a graph is captured, is no time to try
        difference = _difference(ours, plain, example, device)
        known = _TRIED[ours, device] = difference is None
        if not known:
            warnings.warn(
                f"{ours.__module__} is of no use on {device}, plain operations are used: "
                f"{difference}",
                PeftWarning,
                stacklevel=2,
            )
    return known


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return _on(tensor.device) if tensor.is_cuda else nullcontext()


def _on(device: torch.device) -> AbstractContextManager[object]:
    return (
        nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
    )


def _difference(ours: Any, plain: Any, example: Any, device: torch.device) -> str | None:
    """What is wrong with `ours`, tried in a thread, where nothing is in force of what the caller
    has switched on or hooked in.
    """
    found: list[str | None] = []

    def run() -> None:
        try:
            both = [_values_and_gradients(function, example, device) for function in (ours, plain)]
            same = all(
                torch.allclose(one, other, rtol=1e-3, atol=1e-5)
                for one, other in zip(*both, strict=True)
            )
            found.append(None if same else "results differ")
        except Exception as error:  # of whatever kind a compiler has
            found.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def _values_and_gradients(function: Any, example: Any, device: torch.device) -> list[Tensor]:
    """Results for the example and its gradients, from the random numbers that come next, which stay
    the next.
    """
    cuda = device.type == "cuda"
    with (
        _on(device) if cuda else nullcontext(),
        torch.random.fork_rng([device.index] if cuda else []),
    ):
        arguments = example(device)
        results = function(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        trained = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        return [
            *results,
            *torch.autograd.grad(results, trained, [result.detach().cos() for result in results]),
        ]
