# SPDX-License-Identifier: Apache-2.0
"""Merging adapters into the weight of one base layer, and unmerging them exactly.

`Merges` keeps, for each merged adapter, copies of its small factors, and the few elements of the
weight that subtracting the delta would not restore. The original of a quantized weight is kept as
stored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from ..base.errors import PeftRuntimeError, PeftValueError
from ..integrations.distributed import gathered_tensor, is_managed, take_back
from ..integrations.quantization import StorageFormat
from ..ops import exact_merge
from ..ops.exact_merge import Correction, Recipe, Written
from . import dora
from .base_layer import AdaptedLayer
from .weights import base_weight, put_weight, quantized_format, stored_weight

T = TypeVar("T")

Options: TypeAlias = Mapping[str, Any]
"""Options of an adapter's delta (`task_id`), by name."""


class MergeableLayer(AdaptedLayer, Protocol):
    """The members of a layer that merging uses."""

    base_layer: nn.Module
    merged_adapters: list[str]

    @property
    def scaling(self) -> Mapping[str, float]:
        """The scale of each adapter."""

    @property
    def active_adapters(self) -> Sequence[str]:
        """Names of the active adapters."""

    @property
    def holder(self) -> nn.Module:
        """The module whose `weight` is merged into."""

    def get_delta_weight(self, adapter_name: str, **options: Any) -> Tensor:
        """Return the delta of the base weight."""

    def delta_recipe(self, adapter_name: str, **options: Any) -> Recipe:
        """Return the delta as a function of small tensors."""

    def decomposition(self, adapter_name: str) -> dora.Decomposition | None:
        """Return an adapter's norms, None if it is not decomposed."""

    def merge_factor(self, adapter_name: str, scale: float) -> Tensor | None:
        """Return the factor on the sum of weight and delta."""

    def merge_bias(self, adapter_name: str, scale: float) -> Tensor | None:
        """Return the tensor that is added to the bias."""

    def note_merges(self, adapter_names: list[str]) -> None:
        """Record the adapters that are merged now."""


class Merge(NamedTuple):
    """One adapter that is merged into a weight.

    Args:
        layer: The layer that has the adapter.
        name: The adapter's name.
        options: Options of its delta.
        delta: The merged delta; None if a loaded state dict had it merged.
        factor: The factor on the sum of weight and delta, None for one.
        bias: The tensor that was added to the bias, None for nothing.
        correction: Undoes the sum, where the original weight is not kept.
    """

    layer: MergeableLayer
    name: str
    options: Options
    delta: Recipe | None
    factor: Tensor | None = None
    bias: Tensor | None = None
    correction: Correction | None = None

    @property
    def is_known(self) -> bool:
        """True if it was merged here, and so can be unmerged."""
        return self.delta is not None

    def dense(self, device: torch.device) -> Tensor:
        """Compute the delta that was merged."""
        assert self.delta is not None
        return self.delta.on(device).weight()


class Bias(NamedTuple):
    """A base layer's bias with merges: the sum to write, None to leave it, and the original."""

    total: Tensor | None
    original: Tensor | None


