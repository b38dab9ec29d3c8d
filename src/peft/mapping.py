# SPDX-License-Identifier: Apache-2.0
"""The registries of methods, configs from dictionaries, and adapters in a model without a
`PeftModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .base.errors import PeftValueError
from .base.placeholders import placeholders
from .base.registry import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    lookup,
    registered_methods,
)
from .base.validation import check_adapter, check_flags
from .config import PeftConfig, check_config
from .core.tuner import BaseTuner

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "get_peft_config",
    "inject_adapter_in_model",
]  # fmt: skip


if not TYPE_CHECKING:  # names of the interface that are elsewhere here, or not provided
    __getattr__ = placeholders(__name__)


def get_peft_config(config_dict: dict[str, object]) -> PeftConfig:
    """Make a config from its fields; `peft_type` chooses the class.

    Raises:
        PeftValueError: `peft_type` is missing or not implemented, or a value is not allowed.
    """
    if "peft_type" not in config_dict:
        raise PeftValueError(
            f"The config has no `peft_type`; name one of {', '.join(registered_methods())}."
        )
    return lookup(PEFT_TYPE_TO_CONFIG_MAPPING, config_dict["peft_type"]).from_peft_type(
        **config_dict
    )


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter into a model in place and return the model itself.

    The model's attribute `peft_config` then holds the configs by adapter name;
    `get_peft_model_state_dict` and `set_peft_model_state_dict` work on it. A new adapter becomes
    the active one of its method.

    Args:
        peft_config: The adapter's config.
        model: The model.
        adapter_name: A new name, without dots.
        low_cpu_mem_usage: Make the adapter on the meta device, to be filled by
            `set_peft_model_state_dict`.
        state_dict: Adapt the modules this checkpoint has parameters for, in place of those the
            config targets.

    Raises:
        PeftTypeError: Not a config, or a switch is neither True nor False.
        PeftValueError: The name is taken, or the config is invalid or does not fit; the model is
            left as it was.

    Example:
        >>> import torch
        >>> from peft import LoKrConfig, inject_adapter_in_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> inject_adapter_in_model(LoKrConfig(target_modules=["0"]), model) is model
        True
    """
    check_config(peft_config)
    check_adapter(adapter_name)
    check_flags(low_cpu_mem_usage=low_cpu_mem_usage)
    configs: dict[str, PeftConfig] = getattr(model, "peft_config", {})
    if adapter_name in configs:
        raise PeftValueError(
            f"Adapter with name '{adapter_name}' already exists; choose another, or delete that "
            "one first."
        )
    tuner_cls: type[BaseTuner] = lookup(PEFT_TYPE_TO_TUNER_MAPPING, peft_config.peft_type)
    tuner = tuner_cls(
        model, peft_config, adapter_name, low_cpu_mem_usage, state_dict, shared_root=model
    )
    # Clients write this config to files.
    configs[adapter_name] = tuner.config_to_save(adapter_name)
    vars(model)["peft_config"] = configs
    return model
