# SPDX-License-Identifier: Apache-2.0
"""`BaseTunerLayer`: a layer with adapters. Its forward, merging, switching and deleting are written
here, once for all methods.

A method's layer declares where it keeps what belongs to an adapter and supplies three things:
`update_layer` makes an adapter's parameters, `delta_activations` computes what the adapter adds to
the output, `get_delta_weight` what it adds to the weight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base.calls.adapter_batch import ADAPTER_BATCHES, AdapterBatch
from ..base.calls.layout import SAMPLES_FIRST, RowLayout
from ..base.calls.rows import RowOwners
from ..base.errors import PeftNotSupportedError, warn
from ..base.geometry import Geometry, Placement, columns
from ..checkpoint.rank_padding import RankRoom
from ..integrations.accelerate import loaded_weights
from ..ops.dispatch import can_fuse, is_ordinary
from ..ops.exact_merge import Recipe, as_it_is, by_itself
from ..ops.fused_linear import Chain, add_to_output, linear_with_chain
from ..ops.low_rank import LowRank, cut, dense_svd
from ..ops.mixed_precision import can_stay
from ..ops.nested import as_tokens, nested_like
from .adapters import AdapterHolder
from .base_layer import geometry, innermost, placement, table
from .cost import AdapterCost
from .merge_requests import checked_names, warn_of_merged
from .merges import Merge, Merges
from .weights import quantized_format


class BaseTunerLayer(AdapterHolder):
    """A layer `base_layer` with any number of adapters, of which the active ones add up:
    `y = base(x) + Σ Δ(x)`.

    Args:
        base_layer: The layer to adapt. It stays as it is, below this one.

    Attributes:
        base_layer: The adapted layer; the others as for `AdapterHolder`.
        layout: How the rows of its input lie.
    """

    layout: RowLayout = SAMPLES_FIRST

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        size = geometry(base_layer) or table(base_layer)
        if size is not None:
            self.in_features, self.out_features = size.in_features, size.out_features
            self.geometry: Geometry = size
            if size.is_conv:
                self.layout = RowLayout(1 + len(size.kernel_size))
            elif geometry(base_layer) is None:
                self.layout = RowLayout(0)
        self._merges: Merges = (
            base_layer._merges if isinstance(base_layer, BaseTunerLayer) else Merges()
        )
        self.cast_input_dtype_enabled = True
        self.training = base_layer.training

    def update_layer(self, adapter_name: str, *args: Any, **options: Any) -> None:
        """Make (or make anew) an adapter's parameters, as its config says."""
        raise NotImplementedError

    def delta_activations(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return what the adapter adds to the output for input `x`.

        That may be any which the base layer takes (a vector, no rows, on the meta device, inside a
        transform), but for a nested tensor.
        """
        raise NotImplementedError

    def delta_chain(self, adapter_name: str, x: Tensor) -> Chain | None:
        """Return `delta_activations` as a chain of products, which is then computed together with
        the base layer's; None, before anything is computed, where there is no such chain. Only
        called where `dispatch.is_ordinary(x)`.
        """
        return None

    def get_delta_weight(self, adapter_name: str, **options: Any) -> Tensor:
        """What the adapter adds to the base weight, in the base weight's layout."""
        raise PeftNotSupportedError(
            f"{type(self).__name__} has no delta that could be merged into a weight."
        )

    def delta_recipe(self, adapter_name: str, **options: Any) -> Recipe:
        """`get_delta_weight` as a function of small tensors, which a merge keeps to take the same
        delta off again. By default the delta itself is kept.
        """
        return Recipe(as_it_is, (self.get_delta_weight(adapter_name, **options),))

    @property
    def needs_layer_alone(self) -> bool:
        """Whether another method can't adapt the same layer: an adapter's part is not a sum."""
        return False

    def merge_factor(self, adapter_name: str, scale: float) -> Tensor | None:
        """What merging multiplies the sum of weight and delta by, None for nothing; for a method
        whose part is not a sum.
        """
        return None

    def merge_bias(self, adapter_name: str, scale: float) -> Tensor | None:
        """What merging adds to the base layer's bias, None for nothing."""
        return None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter's delta is a matrix, of which there are low-rank factors."""
        return type(self).get_delta_weight is not BaseTunerLayer.get_delta_weight

    def low_rank_factors(
        self, adapter_name: str, rank: int | float | None = None, **options: Any
    ) -> LowRank:
        """The adapter's delta as `B·A` of a rank: an integer, the share of energy to keep, or None
        for exact. A method whose delta is low rank by its structure overrides this.
        """
        delta = self.geometry.as_stored(
            self.get_delta_weight(adapter_name, **options)
        )  # [out, in, *kernel]
        return cut(dense_svd(delta.flatten(1)), rank, delta.dtype)

    def adapter_cost(self, adapter_name: str, config: Any) -> AdapterCost:
        """What an adapter costs here, from shapes alone. By default each of its numbers is
        multiplied once for a row, and its delta can have any rank; a method that knows better
        overrides this.
        """
        numbers = sum(parameter.numel() for parameter in self.adapter_parameters(adapter_name))
        return AdapterCost(numbers, min(self.geometry.out_features, columns(self.geometry)))

    def rank_room(self, holder: str) -> RankRoom | None:
        """Where a container's tensors can be filled up with zeros without a change to the delta;
        None if they can't be.
        """
        return None

    def get_base_layer(self) -> nn.Module:
        """The layer itself, below all adapters."""
        return innermost(self)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus that of the active adapters, in the base output's dtype.

        - Merged adapters count by the weight, active or not: `(W + Σ merged) x + Σ Δ(x)` over
          active ones that are not merged.
        - While the adapters are disabled it is the base layer's output, from which merged ones were
          taken off.
        - Where the call chose an adapter for each sample, that one's part is added to the sample's
          rows instead; a model refuses such a call while anything is merged.
        """
        base: Any = self._modules["base_layer"]
        if self._disable_adapters:
            if self.merged_adapters:  # merged since they were switched off
                self._merges.suspend(self)
            return base(x, *args, **kwargs)
        batch = ADAPTER_BATCHES.current
        if batch is not None and not self.merged_adapters:
            result = base(x, *args, **kwargs)
            return (
                self._apply_to_batch(batch, x, result) if x.numel() else result
            )  # an expert may get no tokens
        active, scaling = self._active_adapter, self.scaling
        names = [
            name for name in ((active,) if isinstance(active, str) else active) if name in scaling
        ]
        if self.merged_adapters:
            names = [name for name in names if name not in self.merged_adapters]
        together = names and not (args or kwargs) and can_fuse(base, x)
        chain = self.delta_chain(names[0], x) if together else None
        if chain is None:
            result = base(x, *args, **kwargs)
            dtype = result.dtype
        else:
            result, dtype, names = linear_with_chain(base, x, chain), x.dtype, names[1:]
        for adapter_name in names:
            result = self._add(adapter_name, x, result)
        return result if result.dtype == dtype else result.to(dtype)

    def _add(self, adapter_name: str, x: Tensor, result: Tensor) -> Tensor:
        """Apply an adapter to an input of any layout."""
        if not x.is_nested:
            return self.apply_adapter(adapter_name, x, result)
        own = as_tokens(
            result
        ).clone()  # it may be written to, which a view of a nested one may not
        return nested_like(x, self.apply_to_tokens(adapter_name, x, as_tokens(x), own))

    def apply_adapter(self, adapter_name: str, x: Tensor, result: Tensor) -> Tensor:
        """`result` with the adapter's part; a method whose part is not a sum overrides this."""
        chain = self.delta_chain(adapter_name, x) if is_ordinary(x) else None
        if chain is None:
            return result + self.delta_activations(adapter_name, x)
        return add_to_output(self._modules["base_layer"], chain, result)  # type: ignore[arg-type]

    def apply_to_tokens(
        self, adapter_name: str, nested: Tensor, x: Tensor, result: Tensor
    ) -> Tensor:
        """Apply an adapter to all tokens of a nested input's samples, as `apply_adapter` does.

        A method that knows something of each sample overrides this.

        Args:
            adapter_name: The adapter's name.
            nested: The input itself.
            x: Its tokens `[tokens, …, in]`.
            result: Those of the output `[tokens, …, out]`.
        """
        return self.apply_adapter(adapter_name, x, result)

    def apply_to_samples(
        self, adapter_name: str, samples: list[int], x: Tensor, result: Tensor, owner: Tensor | None
    ) -> Tensor:
        """`apply_adapter` for the rows of some of a call's samples; a method that knows something
        of each sample overrides this.

        Args:
            adapter_name: The adapter.
            samples: Numbers of the samples.
            x, result: The layer's input and output for their rows.
            owner: The number of each row's sample; None where each sample has the same number of
                rows, one after the other.
        """
        return self.apply_adapter(adapter_name, x, result)

    def _apply_to_batch(self, batch: AdapterBatch, x: Tensor, result: Tensor) -> Tensor:
        """`result` with each sample's adapter applied to its rows."""
        if batch.only is not None:
            known = batch.only in self.scaling
            return self._add(batch.only, x, result).to(result.dtype) if known else result
        shared = batch.row_owners(x, self)
        if not shared.sequence_first:
            return self._apply_by_sample(batch, x, result, shared)
        return (
            self._apply_by_sample(batch, x.transpose(0, 1), result.transpose(0, 1), shared)
            .transpose(0, 1)
            .contiguous()
        )

    def _apply_by_sample(
        self, batch: AdapterBatch, x: Tensor, result: Tensor, shared: RowOwners
    ) -> Tensor:
        """The same with rows along the first dimension: a gather for each adapter, one scatter for
        all.
        """
        every = batch.rows_by_adapter(x.shape[0], x.device, shared)
        own = {
            name: rows
            for name, rows in every.items()
            if name in self.scaling and name in batch.samples
        }
        if not own:
            return result
        owner = shared.owner
        parts = [
            self.apply_to_samples(
                name,
                batch.samples[name],
                x[rows],
                result[rows],
                None if owner is None else owner[rows],
            ).to(result.dtype)
            for name, rows in own.items()
        ]
        return result.index_copy(0, torch.cat(list(own.values())), torch.cat(parts))

    def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` in the adapter's precision, but where `helpers.disable_input_dtype_casting` says so
        not in a narrower one than its own: that is for storage then.
        """
        return (
            x.to(dtype)
            if self.cast_input_dtype_enabled or dtype.itemsize >= x.dtype.itemsize
            else x
        )

    def _input_of_chain(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` in the adapter's precision, or as it is where the products with it are taken so."""
        return x if x.dtype == dtype or can_stay(x, dtype) else self._cast_input_dtype(x, dtype)

    def __getattr__(self, name: str) -> Any:
        """What this layer lacks is read from the layer it adapts (`weight`, `bias`, `stride`, …),
        private names apart.
        """
        modules = self.__dict__.get("_modules")
        if modules is not None and name in modules:
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        """The module's usual form, after the method's name."""
        return f"{type(self).__module__.split('.')[-2]}.{super().__repr__()}"

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters off, for which merged ones are taken off the weight, or on. Active
        ones are then computed in the forward; others that were merged are merged again.
        """
        if not enabled and self.merged:
            with loaded_weights(self, self.merged_adapters):
                self._merges.suspend(self)
        super().enable_adapters(enabled)
        if enabled:
            self.resume_merges(self.lacks_merges)

    @property
    def is_suspended(self) -> bool:
        """Whether something was merged, and taken off when the adapters were disabled."""
        return bool(self._merges.suspended(self))

    @property
    def lacks_merges(self) -> bool:
        """Whether among that is what the forward would not compute."""
        return bool(self._merges.suspended(self) - set(self.active_adapters))

    def resume_merges(self, wanted: bool = True) -> None:
        """Merge what was taken off when the adapters were disabled, or forget it."""
        if names := self._merges.suspended(self):
            with loaded_weights(self, names):
                self._merges.resume(self, wanted)

    @property
    def merged(self) -> bool:
        """Whether any adapter's delta is in the base weight."""
        return bool(self.merged_adapters)

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, **options: Any
    ) -> None:
        """Add adapters' deltas to the base weight, from where `unmerge` takes them off again
        exactly, whatever becomes of the adapters meanwhile.

        For that a copy of each adapter's factors is kept, and the few elements of the weight that
        subtracting the delta would not give back. A quantised weight is read, summed in float32 and
        quantised once more in its own form; the original stays in memory until it is unmerged: half
        a byte a number in 4 bits, one byte in 8.

        Args:
            safe_merge: Check that no resulting weight is NaN or infinite.
            adapter_names: Which adapters, by default the active ones; those merged already are
                passed over with a warning.
            **options: Passed to `get_delta_weight`.

        Raises:
            PeftValueError: `safe_merge` found a broken weight, or an adapter is merged with other
                options; nothing was changed.
            PeftNotSupportedError: The layer's weight is quantised in a form not known here, or the
                method can't be merged.
        """
        names = checked_names(self.active_adapters if adapter_names is None else adapter_names)
        own = {name: options for name in names if name in self.scaling}
        new = self.not_merged(own)
        warn_of_merged([name for name in own if name not in new], list(new))
        self.check_mergeable(list(new))
        self.merge_each(new, safe_merge)

    def note_merges(self, adapter_names: list[str]) -> None:
        """Take note of which adapters are merged now."""
        self.merged_adapters[:] = adapter_names

    def not_merged(self, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """Those of the layer's adapters that are to be merged with some options, by name, and are
        not yet.

        Raises:
            PeftValueError: One is merged with other options.
        """
        return {
            name: own
            for name, own in self._merges.missing(self, options).items()
            if name in self.scaling
        }

    def merge_each(
        self, options: Mapping[str, Mapping[str, Any]], safe_merge: bool = False
    ) -> None:
        """Merge adapters that are not merged, each with its own options; all or none.

        Raises:
            PeftValueError: `safe_merge` found a broken weight; nothing was changed.
        """
        if options:
            with by_itself(self.get_base_layer().weight.device):  # type: ignore[union-attr, arg-type]
                first = None if self._merges.entries else next(iter(options))
                new = [self.merge_of(name, own, name == first) for name, own in options.items()]
            self._merges.add(self.get_base_layer(), new, safe_merge)

    def merge_of(self, adapter_name: str, options: Mapping[str, Any], is_first: bool) -> Merge:
        """What merging an adapter adds, as it is now.

        Args:
            adapter_name: The adapter.
            options: What its delta depends on besides.
            is_first: Whether the weight has nothing merged before it.
        """
        scale = float(self.scaling[adapter_name])
        delta = self.delta_recipe(adapter_name, **options).copied()
        more = self.merge_factor(adapter_name, scale), self.merge_bias(adapter_name, scale)
        return Merge(self, adapter_name, options, delta, *more)

    def check_mergeable(self, adapter_names: Sequence[str]) -> None:
        """Raise if adapters can't be merged into this layer, whatever their values."""
        quantized_format(self.get_base_layer())

    def unmerge(self, adapter_names: Collection[str] | None = None) -> None:
        """Take merged adapters' deltas off the base weight; without all of them it is to the bit
        what it was, quantised or not.

        Args:
            adapter_names: Which, by default all.

        Raises:
            PeftRuntimeError: They came merged with a state dict, which does not say what the weight
                was before.
        """
        was_suspended = self.is_suspended
        self._merges.resume(self, False)
        if self.merged:
            self.take_off(adapter_names)
        elif not was_suspended:
            warn("Already unmerged. Nothing to do.")

    def check_unmergeable(self) -> None:
        """Raise if what is merged can't be taken off."""
        self._merges.insist_on_known()

    def take_off(self, adapter_names: Collection[str] | None = None) -> list[Merge]:
        """Unmerge adapters, by default all; what is returned can be `put_on` again."""
        return self._merges.remove(
            self.get_base_layer(),
            self.merged_adapters if adapter_names is None else adapter_names,
            self,
        )

    def put_on(self, merges: Sequence[Merge]) -> None:
        """Merge again what was taken off, as it was."""
        self._merges.add(self.get_base_layer(), merges)

    def unmerged_weight(self) -> Tensor:
        """The base weight in numbers, to the bit as it is while nothing is merged."""
        return self._merges.original(self.get_base_layer())

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, and forget that it was merged before adapters were disabled."""
        super().delete_adapter(adapter_name)
        self._merges.drop_suspended(self, adapter_name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._merges.note_in(self, destination, prefix)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        """A weight that is loaded brings its own merges: those that its state dict was taken with,
        or none.
        """
        self._merges.see_loaded(self, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Cast or move the layer; what is merged comes off as the original weight cast or moved."""
        if not self.merged or not recurse:
            return super()._apply(fn, recurse)
        return self._merges.converted(
            self.get_base_layer(), lambda: super(BaseTunerLayer, self)._apply(fn), fn
        )

    def _placement(self, given: Placement | None) -> Placement:
        """Where to make parameters: as given, else as the base layer's."""
        return given or placement(self.base_layer, autocast=True)


def layer_of(module: nn.Module, layer_cls: type[BaseTunerLayer]) -> BaseTunerLayer | None:
    """The layer of a class among those around one base layer, from `module` inwards; None if there
    is none.
    """
    while not isinstance(module, layer_cls):
        if not isinstance(module, BaseTunerLayer):
            return None
        module = module.base_layer
    return module
