# SPDX-License-Identifier: Apache-2.0
"""LoRA on linear layers whose weight torchao has quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...base.placeholders import placeholders
from .layer import Linear

__all__ = ["TorchaoLoraLinear"]

dispatch_torchao: type  # a name of the interface that this package does not implement

if not TYPE_CHECKING:
    __getattr__ = placeholders(__name__)


class TorchaoLoraLinear(Linear):
    """A layer around an `nn.Linear` with a torchao weight. It computes as `Linear` does."""
