# SPDX-License-Identifier: Apache-2.0
"""Adapters of single experts, written with transformers 4, as adapters of stacks of experts."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from ..base.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from ..base.plain_values import is_empty
from ..base.registry import PEFT_TYPE_TO_TUNER_MAPPING, lookup
from ..checkpoint.format import FusedPart
from ..checkpoint.fused_modules import FusedModule, fused_modules
from ..checkpoint.renamed_modules import ModuleNames, plain_modules, split_key
from ..config import TargetedConfig
from .adapted_parameters import parameter_names, parameter_shape
from .base_layer import embedding_geometry, geometry, innermost
from .targets import any_layer, exactly, layer_choice, named, pattern_value, select

C = TypeVar("C", bound=TargetedConfig)
T = TypeVar("T")


class _Converted(NamedTuple):
    """Stacks that take the place of former modules.

    Args:
        modules: The former modules by the parameter's path, in the order of parts and experts.
        settings: Rank and alpha of the adapter of each stack, by the parameter's path.
    """

    modules: dict[str, list[tuple[str, FusedModule]]]
    settings: dict[str, Mapping[str, float]]


def with_stacks(
    model: nn.Module, config: C, state: Mapping[str, Tensor]
) -> tuple[C, dict[str, Tensor]]:
    """Return a checkpoint's config (copied if changed) and tensors, those of single experts as
    adapters of stacks.
    """
    tuner = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
    layout, holders = tuner.checkpoint_format, tuner.tuner_layer_cls.container_names
    names = ModuleNames(model)
    split = {key: split_key(key, holders) for key in state}
    if not layout.expert_tensors or all(path in names.paths for _, path, _ in split.values()):
        return config, dict(state)
    former = fused_modules(model)
    own: dict[str, dict[str, Tensor]] = {}
    for key, (_, path, end) in split.items():
        if path in former:
            own.setdefault(path, {})[end.removeprefix(".")] = state[key]
    if not own:
        return config, dict(state)
    modules_now = plain_modules(model)
    root = next(start for start, path, _ in split.values() if path in own)
    found = _grouped(former, own)
    result = {key: state[key] for key, (_, path, _) in split.items() if path not in own}
    for key, modules in found.modules.items():
        parts = [FusedPart(path, p.part, p.expert, own[path]) for path, p in modules]
        place = modules[0][1]
        module = innermost(modules_now[place.module])
        shape = parameter_shape(module, place.parameter)
        tensors, found.settings[key] = layout.stack_experts(config, parts, shape)
        start = root + _nested(module, place, found.modules)
        result |= {f"{start}.{end}": tensor for end, tensor in tensors.items()}
    adapted = {
        path
        for _, path, end in split.values()
        if path not in own and end.split(".")[1:] and end.split(".")[1].startswith(tuple(holders))
    }
    present = {path: now for path in adapted if (now := names.now(path)) is not None}
    return _changed(model, config, found, present.values()), result


def config_with_stacks(config: C, model: nn.Module) -> C:
    """Return a config with the stacks of experts in place of targets that name former modules. It
    is the config itself if its targets are modules of the model.
    """
    tuner, targets = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type), config.target_modules
    if (
        not tuner.checkpoint_format.expert_tensors
        or targets is None
        or targets == INCLUDE_LINEAR_LAYERS_SHORTHAND
        or is_empty(targets)
    ):
        return config
    paths = ModuleNames(model).paths
    lost: str | Collection[str] = targets  # an expression is tried on all modules
    rest_of: str | Collection[str] = targets
    if not isinstance(targets, str):
        lost = [name for name in targets if not any(named([name], path) for path in paths)]
        rest_of = set(targets).difference(lost)
    former = fused_modules(model) if lost else {}
    chosen = select(former, lost, config.exclude_modules, *layer_choice(config))
    if not chosen:
        return config
    found = _grouped(former, chosen)
    for key, modules in found.modules.items():
        found.settings[key] = tuner.checkpoint_format.stack_settings(
            config, {place.part: path for path, place in modules}
        )
    rest = select(paths, rest_of, config.exclude_modules, *layer_choice(config))
    return _changed(model, config, found, rest)


def _grouped(former: Mapping[str, FusedModule], chosen: Collection[str]) -> _Converted:
    """Return chosen former modules by the parameter that they are in now."""
    modules: dict[str, list[tuple[str, FusedModule]]] = {}
    for path, place in former.items():
        if path in chosen:
            modules.setdefault(place.key, []).append((path, place))
    return _Converted(modules, {})


def _nested(module: nn.Module, place: FusedModule, keys: Collection[str]) -> str:
    """Return the path of a parameter's layer in a file; layers of later parameters are around."""
    order = parameter_names(module)
    later = order[order.index(place.parameter) + 1 :]
    around = [name for name in later if f"{place.module}.{name}" in keys]
    return place.module + ".base_layer" * len(around)


