# SPDX-License-Identifier: Apache-2.0
"""Match the targets of a config with module paths such as `model.layers.0.self_attn.q_proj`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias, TypeVar

from ..base.expressions import fullmatch, match_after
from ..base.patterns import matches_path
from ..base.plain_values import JsonObject
from ..base.validation import LayerIndices
from ..config import PeftConfig

T = TypeVar("T")
LayerLists: TypeAlias = list[str] | str | None

# Fields of a config that limit its targets to some layers.
LAYER_FIELDS = ("layers_to_transform", "layers_pattern")
# The index of a layer in a list of layers, at the end of the list's path.
_INDEX = re.compile(r"\.(\d+)(?:\.|$)")


def named(names: str | Collection[str] | None, path: str) -> bool:
    """Return whether `names` match the module at `path`.

    A string is a regular expression for the whole path, a list's entry the whole path or its end
    after a dot.
    """
    if not names:
        return False
    if isinstance(names, str):
        return fullmatch(names, path)
    return path in names or any(path.endswith(f".{name}") for name in names)


def saved(names: Iterable[str] | None, path: str) -> bool:
    """Return whether `names` in `modules_to_save` match the module at `path`, by any end of it.

    So it is in the interface: "classifier" means `pre_classifier` too.
    """
    return path.endswith(tuple(names or ()))


def is_inside(path: str, outer: str) -> bool:
    """Return whether a module is the one at the path `outer`, or inside it."""
    return path == outer or path.startswith(f"{outer}.")


def starts(path: str) -> list[int]:
    """Return the positions at which a path, and its ends after a dot, begin."""
    return [0, *(i + 1 for i, sign in enumerate(path) if sign == ".")]


def layer_index(path: str, pattern: str | Collection[str] | None) -> int | None:
    """Return the index of the layer that `path` lies in, None if it lies in none.

    `pattern` names the list the index counts in (`layers`, `h`, or a regular expression); without
    it the outermost list counts.
    """
    containers = (
        [r"[^.]+"] if not pattern else [pattern] if isinstance(pattern, str) else list(pattern)
    )
    for container in containers:
        for start in starts(path):
            if (match := match_after(container, _INDEX, path, start)) is not None:
                return int(match[1])
    return None


def in_layers(
    path: str, indices: int | Collection[int] | None, pattern: str | Collection[str] | None
) -> bool:
    """Return whether `path` lies in a layer of one of the `indices`; True if there are none."""
    if indices is None or (not isinstance(indices, int) and not indices):
        return True
    return layer_index(path, pattern) in ({indices} if isinstance(indices, int) else set(indices))


def select(
    paths: Iterable[str],
    targets: str | Collection[str],
    excluded: str | Collection[str] | None = None,
    layers: int | Collection[int] | None = None,
    layers_pattern: str | Collection[str] | None = None,
) -> list[str]:
    """Return the targeted paths, in order; a path listed in full is targeted in any layer."""
    whole = () if isinstance(targets, str) else targets
    return [
        path
        for path in paths
        if named(targets, path)
        and not named(excluded, path)
        and (path in whole or in_layers(path, layers, layers_pattern))
    ]


def layer_choice(config: PeftConfig) -> tuple[LayerIndices | None, LayerLists]:
    """Return a config's `layers_to_transform` and `layers_pattern`, None for missing fields."""
    return getattr(config, "layers_to_transform", None), getattr(config, "layers_pattern", None)


def any_layer(config: PeftConfig) -> JsonObject:
    """Return the values of a config's fields by which its targets may lie in any layer."""
    return {name: None for name in LAYER_FIELDS if hasattr(config, name)}


def pattern_value(patterns: Mapping[str, T], path: str, default: T) -> T:
    """Return the value of the first pattern that matches `path`, else `default`.

    A pattern is a regular expression for the whole path or for its end after a dot; `base.patterns`
    describes those that begin with `^`.
    """
    return next(
        (value for pattern, value in patterns.items() if matches_path(pattern, path)), default
    )


def exactly(chosen: Collection[str], paths: Iterable[str]) -> tuple[list[str], str | None]:
    """Return `target_modules` and `exclude_modules` that match the `chosen` of a model's module
    paths and no other.

    Targets are names where all modules of a name are chosen, else whole paths. Other paths that end
    like a target are excluded.
    """
    paths, chosen = list(paths), dict.fromkeys(chosen)
    others = {path.rpartition(".")[2] for path in paths if path not in chosen}
    ends = ((path, path.rpartition(".")[2]) for path in chosen)
    names = sorted({path if end in others else end for path, end in ends})
    besides = [path for path in select(paths, names) if path not in chosen]
    return names, "|".join(map(re.escape, besides)) or None


def patterns(values: Mapping[str, T | None], default: T | None) -> dict[str, T]:
    """Return the patterns by which `pattern_value` gives each path its value: one for each value
    other than the default.
    """
    differing = {
        path: value for path, value in values.items() if value is not None and value != default
    }
    ends = {path[i:] for path in values for i in starts(path)[1:]}
    plain = ends.isdisjoint(differing) and all(re.fullmatch(r"[\w.]+", path) for path in differing)
    return (
        differing if plain else {f"^{re.escape(path)}$": value for path, value in differing.items()}
    )
