# SPDX-License-Identifier: Apache-2.0
"""Former names of a model's modules, for adapters that were saved under them.

transformers renames modules from version to version, and has rules from a tensor's former name to
its present one. A module of a checkpoint that the model has is never renamed; for others these
rules are applied. Text and vision towers lost their inner `text_model.` and `vision_model.`;
modules are found with and without these in any version.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from ..base.containers import walk
from ..base.errors import CheckpointError
from ..integrations.distributed import unwrapped_name

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

# Names that adapters insert between a module's path and the names of its tensors.
_INSERTED = ("base_layer", "original_module", "token_adapter", "modules_to_save")
_TOWERS = ("text_model", "vision_model")
_ROOT = re.compile(r"(base_model\.(model\.)?)?")


class Rules(NamedTuple):
    """The renaming rules of a transformers model inside a model.

    Args:
        root: Its path with a dot at the end, empty for the model itself.
        renamings, converters: Rules of transformers for names, and for tensors.
        prefix: Name of its inner base model.
        names: Names of its tensors.
    """

    root: str
    renamings: list[WeightRenaming]
    converters: list[WeightConverter]
    prefix: str
    names: dict[str, bool]


class Renamed(NamedTuple):
    """A checkpoint with the present names of modules.

    Args:
        paths: Present path of each module by that in the checkpoint; empty if all are the same.
        layers: Paths in the checkpoint of the modules with adapters.
    """

    state: dict[str, Tensor]
    paths: dict[str, str]
    layers: list[str]


class ModuleNames:
    """The present and former names of the modules of a model, with or without adapters in it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.paths = dict.fromkeys(plain_path(path) for path, _ in walk(model, repeated=True))
        self._known: list[Rules] | None = None
        self._flat: dict[str, list[str]] | None = None

    @property
    def _rules(self) -> list[Rules]:
        if self._known is None:
            self._known = list(rules_of(self._model))
        return self._known

    def now(self, path: str, is_adapted: bool = True) -> str | None:
        """Return the present path of a module by its present or former path, None if there is none.

        Raises:
            CheckpointError: The module has an adapter and was fused into another module.
        """
        if path in self.paths:
            return path
        for rules in self._rules:
            if path.startswith(rules.root):
                found = rules.root + _renamed(path[len(rules.root) :], rules, is_adapted)
                if found in self.paths:
                    return found
        if self._flat is None:
            self._flat = {}
            for known in self.paths:
                self._flat.setdefault(_without_towers(known), []).append(known)
        found_there = self._flat.get(_without_towers(path), [])
        return found_there[0] if len(found_there) == 1 else None

    def before(self) -> dict[str, str]:
        """Return the former paths of modules by their present ones, where they differ."""
        result = {}
        for rules in self._rules:
            back = [rule.reverse_transform() for rule in reversed(rules.renamings)]
            for path in self.paths:
                if path.startswith(rules.root):
                    name = f"{path[len(rules.root) :]}.weight"
                    for rule in back:
                        name, _ = rule.rename_source_key(name)
                    old = rules.root + name.removesuffix(".weight")
                    if old != path:
                        result[path] = old
        return result


def names_in_files(model: nn.Module) -> dict[str, str]:
    """Return the paths of a text or vision encoder in other programs' files, by present path."""
    before = ModuleNames(model).before()
    return {
        path: old
        for path, old in before.items()
        if _without_towers(path) == path and _without_towers(old) == path
    }


def plain_path(path: str) -> str:
    """Return the path of a module or tensor without the parts that wrappers and adapters insert."""
    return ".".join(part for part in unwrapped_name(path).split(".") if part not in _INSERTED)


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by plain path, of several the outermost."""
    result: dict[str, nn.Module] = {}
    for path, module in walk(model, repeated=True):
        result.setdefault(plain_path(path), module)
    return result


def renamed_state(
    model: nn.Module, state: Mapping[str, Tensor], containers: Collection[str]
) -> Renamed:
    """Return a checkpoint's tensors with the present names of the model's modules."""
    split = {key: split_key(key, containers) for key in state}
    names = ModuleNames(model)
    same = Renamed(dict(state), {}, [])
    if all(path in names.paths for _, path, _ in split.values()):
        return same
    layers = {
        path: None
        for _, path, end in split.values()
        if path and end.split(".")[1].startswith(tuple(containers))
    }
    found = {
        path: names.now(path, is_adapted=path in layers) or path for _, path, _ in split.values()
    }
    result = {f"{root}{found[path]}{end}": state[key] for key, (root, path, end) in split.items()}
    if len(result) < len(state):  # several keys of the checkpoint would be the same
        return same
    return Renamed(result, found, list(layers))


def split_key(key: str, containers: Collection[str]) -> tuple[str, str, str]:
    """Split a checkpoint's key into prefix, module path and the rest."""
    root = _ROOT.match(key)
    assert root is not None
    parts = key[root.end() :].split(".")
    at = container_at(parts, containers)
    end = len(parts) - 1 if at is None else at
    while end and parts[end - 1] in _INSERTED:
        end -= 1
    return (
        root.group(),
        ".".join(parts[:end]),
        "".join(f".{part}" for part in parts[end:]).removeprefix("" if end else "."),
    )


def container_at(parts: Sequence[str], containers: Collection[str]) -> int | None:
    """Return the position of a container among the parts of a key. Files may have its tensors in
    another form, `<container>_topk_…`.
    """
    for i, part in enumerate(parts):
        if any(part == name or part.startswith(f"{name}_topk") for name in containers):
            return i
    return None


def _without_towers(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _TOWERS)


def rules_of(model: nn.Module) -> Iterator[Rules]:
    """Yield the rules of each outermost transformers model in a model, if there are any."""
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if kind is None:
        return
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:
        return
    roots: list[str] = []
    for path, module in walk(model):
        if not isinstance(module, kind) or any(path.startswith(root) for root in roots):
            continue
        roots.append(root := f"{path}." if path else "")
        rules = get_model_conversion_mapping(module, add_legacy=False)
        names = {
            f"{plain_path(inner)}.weight": True for inner, part in walk(module) if part._parameters
        }
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        yield Rules(
            plain_path(root.rstrip(".")) + "." * bool(path),
            renamings,
            converters,
            module.base_model_prefix,
            names,
        )


def _renamed(path: str, rules: Rules, is_adapted: bool) -> str:
    """Return a module's path after all rules, which are for names of tensors."""
    from transformers.core_model_loading import rename_source_key

    name, fused = rename_source_key(
        f"{path}.weight", rules.renamings, rules.converters, rules.prefix, rules.names
    )
    if fused is not None and not is_adapted:
        return path
    if fused is not None:
        raise CheckpointError(
            f"`{rules.root}{path}` is a part of `{rules.root}{name}` in the installed version of "
            "transformers, where an adapter of the part can't be used; nothing was loaded. "
            "Use the version that the adapter was written with."
        )
    return name.removesuffix(".weight")
