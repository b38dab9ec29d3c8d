# SPDX-License-Identifier: Apache-2.0
"""Tied weights of a transformers model that differ after adapters are removed.

A loader ties weights again if the config says so. So the config is changed, and other weights that
the model ties by the same flag get copies, since a file would lack them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..base.containers import AdapterContainer, WeightFollower, walk
from ..base.errors import warn

_FLAG = "tie_word_embeddings"


class Pair(NamedTuple):
    """Two parameters that a module ties, by their names in it."""

    part: nn.Module
    target: str
    source: str

    @property
    def is_apart(self) -> bool:
        """True if their values differ."""
        one, two = self.part.get_parameter(self.target), self.part.get_parameter(self.source)
        if one is two:
            return False
        return one.shape != two.shape or (
            not one.is_meta and not two.is_meta and not torch.equal(one, two.to(one))
        )

    def separate(self) -> None:
        """Give the target a copy of its own."""
        one = self.part.get_parameter(self.target)
        if one is self.part.get_parameter(self.source):
            path, _, name = self.target.rpartition(".")
            fresh = nn.Parameter(one.detach().clone(), one.requires_grad)
            setattr(self.part.get_submodule(path), name, fresh)


def is_tied(model: nn.Module) -> bool:
    """Return whether a model's config says that it ties weights."""
    return getattr(getattr(model, "config", None), _FLAG, False) is True


def owners(model: nn.Module) -> dict[int, list[str]]:
    """Return the paths of the modules that hold a parameter, by its identity, without adapters and
    without layers that follow another's.
    """
    found: dict[int, list[str]] = {}
    for path, module in walk(model, repeated=True, closed=(WeightFollower,)):
        if not isinstance(module, AdapterContainer):
            for parameter in module._parameters.values():
                found.setdefault(id(parameter), []).append(path)
    return found


def can_tell(model: Any) -> bool:
    """Return whether the flag can be set to False: the config keeps it, and no forward reads it."""
    kind = type(model.config)
    try:
        known = model.config
        if hasattr(kind, "from_dict"):
            known = kind.from_dict({**model.config.to_dict(), _FLAG: False})
        source = inspect.getsource(type(model).forward)
    except (OSError, TypeError, ValueError):
        return True
    return (known is model.config or getattr(known, _FLAG, False) is False) and _FLAG not in source


def settle(model: Any, was_tied: bool) -> None:
    """Update a model's config if tied weights differ now, after training or merging one.

    `was_tied` is what its config said before.
    """
    if not was_tied:
        return
    configs = [model.config, *_nested(model.config)]
    before = [getattr(config, _FLAG) for config in configs]
    model.config.tie_word_embeddings = True  # for the model to say what it ties
    pairs = list(_pairs(model))
    model.config.tie_word_embeddings = before[0]
    if not any(pair.is_apart for pair in pairs):
        return
    if not can_tell(model):
        names = ", ".join(f"`{pair.target}`" for pair in pairs if pair.is_apart)
        warn(
            f"{names} came apart from what the model ties it to; a loader that does not compare "
            "the two ties them again."
        )
        return
    if before[0]:
        warn(f"Setting `{_FLAG}` to False in the model's config: weights that it ties are two now.")
    for config in configs:
        setattr(config, _FLAG, False)
    for pair in pairs:
        pair.separate()


def _pairs(model: nn.Module) -> Iterator[Pair]:
    """Yield the ties that a model and its modules declare."""
    for part in model.modules():
        expand = getattr(part, "get_expanded_tied_weights_keys", None)
        tied = expand(all_submodels=False) if expand is not None else {}
        named = part.named_parameters(remove_duplicate=False) if tied else ()
        known = {name for name, _ in named}
        yield from (Pair(part, *pair) for pair in tied.items() if known.issuperset(pair))
    if not hasattr(model, "get_expanded_tied_weights_keys") and hasattr(
        model, "get_output_embeddings"
    ):
        names = {
            id(p): name
            for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))
        }
        ends = (getattr(model, f"get_{end}_embeddings")() for end in ("output", "input"))
        target, source = (names.get(id(getattr(end, "weight", None))) for end in ends)
        if target and source and target != source:
            yield Pair(model, target, source)


def _nested(config: object) -> Iterator[object]:
    """Yield the configs inside a config that have the flag set."""
    for name, value in vars(config).items():
        if name != "_parent" and hasattr(value, "to_dict") and getattr(value, _FLAG, False) is True:
            yield value
