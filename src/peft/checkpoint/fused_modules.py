# SPDX-License-Identifier: Apache-2.0
"""Former modules of a model that are now a part of one of its parameters.

transformers 4 had a linear layer for each projection of each expert; transformers 5 has them in
stacks `[experts, …]`, and rules that tell how tensors of the former become one of the latter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from ..base.containers import walk
from .renamed_modules import Rules, plain_path, rules_of

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightTransform


class FusedModule(NamedTuple):
    """The place of a former module in a parameter.

    Args:
        module: Path of the module that has the parameter.
        parameter: The parameter's name there.
        part: Which of the parts that lie one below the other in a matrix of the stack.
        expert: The expert's index.
    """

    module: str
    parameter: str
    part: int
    expert: int

    @property
    def key(self) -> str:
        """The parameter's path."""
        return f"{self.module}.{self.parameter}"


def fused_modules(model: nn.Module) -> dict[str, FusedModule]:
    """Return the former modules of a model, with or without adapters, that are parts of stacks now,
    by the paths that they had.
    """
    return {path: place for rules in rules_of(model) for path, place in _of_rules(model, rules)}


def _of_rules(model: nn.Module, rules: Rules) -> Iterator[tuple[str, FusedModule]]:
    back = [rule.reverse_transform() for rule in reversed(rules.renamings)]
    converters = [rule for rule in rules.converters if stacks_rows(rule)]
    for path, module in walk(model) if converters else ():
        for name, value in module._parameters.items():
            if value is None or value.dim() != 3:
                continue
            owner = plain_path(path)
            key = f"{owner}.{name}".removeprefix(rules.root)
            for rule in converters:
                target = rule.target_patterns[0].replace("\\", "")
                if not f".{key}".endswith(target if target.startswith(".") else f".{target}"):
                    continue
                for part, source in enumerate(rule.source_patterns):
                    for expert in range(value.shape[0]):
                        old = source.replace("\\", "").replace("*", str(expert))
                        old = f".{key}".removesuffix(target) + old
                        for renaming in back:
                            old, _ = renaming.rename_source_key(old)
                        former = rules.root + old.removeprefix(".").removesuffix(".weight")
                        yield former, FusedModule(owner, name, part, expert)


def stacks_rows(rule: WeightTransform) -> bool:
    """Return whether a rule stacks the weights of experts, and puts those of several layers one
    below the other.
    """
    operations = getattr(rule, "operations", [])  # none, if a rule only renames
    kinds = [type(operation).__name__ for operation in operations]
    if len(rule.target_patterns) != 1 or not all("*" in p for p in rule.source_patterns):
        return False
    if len(rule.source_patterns) == 1:
        return kinds == ["MergeModulelist"]
    return kinds == ["MergeModulelist", "Concatenate"] and operations[1].dim == 1
