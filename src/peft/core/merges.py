# SPDX-License-Identifier: Apache-2.0
"""`Merges`: what is merged into the weight of one base layer, by all layers around it, and how each
part comes off again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..base.errors import PeftRuntimeError, PeftValueError
from ..integrations.distributed import gathered_tensor, is_managed
from ..ops import exact_merge
from ..ops.exact_merge import Correction, Recipe
from .weights import put_weight, quantized_format, stored_weight

Options: TypeAlias = Mapping[str, object]
"""Options of an adapter's delta (`task_id`), by name."""


class Merge(NamedTuple):
    """One adapter that is merged into a weight.

    Args:
        layer: The layer that has the adapter.
        name: The adapter's name.
        options: What its delta depends on besides (`task_id`).
        delta: The delta as it was then, whatever the adapter is now.
        factor: What the sum of weight and delta was multiplied by, None for nothing.
        bias: What was added to the bias, None for nothing.
        correction: What undoing the sum needs, where the original weight is not at hand.
    """

    layer: Any
    name: str
    options: Options
    delta: Recipe | None
    factor: Tensor | None = None
    bias: Tensor | None = None
    correction: Correction | None = None

    @property
    def is_known(self) -> bool:
        """Whether it was merged here; what came merged with a state dict can't be taken off."""
        return self.delta is not None

    def dense(self, device: torch.device) -> Tensor:
        """Compute the delta that was merged."""
        assert self.delta is not None
        return self.delta.on(device).weight()


