# SPDX-License-Identifier: Apache-2.0
"""Merging the adapters of one layer into its base weight."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ..base.errors import PeftNotSupportedError
from ..integrations.accelerate import loaded_weights
from ..ops.exact_merge import Recipe, by_itself, unchanged
from . import dora
from .merges import Merge, Merges, Options


class _Layer(dora.DecomposableLayer, Protocol):
    """What this file reads of a layer."""

    _merges: Merges

    def get_delta_weight(self, adapter_name: str, **options: object) -> Tensor: ...
    def delta_recipe(self, adapter_name: str, **options: object) -> Recipe: ...
    def merge_factor(self, adapter_name: str, scale: float) -> Tensor | None: ...
    def merge_bias(self, adapter_name: str, scale: float) -> Tensor | None: ...
    def note_merges(self, adapter_names: list[str]) -> None: ...


def check_order(layer: _Layer, adapter_names: Collection[str]) -> None:
    """Check that a merge leaves the layer's output as it is. Active adapters apply one after the
    other, the merged ones first; those of an inner layer before those of the layers around it.

    Args:
        layer: The layer.
        adapter_names: The adapters to merge, after those that inner layers merge first.

    Raises:
        PeftNotSupportedError: An adapter with norms of rows would come before or after others than
            it does in the forward, or after one that adds to the bias, which norms multiply too.
    """
    layers = _stack(layer)
    active = [name for each in layers for name in each.active_adapters if name in each.scaling]
    by_rows = [
        name
        for each in layers
        for name in each.active_adapters
        if name in each.scaling
        and (own := each.decomposition(name)) is not None
        and not own.by_columns
    ]
    merged = [*(merge.name for merge in layer._merges.entries), *adapter_names]
    order = [name for name in merged if name in active]
    order += [name for name in active if name not in merged]
    for name in by_rows:
        before = active[: active.index(name)]
        if set(order[: order.index(name)]) != set(before):
            raise PeftNotSupportedError(
                f"Adapter {name} is decomposed and applies after "
                f"{', '.join(before) or 'no other'} in the forward, where "
                f"{', '.join(active)} are active; merge them in that order."
            )
        for other, each in [(n, e) for n in before if n in merged for e in layers]:
            if other in each.scaling and each.merge_bias(other, 1.0) is not None:
                raise PeftNotSupportedError(
                    f"Adapter {other} adds to the bias, which the active decomposed adapter {name} "
                    f"multiplies. A DoRA adapter can't be merged after {other}, nor {other} alone."
                )


def _stack(layer: _Layer) -> list[_Layer]:
    """Return the layers around one base layer, from the inside: those inside a layer, and those
    around it that have merged an adapter.
    """
    layers: list[_Layer] = []
    for outermost in (layer, *(merge.layer for merge in layer._merges.entries)):
        chain: list[_Layer] = []
        module: Any = outermost
        while hasattr(module, "_merges"):
            chain.insert(0, module)
            module = module.base_layer
        layers = max(layers, chain, key=len)
    return layers


def not_merged(layer: _Layer, options: Mapping[str, Options]) -> dict[str, Options]:
    """Return those of the layer's adapters to merge that are not merged yet, with their options.

    Raises:
        PeftValueError: One is merged with other options.
    """
    missing = layer._merges.missing(layer, options)
    return {name: own for name, own in missing.items() if name in layer.scaling}


def merge(layer: _Layer, options: Mapping[str, Options], safe_merge: bool = False) -> None:
    """Merge adapters that are not merged, each with its own options; all or none.

    Raises:
        PeftValueError: `safe_merge` found a broken weight; nothing was changed.
    """
    if not options:
        return
    base = layer.get_base_layer()
    with by_itself(_weight(base).device):
        first = None if layer._merges.entries else next(iter(options))
        new = [_merge_of(layer, name, own, name == first) for name, own in options.items()]
    layer._merges.add(base, new, safe_merge)


def suspended(layer: _Layer) -> set[str]:
    """Return the adapters that were merged before the adapters were disabled."""
    return layer._merges.suspended(layer)


def lacks_suspended(layer: _Layer) -> bool:
    """Return whether the forward would not compute one of the suspended adapters."""
    return bool(suspended(layer) - set(layer.active_adapters))


def resume(layer: _Layer, wanted: bool = True) -> None:
    """Merge the suspended adapters again, or forget them."""
    if names := suspended(layer):
        with loaded_weights(layer, names):  # type: ignore[arg-type]
            layer._merges.resume(layer, wanted)


def _merge_of(layer: _Layer, adapter_name: str, options: Options, is_first: bool) -> Merge:
    """Return the merge of an adapter as it is now.

    Args:
        layer: The layer.
        adapter_name: The adapter.
        options: Options of its delta.
        is_first: Nothing is merged into the weight before it.
    """
    scale = float(layer.scaling[adapter_name])
    factor = layer.merge_factor(adapter_name, scale)
    delta = layer.delta_recipe(adapter_name, **options).copied()
    decomposition = layer.decomposition(adapter_name)
    by_columns = decomposition is not None and decomposition.by_columns
    if factor is not None and by_columns and not is_first:
        dense = layer.get_delta_weight(adapter_name, **options)
        delta, factor = Recipe(unchanged, (dora.change(layer, factor, dense),)), None
    bias = layer.merge_bias(adapter_name, scale)
    return Merge(layer, adapter_name, options, delta, factor, bias)


def _weight(base: nn.Module) -> Tensor:
    return base.weight  # type: ignore[return-value]
