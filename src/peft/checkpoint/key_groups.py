# SPDX-License-Identifier: Apache-2.0
"""The keys of a weights file by module, without a model: for files of any program and method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..base.constants import ROOT
from ..base.registry import PEFT_TYPE_TO_TUNER_MAPPING, PeftType
from .format import ModuleShape

# Tensors of one value, and norms, that programs write beside a module's factors.
_BESIDE = ("alpha", "dora_scale", "scalar")
# Parts that a tensor's name has at most.
_LONGEST = 8


@dataclass
class KeyGroups:
    """The keys of a file.

    Attributes:
        modules: Keys by the name of their tensor, by the part of the keys before it.
        methods: The method of each of `modules`.
        shared: Keys of tensors that all modules share.
        others: The other keys: of full modules, biases, embedding rows, or unknown.
    """

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def group_keys(keys: Iterable[str]) -> KeyGroups:
    """Group keys by module, by the names of tensors of all methods.

    Example:
        >>> import peft  # which registers the methods
        >>> groups = group_keys(["te.lora_down.weight", "te.alpha", "head.weight"])
        >>> groups.modules["te"]["lora_A.weight"], groups.methods["te"], groups.others
        ('te.lora_down.weight', 'LORA', ['head.weight'])
    """
    names, result = _names(), KeyGroups()
    for key in keys:
        method, stem, name = _split(key, names)
        if method is None:
            result.others.append(key)
        elif stem in ("", ROOT[:-1]):
            result.shared.append(key)
        else:
            result.modules.setdefault(stem, {})[name] = key
            result.methods[stem] = method
    others, result.others = result.others, []
    for key in others:
        stem, _, name = key.rpartition(".")
        if stem in result.modules and name in _BESIDE:
            result.modules[stem][name] = key
        else:
            result.others.append(key)
    return result


def module_shapes(
    groups: KeyGroups, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, ModuleShape | None]:
    """Return the size of each module, from the shapes of the tensors by key."""
    common = {key.rpartition(".")[2]: shapes[key] for key in groups.shared}
    result = {}
    for stem, keys in groups.modules.items():
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(groups.methods[stem])]
        own = {name: shapes[key] for name, key in keys.items()}
        try:
            result[stem] = tuner.checkpoint_format.module_shape({**common, **own})
        except IndexError:  # a tensor of fewer axes than the method's
            result[stem] = None
    return result


def _names() -> dict[str, tuple[str, str | None]]:
    """Return the method of each container and of each other program's name for a tensor, and for
    the latter the name here.
    """
    result: dict[str, tuple[str, str | None]] = {}
    for peft_type, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        method = PeftType(peft_type).value
        for name in (*tuner.tuner_layer_cls.container_names, *tuner.shared_parameter_names):
            result[name] = method, None
        for theirs, ours in tuner.checkpoint_format.other_names.items():
            result[theirs] = method, ours
    return result


def _split(key: str, names: Mapping[str, tuple[str, str | None]]) -> tuple[str | None, str, str]:
    """Return a key's method, the part before the tensor's name, and that name here."""
    parts = key.split(".")
    for i, part in enumerate(parts):
        # To join the rest at each part of a long key would take time quadratic in its length.
        ends = (part, ".".join(parts[i:])) if len(parts) - i <= _LONGEST else (part,)
        for name in ends:
            if name in names:
                method, ours = names[name]
                return method, ".".join(parts[:i]), ours or ".".join(parts[i:])
    return None, "", ""
