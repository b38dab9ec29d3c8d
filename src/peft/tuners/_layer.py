# SPDX-License-Identifier: Apache-2.0
"""`BaseTunerLayer`: a layer with adapters. Its forward, merging, switching and deleting are written here, once for all methods.

A method's layer declares where it keeps what belongs to an adapter and supplies three things: `update_layer` makes an adapter's
parameters, `delta_activations` computes what the adapter adds to the output, `get_delta_weight` what it adds to the weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..utils.adapter_batch import ADAPTER_BATCHES, AdapterBatch
from ..utils.error import PeftNotSupportedError, PeftTypeError, PeftValueError
from . import _merging
from ._geometry import Geometry, Placement, dense_weight, geometry, innermost, placement, quantised_form, stored_weight
from ._quantised import Form as QuantisedForm


class AdapterParameterDict(nn.ParameterDict):
    """Parameters by adapter name, read by a call: `self.lokr_w1(adapter_name)`.

    Being called as a module is what lets libraries that move weights in just before a forward (offloading, sharding) see that
    they are needed; a plain `ParameterDict` is read behind their back.
    """

    __call__ = nn.Module.__call__

    def forward(self, adapter_name: str) -> nn.Parameter:
        return self[adapter_name]


class BaseTunerLayer(nn.Module):
    """A layer `base_layer` with any number of adapters, of which the active ones add up: `y = base(x) + Σ Δ(x)`.

    Args:
        base_layer: The layer to adapt. It stays as it is, below this one.

    Attributes:
        adapter_layer_names: Attributes that hold parameters or modules by adapter name.
        other_param_names: Attributes that hold plain values by adapter name.
        base_layer: The adapted layer.
        scaling: Factor on each adapter's output, by name; its keys are the adapters this layer has.
        merged_adapters: Adapters whose delta is in the base weight at present, in the order they were merged.
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        size = geometry(base_layer)
        if size is not None:
            self.in_features, self.out_features = size.in_features, size.out_features
            self.geometry: Geometry = size
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self._paused: list[nn.Parameter] = []
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

    def get_delta_weight(self, adapter_name: str, **options: Any) -> Tensor:
        """What the adapter adds to the base weight, in the base weight's layout."""
        raise PeftNotSupportedError(f"{type(self).__name__} has no delta that could be merged into a weight.")

    def base_scaling(self, adapter_name: str) -> float:
        """The factor that `scaling` starts from and `unscale_layer` returns to."""
        return 1.0

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus that of the active adapters, in the base output's dtype. Where the call chose an adapter for
        each sample, that one's part is added to the sample's rows instead.
        """
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters or self.merged_adapters:
            return result
        batch = ADAPTER_BATCHES.current
        if batch is not None:
            return self._apply_by_sample(batch, x, result)
        dtype = result.dtype
        for adapter_name in self.active_adapters:
            if adapter_name in self.scaling:
                result = self.apply_adapter(adapter_name, x, result)
        return result.to(dtype)

    def apply_adapter(self, adapter_name: str, x: Tensor, result: Tensor) -> Tensor:
        """`result` with the adapter's part; a method whose part is not a sum overrides this."""
        return result + self.delta_activations(adapter_name, x)

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
        """`x` in the adapter's precision, unless `helpers.disable_input_dtype_casting` turned that off."""
        return x.to(dtype) if self.cast_input_dtype_enabled else x

    def __getattr__(self, name: str) -> Any:
        """What this layer lacks is read from the layer it adapts (`weight`, `bias`, `stride`, …), private names apart."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    # --- adapters and which of them are active ------------------------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        """The layer itself, below all adapters."""
        return innermost(self)

    @property
    def active_adapter(self) -> list[str]:
        """The same as `active_adapters`, by the name that diffusers' `model.active_adapters()` reads."""
        return self.active_adapters

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are switched off."""
        return self._disable_adapters

    @property
    def merged(self) -> bool:
        """Whether any adapter's delta is in the base weight."""
        return bool(self.merged_adapters)

    def _all_available_adapter_names(self) -> list[str]:
        return list(self.scaling)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones; they become trainable unless `inference_mode`, the others are frozen."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._paused = []
        for name in self.scaling:
            self.set_requires_grad(name, name in names and not inference_mode)
        self._active_adapter = adapter_names if isinstance(adapter_names, str) else names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Unfreeze or freeze adapters, active or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(requires_grad and parameter.is_floating_point())

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """The parameters that belong to an adapter."""
        for attribute in self.adapter_layer_names:
            container = getattr(self, attribute)
            if adapter_name in container:
                entry = container[adapter_name]
                yield from entry.parameters() if isinstance(entry, nn.Module) else (entry,)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters off, which also freezes them, or on, which unfreezes those that were frozen by that."""
        if not enabled and not self._disable_adapters:
            every = [p for name in self.scaling for p in self.adapter_parameters(name)]
            self._paused = [p for p in every if p.requires_grad]
            for parameter in self._paused:
                parameter.requires_grad_(False)
        elif enabled:
            for parameter in self._paused:
                parameter.requires_grad_(True)
            self._paused = []
        self._disable_adapters = not enabled

    def adopt(self, fresh: BaseTunerLayer) -> None:
        """Take over the adapters of another layer of this class that was made for the same base layer."""
        for attribute in (*self.adapter_layer_names, *self.other_param_names, "scaling"):
            container = getattr(self, attribute)
            for adapter_name, entry in getattr(fresh, attribute).items():
                container[adapter_name] = entry

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, which is then active no more.

        Raises:
            PeftValueError: It is merged.
        """
        if adapter_name in self.merged_adapters:
            raise PeftValueError(f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please unmerge them first.")
        for attribute in (*self.adapter_layer_names, *self.other_param_names, "scaling"):
            container = getattr(self, attribute)
            if adapter_name in container:
                del container[adapter_name]
        if adapter_name in self.active_adapters:
            left = [name for name in self.active_adapters if name != adapter_name]
            self.set_adapter(left or self._all_available_adapter_names()[:1])

    # --- scale --------------------------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale to `scale` times its configured one; an adapter this layer lacks is passed over."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.base_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for adapter_name in self.active_adapters:
            if adapter_name in self.scaling:
                self.scaling[adapter_name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters by `scale`; None returns to the configured one."""
        for adapter_name in self.active_adapters:
            if adapter_name in self.scaling:
                if scale is None:
                    self.scaling[adapter_name] = self.base_scaling(adapter_name)
                else:
                    self.scaling[adapter_name] /= scale

    # --- merging ------------------------------------------------------------------------------------------------------

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
        if safe_merge:
            self.check_merge(names, **options)
        base = self.get_base_layer()
        form = quantised_form(base)
        if form is not None:
            self._merge_quantised(form, names, options)
            return
        for adapter_name in names:
            delta = self.get_delta_weight(adapter_name, **options)
            merged, correction = _merging.add(stored_weight(base), delta)
            base.weight.data = merged
            self._merges[adapter_name] = (options, self.scaling[adapter_name], correction)
            self.merged_adapters.append(adapter_name)

    @torch.no_grad()
    def _merge_quantised(self, form: QuantisedForm, names: Sequence[str], options: dict[str, Any]) -> None:
        """Merge into a quantised weight, starting from the original even if adapters are merged already: it is rounded once."""
        base = self.get_base_layer()
        before = form.get(base)
        original = self._merges[self.merged_adapters[0]][2] if self.merged else before
        added = {name: (options, self.scaling[name], original) for name in names}
        form.put(base, original)
        try:
            weight = form.read(base)
            for adapter_name, (own, scale, _) in {**self._merges, **added}.items():
                weight += self._delta_at(adapter_name, own, scale)
            merged = form.pack(base, weight)
        finally:
            form.put(base, before)
        form.put(base, merged)
        self._merges.update(added)
        self.merged_adapters.extend(names)

    def check_merge(self, adapter_names: Sequence[str], **options: Any) -> None:
        """Check that merging adapters is possible and would leave a finite weight, without changing anything."""
        base = self.get_base_layer()
        weight = dense_weight(base) if quantised_form(base) is not None else stored_weight(base)
        for adapter_name in adapter_names:
            if adapter_name in self.scaling:
                weight, _ = _merging.add(weight, self.get_delta_weight(adapter_name, **options))
                if not torch.isfinite(weight.float()).all():
                    message = f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken"
                    raise PeftValueError(f"{message}; nothing was merged.")

    def unmerge(self) -> None:
        """Take all merged adapters' deltas off the base weight again, which is then to the bit what it was, quantised or not."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        form = quantised_form(base)
        if form is not None:
            form.put(base, self._merges[self.merged_adapters[0]][2])
            self.merged_adapters.clear()
            self._merges.clear()
        while self.merged_adapters:
            adapter_name = self.merged_adapters[-1]
            options, scale, correction = self._merges[adapter_name]
            delta = self._delta_at(adapter_name, options, scale)
            base.weight.data = _merging.subtract(stored_weight(base), delta, correction)
            self.merged_adapters.pop()
            del self._merges[adapter_name]

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


def names_to_merge(layer: Any, adapter_names: Sequence[str] | None) -> list[str]:
    """The adapters to merge into a layer (or into all layers of a tuner): those named, by default the active ones, less those
    merged already, which a warning names.
    """
    if isinstance(adapter_names, str):
        raise PeftTypeError(f"`adapter_names`={adapter_names!r} should be a list of strings.")
    names = list(layer.active_adapters) if adapter_names is None else list(adapter_names)
    merged = [name for name in names if name in layer.merged_adapters]
    if merged:
        left = [name for name in names if name not in merged]
        if left:
            warnings.warn(
                f"Already following adapters were merged {','.join(merged)}. You are now additionally merging {','.join(left)}.",
                stacklevel=3,
            )
        else:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
        return left
    return names
