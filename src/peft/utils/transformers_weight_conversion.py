# SPDX-License-Identifier: Apache-2.0
"""Conversion of adapters for transformers' present models, at its documented place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..checkpoint.transformers_rules import build_peft_weight_mapping
from ..config import TargetedConfig
from ..core.fused_targets import config_with_stacks

__all__ = [
    "build_peft_weight_mapping",
    "convert_peft_config_for_transformers",
    "get_model_conversion_mapping",
]

if TYPE_CHECKING:

    def get_model_conversion_mapping(model: nn.Module, *args: Any, **options: Any) -> list[Any]:
        """Return transformers' rules for tensors of a model's earlier versions."""

else:

    def __getattr__(name: str) -> object:
        if name != "get_model_conversion_mapping":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from transformers import conversion_mapping  # only its users have it

        return conversion_mapping.get_model_conversion_mapping


def convert_peft_config_for_transformers(
    peft_config: TargetedConfig, model: nn.Module, conversions: Sequence[object] | None = None
) -> None:
    """Change a config, in place, whose targets were layers of single experts in transformers 4: it
    then targets the stacks that these are in now. Adding an adapter does this by itself.

    Args:
        peft_config: The config; methods other than LoRA have no such conversion.
        model: A model of transformers.
        conversions: Accepted for compatibility; the model's own rules are taken.

    Example:
        >>> from peft import LoraConfig
        >>> config = LoraConfig(target_modules=["q_proj"])
        >>> convert_peft_config_for_transformers(config, nn.Linear(2, 2))
        >>> config.target_modules
        {'q_proj'}
    """
    vars(peft_config).update(vars(config_with_stacks(peft_config, model)))