class Merges:
    """The merges into one base layer's weight, in their order, shared by all layers around it.

    Attributes:
        entries: The merges.
    """

    def __init__(self) -> None:
        self.entries: list[Merge] = []
        self._suspended: list[Merge] = []
        self._original: object = None  # the stored form of a quantized weight
        self._bias: Tensor | None = None  # the original, once something was added to it
        self._written: Written | None = None

    def merge(self, layer: MergeableLayer, options: Mapping[str, Options], check: bool) -> None:
        """Merge adapters of a layer that are not merged, each with its own options; all or none.

        Raises:
            PeftValueError: With `check`, a weight on the way is not finite; nothing is changed.
        """
        if not options:
            return
        base = layer.holder
        with exact_merge.isolated(_weight(base).device):
            first = None if self.entries else next(iter(options))
            new = [_merge_of(layer, n, chosen, n == first) for n, chosen in options.items()]
        self.add(base, new, check)

    def add(self, base: nn.Module, new: Sequence[Merge], check: bool = False) -> None:
        """Add merges to the base layer's weight; all or none, as `merge`."""
        self._rewrite(base, len(self.entries), list(new), check)

    def remove(self, base: nn.Module, names: Collection[str], layer: MergeableLayer) -> list[Merge]:
        """Unmerge adapters of a layer, and return their merges for `add`. The weight is then bit
        for bit as if only the other adapters had been merged.

        Raises:
            PeftRuntimeError: A loaded state dict had an adapter merged and lacks the original
                weight.
        """
        return self._remove(base, lambda merge: merge.layer is layer and merge.name in names)

    def _remove(self, base: nn.Module, is_gone: Callable[[Merge], bool]) -> list[Merge]:
        gone = [merge for merge in self.entries if is_gone(merge)]
        if gone:
            first = self.entries.index(gone[0])
            left = [merge for merge in self.entries[first:] if not is_gone(merge)]
            self._rewrite(base, first, left, False)
        return gone

    def suspend(self, layer: MergeableLayer) -> None:
        """Unmerge all adapters of a layer until they are resumed. An adapter that was suspended
        before, and merged again since, is resumed as it was merged last.
        """
        taken = self.remove(layer.holder, layer.merged_adapters, layer)
        self.drop_suspended(layer, *(merge.name for merge in taken))
        self._suspended += taken

    def resume(self, layer: MergeableLayer, wanted: bool) -> None:
        """Merge the layer's suspended adapters again, or forget them."""
        again = [
            merge
            for merge in self._suspended
            if merge.layer is layer and merge.name not in layer.merged_adapters
        ]
        self._suspended = [merge for merge in self._suspended if merge.layer is not layer]
        if wanted:
            self.add(layer.holder, again)

    def suspended(self, layer: MergeableLayer) -> set[str]:
        """Return the layer's adapters that were merged before the adapters were disabled."""
        return {merge.name for merge in self._suspended if merge.layer is layer}

    def lacks_suspended(self, layer: MergeableLayer) -> bool:
        """Return whether the layer's forward would not compute one of its suspended adapters."""
        return bool(self.suspended(layer) - set(layer.active_adapters))

    def drop_suspended(self, layer: MergeableLayer, *names: str) -> None:
        """Forget suspended adapters."""
        kept = [m for m in self._suspended if m.layer is not layer or m.name not in names]
        self._suspended = kept

    def save_metadata(
        self, layer: MergeableLayer, destination: MutableMapping[str, object], prefix: str
    ) -> None:
        """Record the merges of a layer in the metadata of a state dict with its weight."""
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None and layer.merged_adapters:
            metadata["merged"] = self._recorded(layer)

    def load_metadata(
        self,
        layer: MergeableLayer,
        state: Mapping[str, object],
        prefix: str,
        metadata: Mapping[str, object],
    ) -> None:
        """Take over the merges of a weight that a layer is about to load.

        Some file formats drop the metadata. Without it, a weight with the values of the present one
        has the present merges, and any other weight has none.
        """
        module, depth, base = layer.base_layer, 1, layer.holder
        while "base_layer" in module._modules:
            module, depth = cast(nn.Module, module.base_layer), depth + 1
        name = getattr(base, "parameter", "weight")
        value, weight = state.get(f"{prefix}{'base_layer.' * depth}{name}"), _weight(base)
        if not isinstance(value, Tensor) or weight is None or value.shape != weight.shape:
            return
        recorded = cast(Mapping[str, Options], metadata.get("merged", {}))
        noted = {name: options for name, options in recorded.items() if name in layer.scaling}
        if not noted and not self.entries:
            return
        is_same = _same_numbers(value, weight)
        if is_same and noted == self._recorded(layer):
            return
        if is_same and "merged" not in metadata:
            return
        if any(merge.is_known or merge.layer is layer for merge in self.entries):
            self._forget(base)
        if noted:
            self.entries += [Merge(layer, name, options, None) for name, options in noted.items()]
            self._written = Written(weight, is_final=False)
            layer.note_merges(self.names(layer))

    def _recorded(self, layer: MergeableLayer) -> dict[str, Options]:
        """Return a layer's merges as a state dict records them."""
        return {name: dict(options) for name, options in self.options(layer).items()}

    def _forget(self, base: nn.Module) -> None:
        """Forget all merges, since the weight is about to be overwritten."""
        self._put_bias(base, self._summed_bias(base, []))
        self._original = None
        self._note([], None)

    def converted(
        self, base: nn.Module, convert: Callable[[], T], function: Callable[[Tensor], Tensor]
    ) -> T:
        """Run `convert`, which casts or moves the base layer by `function`, so that unmerging gives
        the result of `function` for the original weight.
        """
        is_known = bool(self.entries) and self.entries[0].is_known
        if not is_known or not self._is_changed_by(base, function):
            return convert()
        with exact_merge.isolated(_weight(base).device):
            if quantized_format(base) is not None:
                taken = self._remove(base, lambda merge: True)
                try:
                    return convert()
                finally:
                    self.add(base, taken)
            entries = self.entries
            self.entries = []  # layers inside this one must not convert them too
            try:
                return self._convert_stages(base, entries, convert, function)
            finally:
                self.entries = self.entries or entries
                self._written = Written(_weight(base), self._written)

    def stack(self, layer: MergeableLayer) -> list[MergeableLayer]:
        """Return this layer, those inside it and merged ones around it, from the inside."""
        layers: list[MergeableLayer] = []
        for outermost in (layer, *(merge.layer for merge in self.entries)):
            inner: list[MergeableLayer] = []
            module: Any = outermost
            while hasattr(module, "_merges"):
                inner.insert(0, module)
                module = module.base_layer
            layers = max(layers, inner, key=len)
        return layers

    def names(self, layer: MergeableLayer) -> list[str]:
        """Return a layer's merged adapters in the order of merging."""
        return [merge.name for merge in self.entries if merge.layer is layer]

    def options(self, layer: MergeableLayer) -> dict[str, Options]:
        """Return a layer's merged adapters with the options of their merges."""
        return {merge.name: merge.options for merge in self.entries if merge.layer is layer}

    def missing(self, layer: MergeableLayer, options: Mapping[str, Options]) -> dict[str, Options]:
        """Return options of the adapters not merged yet; raise if merged with other options."""
        merged = self.options(layer)
        for name, new in options.items():
            if name in merged and new and dict(merged[name]) != dict(new):
                now, wanted = (
                    ", ".join(f"{k}={v!r}" for k, v in given.items())
                    for given in (merged[name], new)
                )
                raise PeftValueError(
                    f"Adapter {name} is merged with {now or 'no options'}; call `unmerge_adapter` "
                    f"before merging it with {wanted}."
                )
        return {n: new for n, new in options.items() if n in layer.scaling and n not in merged}

    def original(self, base: nn.Module) -> Tensor:
        """Return the dequantized weight without any merge, bit for bit the original.

        Raises:
            PeftRuntimeError: A loaded state dict had an adapter merged.
        """
        self.check_known()
        with exact_merge.isolated(_weight(base).device):
            storage = quantized_format(base)
            if storage is None:
                return self._before(base, 0)
            merged = storage.get(base)
            storage.put(base, self._original if self.entries else merged)
            try:
                return storage.read(base)
            finally:
                storage.put(base, merged)

    def _rewrite(self, base: nn.Module, first: int, new: list[Merge], check: bool) -> None:
        """Replace the merges from number `first` on; on an error nothing is changed."""
        take_back(base)
        with exact_merge.isolated(_weight(base).device):
            storage = quantized_format(base)
            if storage is not None:
                self._rewrite_quantized(storage, base, self.entries[:first] + new, check)
                return
            weight, entries = self._before(base, first), []
            for merge in new:
                delta = merge.dense(weight.device)
                weight, correction = exact_merge.add(weight, delta, merge.factor)
                _check_finite(merge, weight, check)
                entries.append(merge._replace(correction=correction))
            entries = self.entries[:first] + entries
            # All memory is taken before the first change.
            bias = self._summed_bias(base, entries)
            is_plain = not is_managed(_weight(base))
            written = Written(weight, self._written, is_plain) if entries else None
            put_weight(base, weight)
            self._put_bias(base, bias)
            self._note(entries, written)

    def _rewrite_quantized(
        self, storage: StorageFormat, base: nn.Module, entries: list[Merge], check: bool
    ) -> None:
        """Merge into a quantized weight, from the original, so that it is rounded once."""
        present = storage.get(base)
        original = self._original if self.entries else present
        self.check_known()
        storage.put(base, original)
        try:
            bias, written = self._summed_bias(base, entries), None
            if entries:
                weight = storage.read(base)
                for merge in entries:
                    weight += merge.dense(weight.device)
                    weight *= 1 if merge.factor is None else merge.factor.to(weight.device)
                    _check_finite(merge, weight, check)
                storage.put(base, storage.pack(base, weight))
                written = Written(_weight(base), self._written)
        except BaseException:
            storage.put(base, present)
            raise
        self._put_bias(base, bias)
        self._note(entries, written)
        self._original = original if entries else None

    def _before(self, base: nn.Module, first: int) -> Tensor:
        """Return a plain weight as it was before the merges from number `first` on."""
        weight = gathered_tensor(stored_weight(base))
        if self._written is not None:
            self._written.look(weight, [merge.name for merge in self.entries])
        if first == len(self.entries):
            return weight
        self.check_known(first)
        return self._peeled(weight, self.entries[first:])

    def _peeled(self, weight: Tensor, entries: Sequence[Merge]) -> Tensor:
        """Return a weight without its last merges; if cast meanwhile, up to rounding."""
        written, present = cast(Written, self._written), weight.dtype
        weight = weight.to(written.dtype)
        for merge in reversed(entries):
            delta, kept = merge.dense(weight.device), cast(Correction, merge.correction)
            weight = exact_merge.subtract(weight, delta, kept, written.is_changed)
        return weight.to(present)

    def _convert_stages(
        self,
        base: nn.Module,
        entries: list[Merge],
        convert: Callable[[], T],
        function: Callable[[Tensor], Tensor],
    ) -> T:
        """Convert the weight as it was before each merge, and derive the merges again."""
        merged = stored_weight(base).data
        stages = [self._peeled(merged, entries[i:]) for i in range(len(entries))]
        put_weight(base, stages[0])
        try:
            result = convert()
        except BaseException:
            put_weight(base, merged)
            raise
        stages = [stored_weight(base).data, *map(function, stages[1:]), function(merged)]
        for merge, before, after in zip(entries, stages[:-1], stages[1:], strict=True):
            delta = before if before.is_meta else merge.dense(before.device)
            kept = exact_merge.correction(before, after, delta, merge.factor)
            self.entries.append(merge._replace(correction=kept))
        put_weight(base, stages[-1])
        return result

    def _is_changed_by(self, base: nn.Module, function: Callable[[Tensor], Tensor]) -> bool:
        """Return whether converting changes the weight's dtype or device."""
        weight = _weight(base)
        if is_managed(weight):
            return False
        probe = torch.empty(0, dtype=weight.dtype, device=weight.device)
        result = function(probe)
        return (result.dtype, result.device) != (probe.dtype, probe.device)

    def _summed_bias(self, base: nn.Module, entries: Iterable[Merge]) -> Bias:
        """Return the base layer's original bias with the merges' parts added to it."""
        added = [merge.bias for merge in entries if merge.bias is not None]
        if not added and self._bias is None:
            return Bias(None, None)
        bias = cast(Tensor, base.bias)
        original = bias.data if self._bias is None else self._bias
        total = original.to(bias.device, bias.dtype)
        for more in added:
            total = (total + more.to(total.device)).to(total.dtype)
        return Bias(total, original if added else None)

    def _put_bias(self, base: nn.Module, bias: Bias) -> None:
        """Write a bias, and keep the original while something is added to it."""
        if bias.total is not None:
            cast(Tensor, base.bias).data = bias.total
        self._bias = bias.original

    def _note(self, entries: list[Merge], written: Written | None) -> None:
        layers = {id(merge.layer): merge.layer for merge in (*self.entries, *entries)}
        self.entries = entries
        self._written = written
        for layer in layers.values():
            layer.note_merges(self.names(layer))

    def check_known(self, first: int = 0) -> None:
        """Raise if the merges from number `first` on can't be undone."""
        names = [merge.name for merge in self.entries[first:] if not merge.is_known]
        if names:
            raise PeftRuntimeError(
                f"Adapter {names[0]} was merged in the state dict that this model loaded, which "
                "lacks the original weight; load a state dict that was taken while nothing was "
                "merged."
            )


