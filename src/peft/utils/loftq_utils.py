# SPDX-License-Identifier: Apache-2.0
"""LoftQ, at its documented place."""

from ..tuners.lora.loftq import loftq_init, replace_lora_weights_loftq

__all__ = ["loftq_init", "replace_lora_weights_loftq"]
