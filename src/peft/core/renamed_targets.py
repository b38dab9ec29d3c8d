# SPDX-License-Identifier: Apache-2.0
"""Change the module names of an adapter's config to the present ones."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeAlias, TypeVar

from torch import Tensor, nn

from ..base.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, MODEL_ROOT
from ..base.plain_values import is_empty
from ..base.registry import PEFT_TYPE_TO_TUNER_MAPPING, lookup
from ..checkpoint.renamed_modules import ModuleNames, container_at, plain_modules, renamed_state
from ..config import TargetedConfig
from ..integrations.distributed import unwrapped_name
from .adapted_parameters import parameter_names
from .base_layer import innermost
from .fused_targets import config_with_stacks, with_stacks
from .targets import any_layer, exactly, layer_choice, named, pattern_value, saved, select, starts

C = TypeVar("C", bound=TargetedConfig)
# A rule by which names match the module at a path.
Match: TypeAlias = Callable[[list[str], str], bool]


def renamed_config(
    config: C, paths: Collection[str], renamed: Mapping[str, str], layers: Iterable[str]
) -> C:
    """Return a config with names that match the same modules under their present paths.

    It is the config itself if they do already. `renamed` maps paths that the config knows to
    present ones; `layers` are the adapted modules by the former.
    """
    if all(old == new for old, new in renamed.items()):
        return config
    result = copy.copy(config)
    own = {old: renamed[old] for old in layers}
    whole = result.modules_to_save = _present(config.modules_to_save, saved, paths, renamed)
    rest = [path for path in paths if not any(saved(whole, path[:i]) for i in _ends(path))]
    if own and set(_selected(config, rest)) != set(own.values()):
        names, result.exclude_modules = exactly(own.values(), paths)
        result.target_modules = set(names)
        vars(result).update(any_layer(config))
    for field in config.patterns:
        patterns = getattr(config, field)
        values = {new: pattern_value(patterns, old, None) for old, new in own.items()}
        if any(pattern_value(patterns, new, None) != value for new, value in values.items()):
            kept = {f"^{re.escape(new)}$": v for new, v in values.items() if v is not None}
            setattr(result, field, kept)
    tokens = config.trainable_token_indices
    if isinstance(tokens, dict):
        result.trainable_token_indices = {
            new: value
            for name, value in tokens.items()
            for new in _present([name], named, paths, renamed) or [name]
        }
    return result


def present_names(
    model: nn.Module, config: C, state: Mapping[str, Tensor]
) -> tuple[C, dict[str, Tensor]]:
    """Return a checkpoint's config (copied if changed) and tensors under modules' present names.

    Raises:
        CheckpointError: A module is now part of another one.
    """
    config, state = with_stacks(model, config, state)
    holders = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type).tuner_layer_cls.container_names
    found = renamed_state(model, state, holders)
    if not found.paths:
        return config, found.state
    modules = plain_modules(model) if config.target_parameters else {}
    layers = [path for path in found.layers if not _has_targets(modules, config, found.paths[path])]
    return renamed_config(config, ModuleNames(model).paths, found.paths, layers), found.state


def _has_targets(modules: Mapping[str, nn.Module], config: TargetedConfig, path: str) -> bool:
    """Return whether a config targets parameters of the module at a path."""
    names = parameter_names(innermost(modules[path])) if path in modules else []
    return any(named(config.target_parameters, f"{path}.{name}") for name in names)


def saved_paths(
    model: nn.Module, state_dict: Mapping[str, Tensor], containers: Collection[str]
) -> set[str]:
    """Return the present paths of the modules in a checkpoint's keys."""
    names, paths = ModuleNames(model), set()
    for key in state_dict:
        parts = unwrapped_name(key.removeprefix(MODEL_ROOT)).split(".")
        if (end := container_at(parts, containers)) is not None:
            paths.add(".".join(parts[:end]))
    return {names.now(path) or path for path in paths}


def config_of_now(config: C, model: nn.Module) -> C:
    """Return a config from a file with the present names of modules in place of earlier names.

    It is the config itself if all its names match modules, or none does under earlier names.
    """
    config = config_with_stacks(config, model)
    if config.source is None:
        return config
    names = ModuleNames(model)
    lost = _lost_targets(config.target_modules, names.paths)
    beside = [
        (name, match)
        for name, match in _companions(config)
        if not any(match([name], path) for path in names.paths)
    ]
    if not (lost or beside) or not (before := names.before()):
        return config
    known = {before.get(path, path): path for path in names.paths}
    chosen = [old for old in _selected(config, known) if named(lost, old)]
    if not chosen and not any(_meant(*name, known) for name in beside):
        return config
    moved = {known[old] for old in chosen}
    others = {path: path for path in _selected(config, names.paths) if path not in moved}
    return renamed_config(config, names.paths, {**known, **others}, [*chosen, *others])


def _lost_targets(
    targets: str | Collection[str] | None, paths: Collection[str]
) -> str | Collection[str] | None:
    """Return the targets of a config that match no module."""
    if targets is None or is_empty(targets) or targets == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return None
    if isinstance(targets, str):
        return None if any(named(targets, path) for path in paths) else targets
    return set(targets).difference(path[i:] for path in paths for i in starts(path))


def _companions(config: TargetedConfig) -> Iterator[tuple[str, Match]]:
    """Yield the names of modules that a config trains beside its layers, in full or by rows."""
    yield from ((name, saved) for name in config.modules_to_save or ())
    tokens = config.trainable_token_indices
    yield from ((name, named) for name in (tokens if isinstance(tokens, dict) else ()))


def _selected(config: TargetedConfig, paths: Iterable[str]) -> list[str]:
    targets = config.target_modules
    if targets is None or is_empty(targets):
        return []
    return select(paths, targets, config.exclude_modules, *layer_choice(config))


def _present(
    names: list[str] | None, match: Match, paths: Collection[str], renamed: Mapping[str, str]
) -> list[str] | None:
    """Return names of modules, those that match no module replaced by present paths."""
    if names is None or is_empty(names):
        return names
    result: dict[str, None] = {}
    for name in names:
        meant = [] if any(match([name], path) for path in paths) else _meant(name, match, renamed)
        result.update(dict.fromkeys(meant or [name]))
    return list(result)


def _meant(name: str, match: Match, renamed: Mapping[str, str]) -> list[str]:
    """Return the present paths of renamed modules that a name matched, and of modules around."""
    found = []
    for old, new in renamed.items():
        for end in _ends(old):
            inner = old[end:]
            if match([name], old[:end]) and new.endswith(inner):
                found.append(new[: len(new) - len(inner)])
    return found


def _ends(path: str) -> list[int]:
    """Return the positions in a path where a prefix of whole names ends."""
    return [i for i, sign in enumerate(path) if sign == "."] + [len(path)]
