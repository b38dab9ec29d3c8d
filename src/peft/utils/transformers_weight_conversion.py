# SPDX-License-Identifier: Apache-2.0
"""Weight conversion that transformers asks for, at its documented place."""

from ..checkpoint.transformers_rules import build_peft_weight_mapping

__all__ = ["build_peft_weight_mapping"]
