# SPDX-License-Identifier: Apache-2.0
"""Choose the adapter for a function that was called without an adapter's name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import nn

from ..base.containers import walk
from ..base.errors import PeftTypeError, PeftValueError
from ..base.suggestions import adapters_there
from ..base.validation import check_adapter
from .layer import BaseTunerLayer


def adapter_of(
    model: nn.Module, name: str | None, layer_class: type[BaseTunerLayer], kind: str
) -> str:
    """Return the name of an adapter among those of layers of a class.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        name: The given name; None stands for "default", else the only active, else the only
            adapter.
        layer_class: Class of the layers.
        kind: Words after an adapter's name in messages, " of LoKr".

    Raises:
        PeftTypeError: The name is not a string, or `model` not a module.
        PeftValueError: There is no such adapter, or the choice is ambiguous.
    """
    if not isinstance(model, nn.Module):
        raise PeftTypeError(
            f"`model`={model!r} must be a module of torch with adapters, not "
            f"{type(model).__name__}."
        )
    layers = [layer for _, layer in walk(model) if isinstance(layer, layer_class)]
    known = dict.fromkeys(own for layer in layers for own in layer.scaling)
    return adapter_meant(name, known, active_in(layers), kind)


def adapter_meant(
    name: str | None, known: Collection[str], active: Collection[str], kind: str = ""
) -> str:
    """Return an adapter's name from the `known` and the `active` ones, as `adapter_of` does."""
    if name is not None:
        check_adapter(name)
        if name in known:
            return name
    if name is not None or not known:
        named = "" if name is None else f" {name!r}"
        raise PeftValueError(
            f"The model has no adapter{named}{kind}; there are {adapters_there(name, known)}"
        )
    if "default" in known:
        return "default"
    meant = [own for own in known if own in active] or list(known)
    if len(meant) > 1:
        raise PeftValueError(
            f"The model has no adapter 'default'{kind}, and several could be meant; pass "
            f"`adapter_name`, one of {adapters_there('', meant)}"
        )
    return meant[0]


def named_or_active(name: str | None, active: Sequence[str], known: Collection[str]) -> str:
    """Return a given adapter's name, else that of the only active one.

    Raises:
        PeftTypeError: The name is not a string.
        PeftValueError: There is no such adapter; or there is no name, and not one active adapter.
    """
    if name is None:
        if len(active) != 1:
            raise PeftValueError(f"Name one adapter: the active ones are {list(active)}.")
        name = active[0]
    check_adapter(name, known)
    return name


def active_in(layers: Iterable[BaseTunerLayer]) -> set[str]:
    """Return the names of the adapters that are active in any of some layers."""
    return {name for layer in layers for name in layer.active_adapters}
