# SPDX-License-Identifier: Apache-2.0
"""`BaseTunerLayer`: a layer with adapters; forward, merging and switching, for all methods.

A method's layer declares its containers and supplies three things: `update_layer` makes an
adapter's parameters, `delta_chain` or `delta_activations` computes the delta of the output, and
`delta_recipe` or `get_delta_weight` the delta of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..base.calls.adapter_batch import ADAPTER_BATCHES, AdapterBatch
from ..base.calls.layout import SAMPLES_FIRST, RowLayout
from ..base.calls.rows import RowOwners
from ..base.errors import PeftNotSupportedError, PeftValueError, warn
from ..base.freezing import TemporaryFreeze
from ..base.geometry import Geometry, Placement
from ..base.validation import check_scale
from ..checkpoint.rank_padding import RankPadding, Unpadded
from ..integrations.accelerate import loaded_weights
from ..ops.dispatch import can_fuse, is_ordinary
from ..ops.exact_merge import Recipe, unchanged
from ..ops.fused_linear import Chain, add_to_output, linear_with_chain
from ..ops.low_rank import LowRank, cut, dense_svd
from ..ops.mixed_precision import can_stay
from ..ops.nested import as_tokens, dense, nested_like
from . import adapters, dora
from .adapters_by_sample import apply_one_by_one, apply_to_batch
from .base_layer import embedding_geometry, geometry, innermost, output_dtype
from .merge_requests import check_order, checked_names, warn_of_merged
from .merges import Merge, Merges
from .method_info import AdapterCost
from .weights import placement, quantized_format


class BaseTunerLayer(nn.Module):
    """A layer with any number of adapters: `y = base(x) + Σ Δ(x)` over the active ones.

    Args:
        base_layer: The layer to adapt. It stays as it is, below this one.

    Attributes:
        adapter_layer_names: Containers of parameters or modules that the interface lists.
        other_param_names: Attributes with values by adapter name that the interface lists.
        container_names: All containers, by default `adapter_layer_names`.
        value_names: All values except `scaling`, by default `other_param_names`.
        base_layer: The adapted layer.
        scaling: The scale of each adapter's delta, by name. Its keys are the layer's adapters.
        merged_adapters: Adapters merged into the base weight, in the order of merging.
        layout: The layout of the rows of its input.
    """

    __module__ = "peft.tuners.tuners_utils"  # where pickles look for it

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()
    container_names: ClassVar[tuple[str, ...]] = ()
    value_names: ClassVar[tuple[str, ...]] = ()
    _modules: dict[str, Any]  # base layer and containers, read without `__getattr__` on hot paths
    layout: RowLayout = SAMPLES_FIRST
    geometry: Geometry
    _merges: Merges

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        members = vars(cls)
        if "adapter_layer_names" in members and "container_names" not in members:
            cls.container_names = cls.adapter_layer_names
        if "other_param_names" in members and "value_names" not in members:
            cls.value_names = tuple(name for name in cls.other_param_names if name != "scaling")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.scaling: dict[str, float] = {}
        self.unpadded_sizes: dict[str, dict[str, Unpadded]] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self._freeze = TemporaryFreeze()
        self.base_layer = base_layer
        self.note_base(base_layer)
        self.cast_input_dtype_enabled = True
        self.training = base_layer.training

    def note_base(self, base_layer: nn.Module) -> None:
        """Note size, input layout and merges of the layer to adapt."""
        size = geometry(base_layer) or embedding_geometry(base_layer)
        if size is not None:
            self.in_features, self.out_features = size.in_features, size.out_features
            self.geometry = size
            if size.is_conv or geometry(base_layer) is None:
                self.layout = RowLayout(1 + len(size.kernel_size) if size.is_conv else 0)
        self._merges = base_layer._merges if isinstance(base_layer, BaseTunerLayer) else Merges()

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return the base layer's output plus the active adapters' deltas, in the output's dtype.

        - Merged adapters act through the weight, active or not: `(W + Σ merged) x + Σ Δ(x)` over
          active adapters that are not merged.
        - While the adapters are disabled, this is the base layer's output without merged adapters.
        - If the call chose an adapter for each sample, each sample gets the delta of its own
          adapter instead. A model refuses such a call while anything is merged.
        """
        base: nn.Module = self._modules["base_layer"]
        if self._disable_adapters:
            if self.merged_adapters:  # merged since they were disabled
                self._merges.suspend(self)
            return base(x, *args, **kwargs)
        batch = ADAPTER_BATCHES.current
        if batch is not None and not self.merged_adapters:
            result = base(x, *args, **kwargs)
            # An expert may get no tokens.
            return apply_to_batch(self, batch, x, result) if x.numel() else result
        active, scaling, merged = self._active_adapter, self.scaling, self.merged_adapters
        active = (active,) if isinstance(active, str) else active  # type: ignore[assignment]
        names = [name for name in active if name in scaling and name not in merged]
        if not names:
            return base(x, *args, **kwargs)
        chain = None
        if not (args or kwargs) and can_fuse(base, x):
            chain = self.delta_chain(names[0], x)
        if chain is None:
            result = base(x, *args, **kwargs)
            dtype = output_dtype(base, result)
        else:
            result, dtype, names = linear_with_chain(base, x, chain), x.dtype, names[1:]
        for adapter_name in names:
            result = self.apply_to_any(adapter_name, x, result)
        return result if result.dtype == dtype else result.to(dtype)

    def apply_adapter(self, adapter_name: str, x: Tensor, result: Tensor) -> Tensor:
        """Return `result + Δ(x)`. A method with decomposed adapters overrides this."""
        chain = self.delta_chain(adapter_name, x) if is_ordinary(x) else None
        if chain is None:
            return result + self.delta_activations(adapter_name, x)
        return add_to_output(self._modules["base_layer"], chain, result)

    def delta_chain(self, adapter_name: str, x: Tensor) -> Chain | None:
        """Return the delta as a chain of products, to compute together with the base layer's; None,
        decided before anything is computed, if the delta is more (dropout, hooks).
        """
        return None

    def delta_activations(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return the delta for any dense input of the base layer, by default by `delta_chain`."""
        chain = self.delta_chain(adapter_name, x)
        if chain is None:
            raise NotImplementedError(f"{type(self).__name__} states no delta for this input.")
        return chain.delta().reshape(*x.shape[:-1], self.out_features)

    def update_layer(self, adapter_name: str, *args: Any, **options: Any) -> None:
        """Make an adapter's parameters by its config, in place of any that it has."""
        raise NotImplementedError

    def get_delta_weight(self, adapter_name: str, **options: Any) -> Tensor:
        """Return the delta of the base weight, in its layout; by default from `delta_recipe`."""
        if type(self).delta_recipe is BaseTunerLayer.delta_recipe:
            raise PeftNotSupportedError(f"{type(self).__name__} has no delta to merge.")
        adapters.check_readable(self, adapter_name)
        return self.delta_recipe(adapter_name, **options).weight()

    def delta_recipe(self, adapter_name: str, **options: Any) -> Recipe:
        """Return `get_delta_weight` as a function of small tensors, which a merge keeps. By default
        it keeps the delta itself.
        """
        return Recipe(unchanged, (self.get_delta_weight(adapter_name, **options),))

    def decomposition(self, adapter_name: str) -> dora.Decomposition | None:
        """Return the norms of an adapter with weight decomposition (DoRA), None for others."""
        return None

    @property
    def needs_layer_alone(self) -> bool:
        """True if no other method can adapt the layer too, since norms would apply to its delta."""
        return any(self.decomposition(name) is not None for name in self.scaling)

    def merge_factor(self, adapter_name: str, scale: float) -> Tensor | None:
        """Return the number by which a merge multiplies weight plus delta; None for 1."""
        norms = self.decomposition(adapter_name)
        return None if norms is None else norms.weight_factor(self.geometry, scale)

    def merge_bias(self, adapter_name: str, scale: float) -> Tensor | None:
        """Return the tensor that a merge adds to the base layer's bias; None for nothing."""
        return None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether an adapter's delta is a matrix, and so has low-rank factors."""
        kind, base = type(self), BaseTunerLayer
        is_stated = kind.get_delta_weight is not base.get_delta_weight
        return is_stated or kind.delta_recipe is not base.delta_recipe

    def low_rank_factors(
        self, adapter_name: str, rank: int | float | None = None, **options: Any
    ) -> LowRank:
        """Return the delta as `B·A` of a rank or share of energy; None gives an exact product."""
        delta = self.geometry.as_stored(self.get_delta_weight(adapter_name, **options)).flatten(1)
        return cut(dense_svd(delta), rank, delta.dtype)

    def adapter_cost(self, adapter_name: str, config: Any) -> AdapterCost:
        """Return an adapter's cost on this layer, from shapes alone: by default one multiplication
        for each parameter and row, and any rank.
        """
        numbers = sum(parameter.numel() for parameter in self.adapter_parameters(adapter_name))
        return AdapterCost(numbers, min(self.geometry.out_features, self.geometry.columns))

    def rank_padding(self, container: str) -> RankPadding | None:
        """Return the dimension along which a container's tensors can be zero-padded, or None."""
        return None

    def get_base_layer(self) -> nn.Module:
        """Return the layer itself, below all adapters."""
        return innermost(self)

    @property
    def holder(self) -> nn.Module:
        """The module whose `weight` adapters are merged into."""
        return innermost(self)

    def apply_to_any(self, adapter_name: str, x: Tensor, result: Tensor) -> Tensor:
        """Return an output with an adapter applied; input and output may be nested tensors."""
        if not x.is_nested:
            return self.apply_adapter(adapter_name, dense(x), result)
        # Cloned since it may be written to, which a view of a nested tensor may not.
        tokens = as_tokens(result).clone()
        return nested_like(x, self.apply_to_tokens(adapter_name, x, as_tokens(x), tokens))

    def apply_to_tokens(
        self, adapter_name: str, nested: Tensor, x: Tensor, result: Tensor
    ) -> Tensor:
        """Apply an adapter to the tokens of a nested input: to `x [tokens, …, in]` and the output.
        A method that treats samples differently overrides this.
        """
        return self.apply_adapter(adapter_name, x, result)

    def apply_to_samples(
        self, adapter_name: str, samples: list[int], x: Tensor, result: Tensor, owner: Tensor | None
    ) -> Tensor:
        """Apply an adapter to the rows of some samples, given by number; `owner` has that of each
        row, None where each sample has the same number of rows, one after the other. A method that
        treats samples differently overrides this.
        """
        return self.apply_adapter(adapter_name, x, result)

    def apply_by_sample(
        self, batch: AdapterBatch, x: Tensor, result: Tensor, owners: RowOwners
    ) -> Tensor:
        """Apply each sample's own adapter to an output whose rows lie along the first dimension. A
        method that can apply several at once overrides this.
        """
        return apply_one_by_one(self, batch, x, result, owners)

    def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `x` in the adapter's dtype; `disable_input_dtype_casting` keeps a wider one."""
        narrows = dtype.itemsize < x.dtype.itemsize
        return x if narrows and not self.cast_input_dtype_enabled else x.to(dtype)

    def _chain_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `x` in the adapter's dtype, or as it is where kernels multiply two dtypes."""
        return x if x.dtype == dtype or can_stay(x, dtype) else self._cast_input_dtype(x, dtype)

    def _placement(self, given: Placement | None) -> Placement:
        """Return device and dtype for new parameters, by default the base layer's."""
        return given or placement(self.base_layer, autocast=True)

    def __getattr__(self, name: str) -> Any:
        """Read public attributes that this layer lacks (`weight`, …) from the adapted layer."""
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
        """Return the module's usual form, after the method's name."""
        return f"{type(self).__module__.split('.')[-2]}.{super().__repr__()}"

    @property
    def active_adapter(self) -> list[str]:
        """The active adapters, under the name that diffusers' `model.active_adapters()` reads."""
        return self.active_adapters

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        active = self._active_adapter
        return [active] if isinstance(active, str) else active

    @property
    def disable_adapters(self) -> bool:
        """True if the adapters are switched off."""
        return self._disable_adapters

    def _all_available_adapter_names(self) -> list[str]:
        return list(self.scaling)

    def containers(self) -> Iterator[nn.Module]:
        """Yield the containers of adapters' tensors."""
        return (self._modules[attribute] for attribute in self.container_names)

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of an adapter."""
        return (t for t in adapters.tensors_of(self, adapter_name) if isinstance(t, nn.Parameter))

    def adapter_tensors(self, adapter_name: str) -> Iterator[Tensor]:
        """Yield all tensors of an adapter, trainable or not."""
        return adapters.tensors_of(self, adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; they become trainable unless `inference_mode`, others are frozen."""
        self._freeze.forget()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        trained = [] if inference_mode else [name for name in names if name in self.scaling]
        self.set_requires_grad([n for n in adapters.unfrozen(self) if n not in trained], False)
        self.set_requires_grad(trained, True)
        self._active_adapter = adapter_names if isinstance(adapter_names, str) else names

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Unfreeze or freeze adapters, active or not."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for parameter in self.adapter_parameters(name):
                # With many adapters most are frozen and stay so.
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad and parameter.is_floating_point())

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters off, which freezes and unmerges them, or on, which undoes both;
        active ones are then computed in the forward and stay unmerged.
        """
        if not enabled and self.merged:
            with loaded_weights(self, self.merged_adapters):
                self._merges.suspend(self)
        if not enabled and not self._disable_adapters:
            names = adapters.unfrozen(self)
            trained = (p for name in names for p in self.adapter_parameters(name))
            self._freeze.begin(self.containers(), trained, names)
        elif enabled:
            self._freeze.end()
        self._disable_adapters = not enabled
        if enabled and (again := self._merges.suspended(self)):
            with loaded_weights(self, again):
                self._merges.resume(self, self._merges.lacks_suspended(self))

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete and deactivate an adapter, which must not be merged."""
        if adapter_name in self.merged_adapters:
            raise PeftValueError(
                f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please "
                "unmerge them first."
            )
        adapters.drop(self, adapter_name)
        if adapter_name in self.active_adapters:
            left = [name for name in self.active_adapters if name != adapter_name]
            self.set_adapter(left or self._all_available_adapter_names()[:1])
        self._merges.drop_suspended(self, adapter_name)

    def adopt_settings(self, adapter_name: str, fresh: BaseTunerLayer, fresh_name: str) -> None:
        """Copy settings of another layer's adapter, except tensors, plain values and scale."""

    def base_scaling(self, adapter_name: str) -> float:
        """Return the configured scale, which `unscale_layer` returns to."""
        return 1.0

    def hold_scale(self, adapter_name: str, scale: float) -> None:
        """Set an adapter's scale; in place if it is a tensor, which compiled models read."""
        if isinstance(present := self.scaling[adapter_name], Tensor):
            present.fill_(scale)
        else:
            self.scaling[adapter_name] = scale

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale to `scale` times its configured one, if the layer has it."""
        check_scale(scale)
        if adapter in self.scaling:
            self.hold_scale(adapter, scale * self.base_scaling(adapter))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters by a finite number, or raise."""
        check_scale(scale)
        for name in self.active_adapters:
            if name in self.scaling:
                self.hold_scale(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the active adapters' scale by a number, not 0; None returns to the configured."""
        if scale is not None:
            check_scale(scale, is_divisor=True)
        for name in self.active_adapters:
            if name in self.scaling:
                scaled = self.base_scaling(name) if scale is None else self.scaling[name] / scale
                self.hold_scale(name, scaled)

    @property
    def merged(self) -> bool:
        """True if any adapter's delta is in the base weight."""
        return bool(self.merged_adapters)

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, **options: object
    ) -> None:
        """Add adapters' deltas to the base weight. `unmerge` restores it exactly, even if the
        adapters change meanwhile: see `merges.py`.

        Args:
            safe_merge: Check that no resulting weight is NaN or infinite.
            adapter_names: The adapters, by default the active ones. Merged ones are skipped with a
                warning.
            **options: Passed to `get_delta_weight`.

        Raises:
            PeftValueError: A weight would be NaN, or an adapter is merged with other options;
                nothing was changed.
            PeftNotSupportedError: The weight's storage format is unknown, or the method can't be
                merged.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        wanted = {n: options for n in checked_names(names) if n in self.scaling}
        new = self._merges.missing(self, wanted)
        warn_of_merged([name for name in wanted if name not in new], list(new))
        self.check_mergeable(list(new))
        self._merges.merge(self, new, safe_merge)

    def unmerge(self, adapter_names: Collection[str] | None = None) -> None:
        """Subtract the deltas of some, by default all, merged adapters from the base weight. Merges
        of these that disabling suspended are forgotten. Without any merge the weight is bit for bit
        the original, quantized or not.

        Raises:
            PeftRuntimeError: A loaded state dict had them merged and lacks the original weight.
        """
        suspended = self._merges.suspended(self)
        gone = suspended if adapter_names is None else suspended.intersection(adapter_names)
        self._merges.drop_suspended(self, *gone)
        if self.merged:
            self.take_off(adapter_names)
        elif not gone:
            warn("Already unmerged. Nothing to do.")

    def check_mergeable(self, adapter_names: Sequence[str]) -> None:
        """Raise if adapters can't be merged into this layer, whatever their values."""
        quantized_format(self.holder)
        merged = [*(merge.name for merge in self._merges.entries), *adapter_names]
        check_order(self._merges.stack(self), merged)

    @property
    def has_merges(self) -> bool:
        """True if anything is merged into the base weight, by any layer around it."""
        return bool(self._merges.entries)

    def note_merges(self, adapter_names: list[str]) -> None:
        """Record the adapters that are merged now."""
        self.merged_adapters[:] = adapter_names

    def take_off(self, adapter_names: Collection[str] | None = None) -> list[Merge]:
        """Unmerge adapters, by default all, and return their merges; `put_on` merges them again."""
        names = self.merged_adapters if adapter_names is None else adapter_names
        return self._merges.remove(self.holder, names, self)

    def put_on(self, merges: Sequence[Merge]) -> None:
        """Merge again the adapters that `take_off` unmerged."""
        self._merges.add(self.holder, merges)

    def unmerged_weight(self) -> Tensor:
        """Return the dequantized base weight without merges, bit for bit the original."""
        return self._merges.original(self.holder)

    def _save_to_state_dict(
        self, destination: dict[str, object], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._merges.save_metadata(self, destination, prefix)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, object],
        prefix: str,
        local_metadata: Mapping[str, object],
        *args: object,
    ) -> None:
        """Record the merges that a loaded weight was saved with."""
        self._merges.load_metadata(self, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BaseTunerLayer:
        """Cast or move the layer. Unmerging gives the original weight cast or moved."""
        apply = super()._apply
        if self.merged and recurse:
            return self._merges.converted(self.holder, lambda: apply(fn), fn)
        return apply(fn, recurse)
