# SPDX-License-Identifier: Apache-2.0
"""Whether what is done here is done now."""

from __future__ import annotations

import torch


def is_eager() -> bool:
    """Whether operations run as they are called, and once: no compiler and no transform looks on."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
