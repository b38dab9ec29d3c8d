# SPDX-License-Identifier: Apache-2.0
"""Targets that share a weight with other modules: warn, or tie the adapters of all of them
(`ensure_weight_tying`).

Of tied modules the first in the model's order, the token embedding, is the owner: the adapter's
parameters are there, and the others follow it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from ..base.errors import PeftNotSupportedError, warn
from ..config import PeftConfig
from . import replication, tied_weights
from .base_layer import innermost


class _Plan(Protocol):
    """The members of a plan that this file reads."""

    targets: dict[str, nn.Module]
    trainable_copies: dict[str, nn.Module]
    places: dict[str, list[str]]
    ties: dict[str, str]

    @property
    def config(self) -> PeftConfig:
        """Return the adapter's config."""


def is_wanted(config: PeftConfig) -> bool:
    """Return whether a config asks for tied adapters."""
    return bool(getattr(config, "ensure_weight_tying", False))


def owners(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the owner of each module that shares its weight, by path; owners are their own."""
    by_weight: dict[int, list[str]] = {}
    seen: set[int] = set()
    for path, module in modules.items():
        inner = original(module)
        weight = inner._parameters.get("weight")
        if weight is not None and id(inner) not in seen:
            by_weight.setdefault(id(weight), []).append(path)
            seen.add(id(inner))
    groups = [paths for paths in by_weight.values() if len(paths) > 1]
    return {path: paths[0] for paths in groups for path in paths}


def original(module: nn.Module) -> nn.Module:
    """Return a module of the base model, inside adapted layers and wrappers."""
    while (inner := getattr(module, "original_module", None)) is not None:
        module = inner
    return innermost(module)


def add_tied_copies(plan: _Plan, modules: Mapping[str, nn.Module]) -> None:
    """Add the modules that share a weight with a plan's copies, if its config ties adapters."""
    if is_wanted(plan.config):
        plan.trainable_copies, plan.ties = _with_tied(plan.trainable_copies, modules)


def add_tied_targets(plan: _Plan, modules: Mapping[str, nn.Module]) -> None:
    """Let the modules that share a weight with a plan's targets follow an embedding among them, if
    its config ties adapters.

    Raises:
        PeftNotSupportedError: No embedding has the weight, or a module of another kind has it too.
    """
    if not is_wanted(plan.config):
        return
    targets, followers = _with_tied(plan.targets, modules)
    for path, owner in followers.items():
        kind = original(modules[path])
        if not isinstance(original(modules[owner]), nn.Embedding) or not isinstance(
            kind, (nn.Embedding, nn.Linear)
        ):
            raise PeftNotSupportedError(
                f"`ensure_weight_tying`=True: `{path}` shares a weight with `{owner}`, and "
                "adapters can be tied of an embedding and the embeddings or linear layers after "
                "it; leave out the module or the option."
            )
    plan.targets = {path: m for path, m in targets.items() if path not in followers}
    plan.ties |= followers


def _with_tied(
    chosen: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return chosen modules and all that share a weight with them, and followers with owners.

    An owner comes before those that follow it.
    """
    own = owners(modules)
    groups = {own[path] for path in chosen if path in own}
    ties = {path: owner for path, owner in own.items() if owner in groups and path != owner}
    paths = [path for path in modules if path in chosen or own.get(path) in groups]
    return {path: modules[path] for path in paths}, ties


def warn_of_ties(model: nn.Module, plan: _Plan) -> None:
    """Warn of targets with a weight that another module uses without the adapter."""
    holders = tied_weights.owners(model)
    in_same_list = replication.same_list(model)
    tied = {*plan.ties, *plan.ties.values()}
    for path, module in {**plan.targets, **plan.trainable_copies}.items():
        for parameter in module.parameters(recurse=False) if path not in tied else ():
            places = plan.places.get(path, [path])
            others = sorted(set(holders.get(id(parameter), ())).difference(places))
            others = [other for other in others if not in_same_list(path, other)]
            if others:
                remedy = "no implementation exists to tie the adapters."
                if hasattr(plan.config, "ensure_weight_tying"):
                    remedy = "`ensure_weight_tying=True` ties the adapters."
                warn(
                    f"`{path}` shares a weight with {', '.join(f'`{other}`' for other in others)}, "
                    f"which will go on using it as it is: {remedy} `merge_adapter` changes it "
                    "in both places, `merge_and_unload` makes two weights of it."
                )


def tie_copies(copies: Mapping[str, nn.Module], ties: Mapping[str, str]) -> None:
    """Let trainable copies share the weight of their owner's copy."""
    for path, owner in ties.items():
        if path in copies and owner in copies:
            copies[path].weight = copies[owner].weight
