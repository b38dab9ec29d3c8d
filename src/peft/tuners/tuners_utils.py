# SPDX-License-Identifier: Apache-2.0
"""The documented place of `BaseTuner` and `BaseTunerLayer`, with functions for code that works on
single layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from ..base.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from ..base.containers import AdapterModuleDict
from ..base.errors import PeftValueError
from ..base.placeholders import placeholders
from ..base.suggestions import no_adapter
from ..config import TargetedConfig
from ..core import targets as _targets
from ..core.adapted_model import AdaptedModel
from ..core.adapters import AdapterParameterDict
from ..core.layer import BaseTunerLayer
from ..core.merge_requests import checked_names, warn_of_merged
from ..core.model_methods import tuner_of
from ..core.plan import all_linear, own_modules
from ..core.tuner import BaseTuner
from ..integrations.accelerate import loaded_weights

__all__ = [
    "AdapterModuleDict", "AdapterParameterDict", "BaseTuner", "BaseTunerLayer",
    "check_adapters_to_merge", "check_target_module_exists", "inspect_matched_modules",
    "onload_layer",
]  # fmt: skip


# Names of the interface that this package does not implement, as placeholders.
BasePromptEncoder: type
BufferDict: type
_ExcludedModule: type
_filter_state_dict_by_key_prefixes: type
_find_minimal_target_modules: type
_get_in_out_features: type
_get_tuner_state_dict_key_prefixes: type
clone_module: type
find_parameter_name_by_module: type
get_device_map: type
replicate_layers: type

T = TypeVar("T", bound=TargetedConfig)

if not TYPE_CHECKING:
    __getattr__ = placeholders(__name__)


def check_adapters_to_merge(
    module: BaseTunerLayer, adapter_names: Sequence[str] | None = None
) -> list[str]:
    """Return the adapters, of a list or of the active ones, that a layer has not merged yet; warn
    of those that it has.

    Raises:
        PeftTypeError: `adapter_names` is not a list of strings.

    Example:
        >>> from peft import LoKrConfig, inject_adapter_in_model
        >>> model = inject_adapter_in_model(
        ...     LoKrConfig(target_modules=["0"]), nn.Sequential(nn.Linear(4, 4))
        ... )
        >>> check_adapters_to_merge(model[0])
        ['default']
    """
    names = module.active_adapters if adapter_names is None else adapter_names
    left = [name for name in checked_names(names) if name not in module.merged_adapters]
    warn_of_merged(module.merged_adapters, left)
    return left


def onload_layer(layer: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the weights of a layer are in memory that accelerate offloads.
    Weights that are replaced in it are stored at its end.
    """
    return loaded_weights(layer, None)


def check_target_module_exists(config: TargetedConfig, key: str) -> bool:
    """Return whether a config's targets, exclusions and layers match the module at a path.

    Example:
        >>> from peft import LoKrConfig
        >>> config = LoKrConfig(
        ...     target_modules=["q"], layers_to_transform=[1], layers_pattern="layers"
        ... )
        >>> check_target_module_exists(config, "layers.1.q")
        True
    """
    targets, layers = config.target_modules or (), _targets.layer_choice(config)
    return bool(_targets.select([key], targets, config.exclude_modules, *layers))


def _maybe_include_all_linear_layers(peft_config: T, model: nn.Module) -> T:
    """Write the paths of all linear layers into a config whose `target_modules` is "all-linear";
    return the config.
    """
    if str(peft_config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        peft_config.target_modules = set(all_linear(model, own_modules(model)))
    return peft_config


def inspect_matched_modules(
    tuner: nn.Module, adapter_name: str = "default"
) -> dict[str, list[str]]:
    """Return the modules that an adapter's config targets: `{"matched": …, "unmatched": …}`.

    Args:
        tuner: A `PeftModel` or its tuner.
        adapter_name: The adapter.

    Raises:
        PeftValueError: There is no such adapter.
    """
    adapted = tuner_of(tuner) or tuner
    assert isinstance(adapted, AdaptedModel)
    if adapter_name not in adapted.peft_config:
        raise PeftValueError(no_adapter(adapter_name, adapted.peft_config))
    config, paths = adapted.peft_config[adapter_name], list(own_modules(adapted.model))
    matched = [path for path in paths if check_target_module_exists(config, path)]
    return {"matched": matched, "unmatched": [path for path in paths if path not in set(matched)]}
