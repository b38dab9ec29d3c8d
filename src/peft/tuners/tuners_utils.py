# SPDX-License-Identifier: Apache-2.0
"""The documented place of the base classes, `BaseTuner` and `BaseTunerLayer`, and how to see what a
config targets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..base.containers import AdapterModuleDict
from ..base.errors import PeftValueError
from ..base.placeholders import placeholder
from ..base.suggestions import no_adapter
from ..config import PeftConfig
from ..core import targets as _targets
from ..core.adapted_model import AdaptedModel
from ..core.adapters import AdapterParameterDict
from ..core.layer import BaseTunerLayer
from ..core.plan import own_modules
from ..core.tuner import BaseTuner

__all__ = [
    "AdapterModuleDict",
    "AdapterParameterDict",
    "BaseTuner",
    "BaseTunerLayer",
    "check_target_module_exists",
    "inspect_matched_modules",
]


# Names of the interface that are not provided here; a class stands for each.
BufferDict: Any
_filter_state_dict_by_key_prefixes: Any
_find_minimal_target_modules: Any
_get_tuner_state_dict_key_prefixes: Any
_maybe_include_all_linear_layers: Any

if not TYPE_CHECKING:  # to which any name would be right

    def __getattr__(name: str) -> Any:
        return placeholder(name, __name__)


def check_target_module_exists(config: PeftConfig, key: str) -> bool:
    """Whether a config's `target_modules`, `exclude_modules` and layers mean the module at a path.

    Example:
        >>> from peft import LoKrConfig
        >>> config = LoKrConfig(target_modules=["q"], layers_to_transform=[1], layers_pattern="layers")
        >>> check_target_module_exists(config, "layers.1.q")
        True
    """
    options: Any = config
    layers = getattr(config, "layers_to_transform", None), getattr(config, "layers_pattern", None)
    return bool(
        _targets.select([key], options.target_modules or (), options.exclude_modules, *layers)
    )


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """Which modules of a model an adapter's config means: `{"matched": paths, "unmatched": paths}`.

    Args:
        tuner: A `PeftModel` or its tuner.
        adapter_name: The adapter.

    Raises:
        PeftValueError: There is no such adapter.
    """
    tuner = tuner if isinstance(tuner, AdaptedModel) else tuner.base_model
    if adapter_name not in tuner.peft_config:
        raise PeftValueError(no_adapter(adapter_name, tuner.peft_config))
    config, paths = tuner.peft_config[adapter_name], list(own_modules(tuner.model))
    matched = [path for path in paths if check_target_module_exists(config, path)]
    return {"matched": matched, "unmatched": [path for path in paths if path not in set(matched)]}
