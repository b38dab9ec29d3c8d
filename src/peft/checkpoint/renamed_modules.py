# SPDX-License-Identifier: Apache-2.0
"""Names that the modules of a model had before, for adapters written for them under those.

transformers renames modules from version to version, and has rules that turn a tensor's old name
into its present one. A module of a checkpoint that the model has is never renamed; for others these
rules are asked. Text and vision towers lost their inner `text_model.` and `vision_model.`; with
them or without, they are found in any version.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..base.containers import walk
from ..base.errors import CheckpointError
from ..integrations.distributed import unwrapped_name

# What adapters put between a module's path and the names of its tensors.
_WRAPPERS = ("base_layer", "original_module", "token_adapter", "modules_to_save")
_TOWERS = ("text_model", "vision_model")
_ROOT = re.compile(r"(base_model\.(model\.)?)?")


class _Rules(NamedTuple):
    """The rules for a transformers model inside a model.

    Args:
        place: Its path, with a dot after it unless it is the model itself.
        renamings, converters: Rules of transformers: names alone, and tensors.
        prefix: What its own inner model is called.
        names: Names of its tensors.
    """

    place: str
    renamings: list[Any]
    converters: list[Any]
    prefix: str
    names: dict[str, bool]


class Renamed(NamedTuple):
    """A checkpoint under the present names.

    Args:
        state: Its tensors.
        paths: The present path of each module by that in the checkpoint; empty if they are the
            same.
        layers: Those of the modules that have adapters, by the path in the checkpoint.
    """

    state: dict[str, Tensor]
    paths: dict[str, str]
    layers: list[str]


class ModuleNames:
    """The modules of a model by the names that they have, and that they had.

    Args:
        model: The model, with or without adapters in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.paths = dict.fromkeys(plain_path(path) for path, _ in walk(model, repeated=True))
        self._known: list[_Rules] | None = None
        self._flat: dict[str, list[str]] | None = None

    @property
    def _rules(self) -> list[_Rules]:
        if self._known is None:
            self._known = list(_rules(self._model))
        return self._known

    def now(self, path: str, is_adapted: bool = True) -> str | None:
        """The path that the model has for a module of this one, or of this one before; None if it
        has none.

        Raises:
            CheckpointError: The module has an adapter and is a part of another one now.
        """
        if path in self.paths:
            return path
        for rules in self._rules:
            if path.startswith(rules.place):
                found = rules.place + _renamed(path[len(rules.place) :], rules, is_adapted)
                if found in self.paths:
                    return found
        if self._flat is None:
            self._flat = {}
            for known in self.paths:
                self._flat.setdefault(_without_towers(known), []).append(known)
        found_there = self._flat.get(_without_towers(path), [])
        return found_there[0] if len(found_there) == 1 else None

    def before(self) -> dict[str, str]:
        """The path that each module had before, as far as that is another."""
        result = {}
        for rules in self._rules:
            back = [rule.reverse_transform() for rule in reversed(rules.renamings)]
            for path in self.paths:
                if path.startswith(rules.place):
                    name = f"{path[len(rules.place) :]}.weight"
                    for rule in back:
                        name, _ = rule.rename_source_key(name)
                    old = rules.place + name.removesuffix(".weight")
                    if old != path:
                        result[path] = old
        return result


def names_in_files(model: nn.Module) -> dict[str, str]:
    """What files of other programs call the modules of a text or vision encoder that is by itself:
    with the `text_model.` or `vision_model.` that it had before, by the path that each has.
    """
    before = ModuleNames(model).before()
    return {
        path: old
        for path, old in before.items()
        if _without_towers(path) == path and _without_towers(old) == path
    }


def plain_path(path: str) -> str:
    """A module's path without what wrappers and adapters put into it."""
    return ".".join(part for part in unwrapped_name(path).split(".") if part not in _WRAPPERS)


def renamed_state(
    model: nn.Module, state: Mapping[str, Tensor], holders: Collection[str]
) -> Renamed:
    """A checkpoint's tensors under the names that the model's modules have now.

    Args:
        model: The base model.
        state: Tensors by checkpoint key.
        holders: Names of the containers that an adapter has in its layers.

    Raises:
        CheckpointError: A module is a part of another one now.
    """
    places = {key: _place(key, holders) for key in state}
    names = ModuleNames(model)
    same = Renamed(dict(state), {}, [])
    if all(path in names.paths for _, path, _ in places.values()):
        return same
    layers = {
        path: None
        for _, path, end in places.values()
        if path and end.split(".")[1].startswith(tuple(holders))
    }
    found = {
        path: names.now(path, is_adapted=path in layers) or path for _, path, _ in places.values()
    }
    result = {f"{root}{found[path]}{end}": state[key] for key, (root, path, end) in places.items()}
    if len(result) < len(state):  # two modules of the checkpoint would be one
        return same
    return Renamed(result, found, list(layers))


def _place(key: str, holders: Collection[str]) -> tuple[str, str, str]:
    """A checkpoint's key in three parts: what it begins with, a module's path, and what follows."""
    root = _ROOT.match(key)
    assert root is not None
    parts = key[root.end() :].split(".")
    ends = (
        i
        for i, part in enumerate(parts)
        if any(part == name or part.startswith(f"{name}_topk") for name in holders)
    )
    end = next(ends, len(parts) - 1)
    while end and parts[end - 1] in _WRAPPERS:
        end -= 1
    return (
        root.group(),
        ".".join(parts[:end]),
        "".join(f".{part}" for part in parts[end:]).removeprefix("" if end else "."),
    )


def _without_towers(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _TOWERS)


def _rules(model: nn.Module) -> Iterator[_Rules]:
    """The rules for each outermost transformers model in a model; none for versions that have no
    such rules.
    """
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if kind is None:
        return
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:
        return
    inside: list[str] = []
    for path, module in walk(model):
        if not isinstance(module, kind) or any(path.startswith(place) for place in inside):
            continue
        inside.append(place := f"{path}." if path else "")
        rules = get_model_conversion_mapping(module, add_legacy=False)
        names = {
            f"{plain_path(inner)}.weight": True for inner, part in walk(module) if part._parameters
        }
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        yield _Rules(
            plain_path(place.rstrip(".")) + "." * bool(path),
            renamings,
            converters,
            module.base_model_prefix,
            names,
        )


def _renamed(path: str, rules: _Rules, is_adapted: bool) -> str:
    """A module's path after all rules, which are for names of tensors."""
    from transformers.core_model_loading import rename_source_key

    name, fused = rename_source_key(
        f"{path}.weight", rules.renamings, rules.converters, rules.prefix, rules.names
    )
    if fused is not None and not is_adapted:
        return path
    if fused is not None:
        raise CheckpointError(
            f"`{rules.place}{path}` is a part of `{rules.place}{name}` in the installed version of "
            "transformers, and an adapter of "
            "the part is none of the whole; nothing was loaded. Use the version that the adapter "
            "was written with."
        )
    return name.removesuffix(".weight")