def _changed(model: nn.Module, config: C, found: _Converted, layers: Iterable[str]) -> C:
    """Return a config that targets stacks and the modules in `layers`; of modules that are no
    layers any more (routers) it targets the weight.
    """
    result = copy.copy(config)
    every_module = plain_modules(model)
    modules = {path: innermost(every_module[path]) for path in dict.fromkeys(layers)}
    weights = [path for path, module in modules.items() if _is_matrix(module)]
    every = [
        f"{path}.{name}"
        for path, module in every_module.items()
        if path
        for name in parameter_names(innermost(module))
    ]
    wanted = [*found.modules, *(f"{path}.weight" for path in weights)]
    result.target_parameters = sorted({*(config.target_parameters or ()), *_short(wanted, every)})
    kept = [path for path in modules if path not in weights]
    names, excluded = exactly(kept, every_module)
    result.target_modules = set(names)
    if excluded is not None:
        result.exclude_modules = excluded
    vars(result).update(any_layer(config))
    used = [path for own in found.modules.values() for path, _ in own]
    for field in next(iter(found.settings.values()), {}):
        patterns = getattr(config, field) or {}
        own = {key: settings[field] for key, settings in found.settings.items()}
        for path in weights:
            own[f"{path}.weight"] = pattern_value(patterns, path, None)
        setattr(result, field, _patterns(patterns, own, [*used, *weights], kept))
    lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type).checkpoint_format.fit_to_stacks(result)
    return result


def _is_matrix(module: nn.Module) -> bool:
    """Return whether a module is no layer, but has a matrix as its weight."""
    weight = module._parameters.get("weight")
    is_layer = geometry(module) is not None or embedding_geometry(module) is not None
    return not is_layer and weight is not None and weight.dim() == 2


def _short(wanted: Sequence[str], every: Sequence[str]) -> list[str]:
    """Return names that match these paths of parameters and no others: ends where they can."""
    result: dict[str, None] = {}
    for key in wanted:
        end = ".".join(key.split(".")[-2:])
        matched = [other for other in every if named([end], other)]
        result[end if set(matched) <= set(wanted) else key] = None
    return list(result)


def _patterns(
    patterns: Mapping[str, T], own: Mapping[str, T], gone: Sequence[str], kept: Sequence[str]
) -> dict[str, T]:
    """Return a config's patterns, and values of parameters by the ends of their paths where these
    agree. Keys that match modules that are `gone`, and none that is kept, are left out.
    """
    result = {
        key: value
        for key, value in patterns.items()
        if any(pattern_value({key: True}, path, False) for path in kept)
        or not any(pattern_value({key: True}, path, False) for path in gone)
    }
    for key, value in own.items():
        end = ".".join(key.split(".")[-2:])
        alike = {v for other, v in own.items() if other.endswith(f".{end}")}
        if value is not None:
            result[end if len(alike) == 1 else key] = value
    return result
