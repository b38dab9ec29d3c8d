# SPDX-License-Identifier: Apache-2.0
"""Where kernels of our own can run: what stands between plain operations on tensors and Triton, which need not be there.

On a GPU a chain of small operations costs its launches, whatever it computes. A tuner may have one kernel in place of such a chain,
in a file `kernels.py` of its own. That file needs Triton and so is imported by who asked `can_launch`, never at the top; the plain
operations stay, as the reference and for all other cases.
"""

from __future__ import annotations

import functools
import os
import subprocess
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..utils.error import PeftWarning
from ._accumulate import is_eager

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets kernels instead of compiling them; they run on any device then."""


def can_launch(*tensors: Tensor) -> bool:
    """Whether a kernel can take tensors as they are, in place of plain operations.

    It can in eager mode (a compiler fuses the operations itself, a transform has to see them), if all are plain, contiguous and on
    one GPU for which Triton works. Nothing waits for the device.

    Args:
        tensors: What the kernel reads.
    """
    device = tensors[0].device
    if device.type != "cuda" and not INTERPRETED:
        return False
    for tensor in tensors:
        if type(tensor) not in (nn.Parameter, Tensor) or tensor.device != device or not tensor.is_contiguous():
            return False
    return is_eager() and (INTERPRETED or _has_triton(device.index))


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


@functools.cache
def _has_triton(index: int) -> bool:
    """Whether Triton is installed and can build for a GPU; for the latter it wants a C compiler, and a GPU of these years."""
    if torch.cuda.get_device_capability(index) < (8, 0):
        return False
    try:
        from triton.runtime import driver

        driver.active.get_current_device()
    except ImportError:
        return False
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        warnings.warn(f"Triton does not work here, so adapters run on plain operations: {error}", PeftWarning, stacklevel=2)
        return False
    return True
