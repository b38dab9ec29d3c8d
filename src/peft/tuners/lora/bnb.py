# SPDX-License-Identifier: Apache-2.0
"""LoRA on layers of bitsandbytes, as classes that programs ask for.

They compute as `Linear` does: the base layer multiplies by its quantized weight, and the adapter is
added. Merging dequantizes the weight, adds the delta and quantizes the sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...base.placeholders import placeholders
from .layer import Linear

__all__ = ["Linear4bit", "Linear8bitLt"]

# Names of the interface that this package does not implement, as placeholders.
dispatch_bnb_4bit: type
dispatch_bnb_8bit: type

if not TYPE_CHECKING:
    __getattr__ = placeholders(__name__)


class Linear4bit(Linear):
    """A layer around bitsandbytes' `Linear4bit`."""


class Linear8bitLt(Linear):
    """A layer around bitsandbytes' `Linear8bitLt`."""