class Merges:
    """The merges into one base layer's weight, in their order. All layers around the base layer
    share it.

    Of each merge it keeps the adapter's own small tensors, copied, and the few elements of the
    weight that subtracting the delta would not give back. A quantised weight is kept whole, as it
    was stored; so is one that the model uses elsewhere, where it still is.

    Attributes:
        entries: The merges.
        shared: The parameter that the base layer's weight was taken apart from, None if it is its
            own.
    """

    def __init__(self) -> None:
        self.entries: list[Merge] = []
        self.shared: nn.Parameter | None = None
        self._suspended: list[Merge] = []
        self._original: Any = None  # of a quantised weight
        self._bias: Tensor | None = None  # as it was, once something was added to it
        self._dtype: torch.dtype | None = None  # of the weight when it was last written

    def add(self, base: nn.Module, new: Sequence[Merge], check: bool = False) -> None:
        """Merge more; all or none.

        Args:
            base: The base layer.
            new: What to merge.
            check: Insist that every weight on the way is finite.

        Raises:
            PeftValueError: One is not; nothing is changed.
        """
        self._rewrite(base, len(self.entries), list(new), check)

    def remove(self, base: nn.Module, names: Collection[str], layer: Any) -> list[Merge]:
        """Take adapters of a layer off. The weight is then to the bit what the others alone make of
        it.

        Returns:
            What was taken off; it can be merged again.

        Raises:
            PeftRuntimeError: It came merged with a state dict, and what the weight was before is
                not known.
        """
        return self._remove(base, lambda merge: merge.layer is layer and merge.name in names)

    def _remove(self, base: nn.Module, is_gone: Callable[[Merge], bool]) -> list[Merge]:
        gone = [merge for merge in self.entries if is_gone(merge)]
        if gone:
            first = self.entries.index(gone[0])
            self._rewrite(
                base, first, [merge for merge in self.entries[first:] if not is_gone(merge)], False
            )
        return gone

    def suspend(self, layer: Any) -> None:
        """Take all adapters of a layer off until they are resumed."""
        self._suspended += self.remove(layer.get_base_layer(), layer.merged_adapters, layer)

    def resume(self, layer: Any, wanted: bool) -> None:
        """Merge the layer's suspended adapters again, or forget them."""
        again = [
            merge
            for merge in self._suspended
            if merge.layer is layer and merge.name not in layer.merged_adapters
        ]
        self._suspended = [merge for merge in self._suspended if merge.layer is not layer]
        if wanted:
            self.add(layer.get_base_layer(), again)

    def drop_suspended(self, layer: Any, name: str) -> None:
        """Forget a suspended adapter."""
        self._suspended = [
            merge for merge in self._suspended if merge.layer is not layer or merge.name != name
        ]

    def note_in(self, layer: Any, destination: Any, prefix: str) -> None:
        """Note in a state dict's metadata what a layer has merged into the weight that is in it."""
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None and layer.merged_adapters:
            metadata["merged"] = {name: dict(own) for name, own in self.options(layer).items()}
            metadata["untied"] = self.shared is not None

    def see_loaded(
        self, layer: Any, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any]
    ) -> None:
        """Take over what is merged into a weight that a layer is about to load.

        Without a note, which not all formats of files keep, a weight with the numbers of the
        present one is merged as that is, and any other has nothing merged.
        """
        base, depth = layer.base_layer, 1
        while base is not layer.get_base_layer():
            base, depth = base.base_layer, depth + 1
        value, weight = (
            state.get(f"{prefix}{'base_layer.' * depth}weight"),
            getattr(base, "weight", None),
        )
        if value is None or weight is None or value.shape != weight.shape:
            return
        noted = {
            name: own for name, own in metadata.get("merged", {}).items() if name in layer.scaling
        }
        if not noted and not self.entries:
            return
        is_same = _same_numbers(value, weight)
        if is_same and noted == {name: dict(own) for name, own in self.options(layer).items()}:
            return
        if is_same and "merged" not in metadata:
            return
        if any(merge.is_known or merge.layer is layer for merge in self.entries):
            self._forget(base)
        if noted:
            if metadata.get("untied") and self.shared is None:
                self.shared = base.weight
                base.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            self.entries += [Merge(layer, name, own, None) for name, own in noted.items()]
            self._dtype = weight.dtype
            layer.note_merges(self.names(layer))

    def _forget(self, base: nn.Module) -> None:
        """Give up all merges, since the weight is about to be written anew."""
        if self.shared is not None:
            base.weight = self.shared
        self._put_bias(base, [])
        self._note(base, [])

    def converted(
        self, base: nn.Module, convert: Callable[[], Any], function: Callable[[Tensor], Tensor]
    ) -> Any:
        """Have the base layer converted (cast, moved) by `convert`, so that the merged weight
        becomes what `function` makes of it, and taking everything off gives what it makes of the
        original.
        """
        if (
            not self.entries
            or not self.entries[0].is_known
            or not self._is_changed_by(base, function)
        ):
            return convert()
        with exact_merge.by_itself(_device(base)):
            if quantized_format(base) is not None:
                taken = self._remove(base, lambda merge: True)
                try:
                    return convert()
                finally:
                    self.add(base, taken)
            entries, self.entries = self.entries, []  # the layers inside are not to do the same
            try:
                if self.shared is not None:
                    return convert()
                return self._convert_stages(base, entries, convert, function)
            finally:
                self.entries = self.entries or entries
                self._dtype = base.weight.dtype  # type: ignore[union-attr, assignment]

    def names(self, layer: Any) -> list[str]:
        """Names of a layer's merged adapters, in the order of merging."""
        return [merge.name for merge in self.entries if merge.layer is layer]

    def missing(self, layer: Any, options: Mapping[str, Options]) -> dict[str, Options]:
        """Those of the adapters that a layer is to merge with some options which it has not merged.

        Raises:
            PeftValueError: It has merged one with other options.
        """
        merged = self.options(layer)
        for name, own in options.items():
            if name in merged and own and dict(merged[name]) != dict(own):
                now, wanted = (
                    ", ".join(f"{k}={v!r}" for k, v in given.items())
                    for given in (merged[name], own)
                )
                raise PeftValueError(
                    f"Adapter {name} is merged with {now or 'no options'}; call `unmerge_adapter` "
                    f"before merging it with {wanted}."
                )
        return {name: own for name, own in options.items() if name not in merged}

    def suspended(self, layer: Any) -> set[str]:
        """Names of a layer's adapters that were merged before the adapters were disabled."""
        return {merge.name for merge in self._suspended if merge.layer is layer}

    def options(self, layer: Any) -> dict[str, Options]:
        """With which options a layer's adapters were merged, by name."""
        return {merge.name: merge.options for merge in self.entries if merge.layer is layer}

    def original(self, base: nn.Module) -> Tensor:
        """The weight in numbers, without any merge: to the bit what it was."""
        with exact_merge.by_itself(_device(base)):
            form = quantized_format(base)
            if form is None:
                return self._before(base, 0)
            merged = form.get(base)
            form.put(base, self._original if self.entries else merged)
            try:
                return form.read(base)
            finally:
                form.put(base, merged)

    def _rewrite(self, base: nn.Module, first: int, new: list[Merge], check: bool) -> None:
        """Merge `new` in place of the merges from `first` on; on an error nothing is changed."""
        with exact_merge.by_itself(_device(base)):
            form = quantized_format(base)
            if form is not None:
                self._rewrite_quantized(form, base, self.entries[:first] + new, check)
                return
            weight, entries = self._before(base, first), []
            for merge in (merge._replace(correction=None) for merge in new):
                weight, correction = exact_merge.add(
                    weight, merge.dense(weight.device), merge.factor
                )
                _insist_on_finite(merge, weight, check)
                entries.append(
                    merge._replace(correction=None if self.shared is not None else correction)
                )
            entries = self.entries[:first] + entries
            if not entries and self.shared is not None:
                base.weight, self.shared = self.shared, None
            else:
                put_weight(base, weight)
            self._put_bias(base, entries)
            self._note(base, entries)

    def _rewrite_quantized(
        self, form: Any, base: nn.Module, entries: list[Merge], check: bool
    ) -> None:
        """Merge into a quantised weight, from the original: it is rounded once."""
        present = form.get(base)
        original = self._original if self.entries else present
        self.insist_on_known(0)
        form.put(base, original)
        try:
            if not entries:
                present = original
                return
            weight = form.read(base)
            for merge in entries:
                weight += merge.dense(weight.device)
                weight *= 1 if merge.factor is None else merge.factor.to(weight.device)
                _insist_on_finite(merge, weight, check)
            present = form.pack(base, weight)
        except BaseException:
            entries = self.entries
            raise
        finally:
            form.put(base, present)
            self._put_bias(base, entries)
            self._note(base, entries)
            self._original = original if entries else None

    def _before(self, base: nn.Module, first: int) -> Tensor:
        """The plain weight as it was before the merges from `first` on."""
        weight = gathered_tensor(stored_weight(base))
        if first == len(self.entries):
            return weight
        self.insist_on_known(first)
        if self.shared is not None and first == 0:
            return gathered_tensor(self.shared.detach())
        if self.shared is not None:
            weight = gathered_tensor(self.shared.detach())
            for merge in self.entries[:first]:
                weight, _ = exact_merge.add(weight, merge.dense(weight.device), merge.factor)
            return weight
        return self._peeled(weight, self.entries[first:])

    def _peeled(self, weight: Tensor, entries: Sequence[Merge]) -> Tensor:
        """A plain weight without the merges that were added last. One that was cast behind this
        object's back is as the original cast so, but for rounding.
        """
        present, weight = weight.dtype, weight.to(self._dtype)
        for merge in reversed(entries):
            assert merge.correction is not None
            weight = exact_merge.subtract(weight, merge.dense(weight.device), merge.correction)
        return weight.to(present)

    def _convert_stages(
        self,
        base: nn.Module,
        entries: list[Merge],
        convert: Callable[[], Any],
        function: Callable[[Tensor], Tensor],
    ) -> Any:
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
        """Whether converting gives the weight another format or place."""
        weight: Any = base.weight
        if is_managed(weight):
            return False
        probe = torch.empty(0, dtype=weight.dtype, device=weight.device)
        result = function(probe)
        return (result.dtype, result.device) != (probe.dtype, probe.device)

    def _put_bias(self, base: nn.Module, entries: Iterable[Merge]) -> None:
        """Add to the base layer's bias what is merged into it."""
        added = [merge.bias for merge in entries if merge.bias is not None]
        if not added and self._bias is None:
            return
        bias: Any = base.bias
        self._bias = bias.data if self._bias is None else self._bias
        total = self._bias.to(bias.device, bias.dtype)
        for more in added:
            total = (total + more.to(total.device)).to(total.dtype)
        bias.data = total
        if not added:
            self._bias = None

    def _note(self, base: nn.Module, entries: list[Merge]) -> None:
        layers = {id(merge.layer): merge.layer for merge in (*self.entries, *entries)}
        self.entries = entries
        if not entries:
            self.shared = self._original = None
        self._dtype = base.weight.dtype if entries else None  # type: ignore[union-attr, assignment]
        for layer in layers.values():
            layer.note_merges(self.names(layer))

    def insist_on_known(self, first: int = 0) -> None:
        """Raise where the merges from `first` on can't be taken off."""
        names = [
            merge.name
            for merge in self.entries[0 if self.shared is not None else first :]
            if not merge.is_known
        ]
        if names and (
            first > 0 or self.shared is None
        ):  # a weight that the model uses elsewhere is still there
            raise PeftRuntimeError(
                f"Adapter {names[0]} was merged in the state dict that this model loaded, which "
                "does not say what the weight was "
                "before; load a state dict that was taken while nothing was merged."
            )


def _insist_on_finite(merge: Merge, weight: Tensor, check: bool) -> None:
    if check and not (
        torch.isfinite(weight.float()).all()
        and (merge.bias is None or torch.isfinite(merge.bias).all())
    ):
        kind = (
            "weights" if merge.bias is None or not torch.isfinite(weight.float()).all() else "bias"
        )
        raise PeftValueError(
            f"NaNs detected in the merged {kind}. The adapter {merge.name} seems to be broken; "
            "nothing was merged."
        )


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same numbers; False where some format can't tell."""
    try:
        return one.dtype == other.dtype and torch.equal(
            gathered_tensor(one).to(other.device), gathered_tensor(other)
        )
    except (RuntimeError, NotImplementedError):
        return False


def _device(base: nn.Module) -> torch.device:
    weight: Any = base.weight
    return weight.device