def _merge_of(layer: MergeableLayer, adapter_name: str, options: Options, is_first: bool) -> Merge:
    """Return the merge of an adapter as it is now; `is_first`: nothing is merged before it."""
    scale = float(layer.scaling[adapter_name])
    factor = layer.merge_factor(adapter_name, scale)
    delta = layer.delta_recipe(adapter_name, **options).copied()
    decomposition = layer.decomposition(adapter_name)
    by_columns = decomposition is not None and decomposition.by_columns
    if factor is not None and by_columns and not is_first:
        dense = layer.get_delta_weight(adapter_name, **options)
        change = dora.change(base_weight(layer), factor, dense)
        delta, factor = Recipe(exact_merge.unchanged, (change,)), None
    bias = layer.merge_bias(adapter_name, scale)
    return Merge(layer, adapter_name, options, delta, factor, bias)


def _check_finite(merge: Merge, weight: Tensor, check: bool) -> None:
    """Raise for a merged weight or bias that is not finite, if they are to be checked."""
    for kind, tensor in (("weights", weight), ("bias", merge.bias)) if check else ():
        if tensor is not None and not tensor.float().isfinite().all():
            raise PeftValueError(
                f"NaNs detected in the merged {kind}. The adapter {merge.name} seems to be broken; "
                "nothing was merged."
            )


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same values; False where their format can't compare."""
    try:
        return one.dtype == other.dtype and torch.equal(
            gathered_tensor(one).to(other.device), gathered_tensor(other)
        )
    except RuntimeError:
        return False


def _weight(base: nn.Module) -> Tensor:
    return cast(Tensor, getattr(base, "weight", None))
