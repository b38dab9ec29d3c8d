# SPDX-License-Identifier: Apache-2.0
"""`BaseTunerLayer`: a layer with adapters. Its forward, merging, switching and deleting are written here, once for all methods.

A method's layer declares where it keeps what belongs to an adapter and supplies three things: `update_layer` makes an adapter's
parameters, `delta_activations` computes what the adapter adds to the output, `get_delta_weight` what it adds to the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.adapter_batch import ADAPTER_BATCHES, AdapterBatch
from ..utils.error import PeftNotSupportedError, PeftValueError
from ..utils.rank_room import RankRoom
from ..utils.sharding import is_managed, whole
from ..utils.warning import warn
from . import _merging
from ._accumulate import Steps, add_steps, is_plain_product, may_write_to_output, run_with_steps
from ._cost import AdapterCost, columns
from ._geometry import (
    Geometry,
    Placement,
    dense_weight,
    geometry,
    innermost,
    placement,
    put_weight,
    quantised_form,
    stored_weight,
    table,
)
from ._holder import AdapterHolder
from ._lowrank import LowRank, cut, dense_svd
from ._merging import names_to_merge
from ._quantised import Form as QuantisedForm
from ._thin import can_stay


class BaseTunerLayer(AdapterHolder):
    """A layer `base_layer` with any number of adapters, of which the active ones add up: `y = base(x) + Σ Δ(x)`.

    Args:
        base_layer: The layer to adapt. It stays as it is, below this one.

    Attributes:
        base_layer: The adapted layer; the others as for `AdapterHolder`.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        size = geometry(base_layer) or table(base_layer)
        if size is not None:
            self.in_features, self.out_features = size.in_features, size.out_features
            self.geometry: Geometry = size
        self._merges: dict[str, tuple[dict[str, Any], float, Any]] = {}  # options, scale, and what brings the weight back
        self.cast_input_dtype_enabled = True
        self.training = base_layer.training

    # --- what a method supplies ---------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, *args: Any, **options: Any) -> None:
        """Make (or make anew) an adapter's parameters, as its config says."""
        raise NotImplementedError

    def delta_activations(self, adapter_name: str, x: Tensor) -> Tensor:
        """What the adapter adds to the output for input `x`."""
        raise NotImplementedError

    def delta_steps(self, adapter_name: str, x: Tensor) -> Steps | None:
        """`delta_activations` as steps from its first matrix product to its last, which are then taken together with the base
        layer's; None, before anything is computed, where it is not to be had so.
        """
        return None

    def get_delta_weight(self, adapter_name: str, **options: Any) -> Tensor:
        """What the adapter adds to the base weight, in the base weight's layout."""
        raise PeftNotSupportedError(f"{type(self).__name__} has no delta that could be merged into a weight.")

    @property
    def needs_layer_alone(self) -> bool:
        """Whether another method can't adapt the same layer: an adapter's part is not a sum."""
        return False

    def merge_factor(self, adapter_name: str, scale: float) -> Tensor | None:
        """What merging multiplies the sum of weight and delta by, None for nothing; for a method whose part is not a sum."""
        return None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter's delta is a matrix, of which there are low-rank factors."""
        return type(self).get_delta_weight is not BaseTunerLayer.get_delta_weight

    def low_rank_factors(self, adapter_name: str, rank: int | float | None = None, **options: Any) -> LowRank:
        """The adapter's delta as `B·A` of a rank: an integer, the share of energy to keep, or None for exact. A method whose delta
        is low rank by its structure overrides this.
        """
        delta = self.geometry.as_stored(self.get_delta_weight(adapter_name, **options))  # [out, in, *kernel]
        return cut(dense_svd(delta.flatten(1)), rank, delta.dtype)

    def adapter_cost(self, adapter_name: str, config: Any) -> AdapterCost:
        """What an adapter costs here, from shapes alone. By default each of its numbers is multiplied once for a row, and its delta
        can have any rank; a method that knows better overrides this.
        """
        numbers = sum(parameter.numel() for parameter in self.adapter_parameters(adapter_name))
        return AdapterCost(numbers, min(self.geometry.out_features, columns(self.geometry)))

    def rank_room(self, holder: str) -> RankRoom | None:
        """Where a container's tensors can be filled up with zeros without a change to the delta; None if they can't be."""
        return None

    # --- base layer -----------------------------------------------------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        """The layer itself, below all adapters."""
        return innermost(self)

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus that of the active adapters, in the base output's dtype. Where the call chose an adapter for
        each sample, that one's part is added to the sample's rows instead.
        """
        base: Any = self._modules["base_layer"]
        if self._disable_adapters or self.merged_adapters:
            if self._disable_adapters and self.merged_adapters:
                self.unmerge()
            return base(x, *args, **kwargs)
        batch = ADAPTER_BATCHES.current
        if batch is not None:
            return self._apply_by_sample(batch, x, base(x, *args, **kwargs))
        active, scaling = self._active_adapter, self.scaling
        names = [name for name in ((active,) if isinstance(active, str) else active) if name in scaling]
        together = names and not (args or kwargs) and is_plain_product(base, x)
        steps = self.delta_steps(names[0], x) if together else None
        if steps is None:
            result = base(x, *args, **kwargs)
            dtype = result.dtype
        else:
            result, dtype, names = run_with_steps(base, x, steps), x.dtype, names[1:]
        for adapter_name in names:
            result = self.apply_adapter(adapter_name, x, result)
        return result if result.dtype == dtype else result.to(dtype)

    def apply_adapter(self, adapter_name: str, x: Tensor, result: Tensor) -> Tensor:
        """`result` with the adapter's part; a method whose part is not a sum overrides this."""
        steps = self.delta_steps(adapter_name, x)
        if steps is None:
            return result + self.delta_activations(adapter_name, x)
        return add_steps(steps, result, may_write_to_output(self._modules["base_layer"]))  # type: ignore[arg-type]

    def apply_to_samples(self, adapter_name: str, samples: list[int], x: Tensor, result: Tensor) -> Tensor:
        """`apply_adapter` for the rows of some of a call's samples; a method that knows something of each sample overrides this."""
        return self.apply_adapter(adapter_name, x, result)

    def _apply_by_sample(self, batch: AdapterBatch, x: Tensor, result: Tensor) -> Tensor:
        """`result` with each sample's adapter applied to its rows: a gather for each adapter, one scatter for all."""
        own = {name: rows for name, rows in batch.rows(x).items() if name in self.scaling}
        if not own:
            return result
        parts = [
            self.apply_to_samples(name, batch.samples[name], x[rows], result[rows]).to(result.dtype) for name, rows in own.items()
        ]
        return result.index_copy(0, torch.cat(list(own.values())), torch.cat(parts))

    def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` in the adapter's precision, but where `helpers.disable_input_dtype_casting` says so not in a narrower one than its
        own: that is for storage then.
        """
        return x.to(dtype) if self.cast_input_dtype_enabled or dtype.itemsize >= x.dtype.itemsize else x

    def _input_of_steps(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` in the adapter's precision, or as it is where the products with it are taken so."""
        return x if x.dtype == dtype or can_stay(x, dtype) else self._cast_input_dtype(x, dtype)

    def __getattr__(self, name: str) -> Any:
        """What this layer lacks is read from the layer it adapts (`weight`, `bias`, `stride`, …), private names apart."""
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
        if not enabled and self.merged and is_managed(self.weight):
            self.unmerge()  # in the forward it would be done to a copy that the engine gathered
        super().enable_adapters(enabled)

    # --- merging ------------------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether any adapter's delta is in the base weight."""
        return bool(self.merged_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, **options: Any) -> None:
        """Add adapters' deltas to the base weight.

        A quantised weight is read, summed in float32 and quantised once more in its own form; the original stays in memory until
        it is unmerged: a second copy of the packed weight, half a byte a number in 4 bits, one byte in 8.

        Args:
            safe_merge: Check first that no resulting weight is NaN or infinite.
            adapter_names: Which adapters, by default the active ones; those merged already are passed over with a warning.
            **options: Passed to `get_delta_weight`.

        Raises:
            PeftValueError: `safe_merge` found a broken weight; nothing was changed.
            PeftNotSupportedError: The layer's weight is quantised in a form not known here, or the method can't be merged.
        """
        names = [name for name in names_to_merge(self, adapter_names) if name in self.scaling]
        self.check_mergeable(names)
        if safe_merge:
            self.check_merge(names, **options)
        base = self.get_base_layer()
        form = quantised_form(base)
        if form is not None:
            self._merge_quantised(form, names, options)
            return
        for adapter_name in names:
            delta, scale = self.get_delta_weight(adapter_name, **options), float(self.scaling[adapter_name])
            merged, correction = _merging.add(whole(stored_weight(base)), delta, self.merge_factor(adapter_name, scale))
            put_weight(base, merged)
            self._merges[adapter_name] = (options, scale, correction)
            self.merged_adapters.append(adapter_name)

    @torch.no_grad()
    def _merge_quantised(self, form: QuantisedForm, names: Sequence[str], options: dict[str, Any]) -> None:
        """Merge into a quantised weight, starting from the original even if adapters are merged already: it is rounded once."""
        base = self.get_base_layer()
        before = form.get(base)
        original = self._merges[self.merged_adapters[0]][2] if self.merged else before
        added = {name: (options, float(self.scaling[name]), original) for name in names}
        form.put(base, original)
        try:
            weight = form.read(base)
            for adapter_name, (own, scale, _) in {**self._merges, **added}.items():
                weight += self._delta_at(adapter_name, own, scale)
                factor = self.merge_factor(adapter_name, scale)
                weight *= 1 if factor is None else factor
            merged = form.pack(base, weight)
        finally:
            form.put(base, before)
        form.put(base, merged)
        self._merges.update(added)
        self.merged_adapters.extend(names)

    def check_mergeable(self, adapter_names: Sequence[str]) -> None:
        """Raise if adapters can't be merged into this layer, whatever their values."""
        quantised_form(self.get_base_layer())

    def check_merge(self, adapter_names: Sequence[str], **options: Any) -> None:
        """Check that merging adapters is possible and would leave a finite weight, without changing anything."""
        base = self.get_base_layer()
        weight = dense_weight(base) if quantised_form(base) is not None else whole(stored_weight(base))
        for adapter_name in adapter_names:
            if adapter_name in self.scaling:
                factor = self.merge_factor(adapter_name, float(self.scaling[adapter_name]))
                weight, _ = _merging.add(weight, self.get_delta_weight(adapter_name, **options), factor)
                if not torch.isfinite(weight.float()).all():
                    message = f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken"
                    raise PeftValueError(f"{message}; nothing was merged.")

    def unmerge(self) -> None:
        """Take all merged adapters' deltas off the base weight again, which is then to the bit what it was, quantised or not."""
        if not self.merged:
            warn("Already unmerged. Nothing to do.")
            return
        base = self.get_base_layer()
        form = quantised_form(base)
        if form is not None:
            form.put(base, self._merges[self.merged_adapters[0]][2])
        else:
            put_weight(base, self.unmerged_weight())
        self.merged_adapters.clear()
        self._merges.clear()

    @torch.no_grad()
    def unmerged_weight(self) -> Tensor:
        """The base weight in numbers, to the bit as it is while nothing is merged."""
        base = self.get_base_layer()
        form = quantised_form(base)
        if form is not None:
            before = form.get(base)
            form.put(base, self._merges[self.merged_adapters[0]][2] if self.merged else before)
            try:
                return form.read(base)
            finally:
                form.put(base, before)
        weight = whole(stored_weight(base))
        for adapter_name in reversed(self.merged_adapters):
            options, scale, correction = self._merges[adapter_name]
            weight = _merging.subtract(weight, self._delta_at(adapter_name, options, scale), correction)
        return weight

    def _delta_at(self, adapter_name: str, options: dict[str, Any], scale: float) -> Tensor:
        """The delta that was merged: with the scale of then, whatever it is now."""
        scale, self.scaling[adapter_name] = self.scaling[adapter_name], scale
        try:
            return self.get_delta_weight(adapter_name, **options)
        finally:
            self.scaling[adapter_name] = scale

    # --- making parameters --------------------------------------------------------------------------------------------

    def _placement(self, given: Placement | None) -> Placement:
        """Where to make parameters: as given, else as the base layer's."""
        return given or placement(self.base_layer, autocast=True)


def layer_of(module: nn.Module, layer_cls: type[BaseTunerLayer]) -> BaseTunerLayer | None:
    """The layer of a class among those around one base layer, from `module` inwards; None if there is none."""
    while not isinstance(module, layer_cls):
        if not isinstance(module, BaseTunerLayer):
            return None
        module = module.base_layer
    return module
