# SPDX-License-Identifier: Apache-2.0
"""Checks of a merge: names, options and order of the adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..base.errors import PeftNotSupportedError, PeftTypeError, warn
from ..base.validation import check_adapter

if TYPE_CHECKING:
    from .merges import MergeableLayer


def checked_names(adapter_names: Iterable[str]) -> list[str]:
    """Return adapter names, each once; raise `PeftTypeError` unless they are a list of strings."""
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Iterable):
        raise PeftTypeError(f"`adapter_names`={adapter_names!r} should be a list of strings.")
    adapter_names = list(adapter_names)
    for name in adapter_names:
        check_adapter(name)
    return list(dict.fromkeys(adapter_names))


def check_merge_options(options: Iterable[str], known: Sequence[str], owner: str) -> None:
    """Raise `PeftTypeError` if an option of a merge is not `known`; `owner` is for the message."""
    if unknown := sorted(set(options).difference(known)):
        names = ", ".join(f"`{name}`" for name in ("adapter_names", "safe_merge", *known))
        raise PeftTypeError(
            f"Merging got unexpected keyword arguments: {', '.join(unknown)}. With {owner} it "
            f"takes {names}."
        )


def warn_of_merged(merged: Sequence[str], left: Sequence[str]) -> None:
    """Warn where adapters to be merged are merged already; `left` are the others."""
    if merged and left:
        warn(
            f"Already following adapters were merged {','.join(merged)}. You are now additionally "
            f"merging {','.join(left)}."
        )
    elif merged:
        warn("All adapters are already merged, nothing to do.")


def check_order(layers: Sequence[MergeableLayer], merged: Sequence[str]) -> None:
    """Check that a merge leaves the output as it is. Active adapters apply one after the other, the
    merged ones first; those of an inner layer before those of the layers around it.

    Args:
        layers: The layers around one base layer, from the inside.
        merged: The merged adapters in their order, with those to merge at the end.

    Raises:
        PeftNotSupportedError: An adapter with norms of rows would come before or after others than
            it does in the forward, or after one that adds to the bias, which norms multiply too.
    """
    pairs = [(n, layer) for layer in layers for n in layer.active_adapters if n in layer.scaling]
    active = [name for name, _ in pairs]
    order = [name for name in merged if name in active]
    order += [name for name in active if name not in merged]
    for name, layer in pairs:
        decomposition = layer.decomposition(name)
        if decomposition is None or decomposition.by_columns:
            continue
        before = active[: active.index(name)]
        if set(order[: order.index(name)]) != set(before):
            raise PeftNotSupportedError(
                f"Adapter {name} is decomposed and applies after {', '.join(before) or 'no other'} "
                f"in the forward, where {', '.join(active)} are active; merge them in that order."
            )
        for other, each in [(n, e) for n in before if n in merged for e in layers]:
            if other in each.scaling and each.merge_bias(other, 1.0) is not None:
                raise PeftNotSupportedError(
                    f"Adapter {other} adds to the bias, which the active decomposed adapter {name} "
                    f"multiplies. A DoRA adapter can't be merged after {other}, nor {other} alone."
                )
