# SPDX-License-Identifier: Apache-2.0
"""`LoraLayer`: a layer with LoRA adapters, DoRA's norms included; the math is in `factors.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base.calls.adapter_batch import AdapterBatch
from ...base.calls.rows import RowOwners
from ...base.containers import AdapterModuleDict
from ...base.errors import PeftNotSupportedError
from ...base.geometry import Placement
from ...base.modules import on_accelerator
from ...base.tensors import check_values
from ...checkpoint.rank_padding import RankPadding
from ...core import dora
from ...core.adapters import AdapterParameterDict
from ...core.base_layer import geometry, innermost
from ...core.layer import BaseTunerLayer
from ...core.method_info import AdapterCost, low_rank_cost
from ...core.weights import base_weight
from ...integrations.accelerate import is_offloaded
from ...integrations.distributed import gathered_tensor
from ...ops.dispatch import is_autocast
from ...ops.exact_merge import Recipe, scaled_product
from ...ops.inference_cache import is_running_often, reuse
from ...ops.low_rank import LowRank, approximate, cut, dense_svd
from ...ops.mixed_precision import scaled
from .activation import on_all_rows, row_scales
from .config import LoraConfig
from .factors import Factors, draw, grouped_row_norms, row_norms
from .starts.loftq import QuantizedWeight

_Factor: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class Magnitude(nn.Module):
    """DoRA's trained norms of the weight's rows."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        """Return the norms, by a call that offloading and sharding libraries see."""
        return gathered_tensor(self.weight)


class Start(nn.Module):
    """Factors `A₀ [r, in]` and `B₀ [out, r]` that an adapter starts with. Their product, which
    follows from the base weight, is subtracted from its delta. They are not in a state dict.
    """

    A: Tensor
    B: Tensor

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        self.register_buffer("A", factors.A, persistent=False)
        self.register_buffer("B", factors.B, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `B₀·A₀·x`."""
        return F.linear(F.linear(x, self.A), self.B)


class LoraLayer(BaseTunerLayer):
    """A layer with LoRA adapters, `ΔW = s · B·A`, or with DoRA adapters,
    `W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖` row by row.

    Attributes:
        lora_A, lora_B: Modules that map `in → r` and `r → out`, by adapter name.
        lora_embedding_A, lora_embedding_B: `[r, tokens]` and `[dim, r]` by adapter name, where the
            layer is an embedding.
        lora_magnitude_vector: DoRA's `m` by adapter name, with one entry for each output feature.
        lora_dropout: Dropout on the input by adapter name.
        lora_start: `Start` of each adapter that starts from the base weight, by adapter name.
        r, lora_alpha, use_rslora, use_dora, lora_bias: As in the configs, by adapter name.

    Source: arXiv:2106.09685, section 4.1; arXiv:2402.09353, section 4
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = (
        "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
    )  # fmt: skip
    other_param_names: ClassVar[tuple[str, ...]] = (
        "r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias",
    )  # fmt: skip
    value_names: ClassVar[tuple[str, ...]] = (
        "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "lora_bias", "lora_start",
        "alora_invocation_tokens",
    )  # fmt: skip

    # The weight that takes the base weight's place when a new adapter is put into the model.
    quantized_weight: QuantizedWeight | None = None
    # The scale of an adapter whose alpha is its rank.
    unit_scale: ClassVar[float] = 1.0

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any
    ) -> None:
        super().__init__(base_layer)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.use_dora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        self.alora_invocation_tokens: dict[str, list[int]] = {}  # of activated adapters only
        self.lora_dropout: AdapterModuleDict[nn.Module] = AdapterModuleDict()
        self.lora_A: AdapterModuleDict[_Factor] = AdapterModuleDict()
        self.lora_B: AdapterModuleDict[_Factor] = AdapterModuleDict()
        self.lora_embedding_A = AdapterParameterDict()
        self.lora_embedding_B = AdapterParameterDict()
        self.lora_magnitude_vector: AdapterModuleDict[Magnitude] = AdapterModuleDict()
        self.lora_start: AdapterModuleDict[Start] = AdapterModuleDict()
        self.update_layer(adapter_name, config, **options)
        self.set_adapter(adapter_name)
        for name in ("lora_dropout", "lora_start"):
            getattr(self, name).train(self.training)

    def update_layer(
        self,
        adapter_name: str,
        config: LoraConfig,
        r: int | None = None,
        lora_alpha: float | None = None,
        placement: Placement | None = None,
        initialize: bool = True,
        start: Factors | None = None,
    ) -> None:
        """Make an adapter's factors. What is not given is the config's or the base layer's.

        `start` is the start of an adapter that has it in its file.
        """
        self.r[adapter_name] = r or config.r
        self.lora_alpha[adapter_name] = config.lora_alpha if lora_alpha is None else lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = config.use_dora
        self.lora_bias[adapter_name] = config.lora_bias
        self.alora_invocation_tokens.pop(adapter_name, None)
        if config.alora_invocation_tokens:
            self.alora_invocation_tokens[adapter_name] = config.alora_invocation_tokens
        self.scaling[adapter_name] = self.base_scaling(adapter_name)
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout[adapter_name] = dropout.train(self.training)
        place = self._placement(placement)
        self._make(adapter_name, place)
        if initialize:
            self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        if config.starts_from_weight:
            self._start_from_weight(adapter_name, config, initialize, start)
        if config.use_dora:
            self.lora_magnitude_vector[adapter_name] = Magnitude(
                self._first_magnitude(adapter_name, place, initialize, config)
            )

    @property
    def fan_in_fan_out(self) -> bool:
        """True if the base weight is stored `[in, out]`."""
        return self.geometry.transposed

    def base_scaling(self, adapter_name: str) -> float:
        """Return `lora_alpha / r`, or `lora_alpha / √r` with `use_rslora`."""
        r = self.r[adapter_name]
        unit = math.sqrt(r) if self.use_rslora[adapter_name] else r
        return self.unit_scale * self.lora_alpha[adapter_name] / unit

    def _make(self, adapter_name: str, place: Placement) -> None:
        """Make an adapter's factors without values; those of a convolution are convolutions."""
        r, biased = self.r[adapter_name], self.lora_bias[adapter_name]
        if not self.geometry.is_conv:
            self.lora_A[adapter_name] = empty_linear(self.in_features, r, False, place)
            self.lora_B[adapter_name] = empty_linear(r, self.out_features, biased, place)
            return
        base: Any = self.get_base_layer()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(self.geometry.kernel_size) - 1]
        options = {
            name: getattr(base, name) for name in ("stride", "padding", "dilation", "padding_mode")
        }
        self.lora_A[adapter_name] = nn.utils.skip_init(
            kind, base.in_channels, r, base.kernel_size, bias=False, **options, **place._asdict()
        )
        self.lora_B[adapter_name] = nn.utils.skip_init(
            kind, r, base.out_channels, 1, groups=base.groups, bias=biased, **place._asdict()
        )

    def reset_lora_parameters(
        self, adapter_name: str, init_lora_weights: bool | str = True
    ) -> None:
        """Draw an adapter's factors again."""
        is_named = init_lora_weights in ("gaussian", "orthogonal")
        how = init_lora_weights if is_named else bool(init_lora_weights)
        A, B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        draw(A.weight, B.weight, how)
        if B.bias is not None:
            bound = 0.0 if how else 1 / math.sqrt(self.r[adapter_name])
            nn.init.uniform_(B.bias, -bound, bound)

    def factors(self, adapter_name: str) -> Factors:
        """Return an adapter's `A [r, in · taps]` and `B [out, r]`, with its start in the same
        product; for a convolution in groups `B [out, r / groups]`.
        """
        A, B = self._weights(adapter_name)
        if adapter_name not in self.lora_start:
            return Factors(A.flatten(1), B.flatten(1))
        start = self.lora_start[adapter_name]
        return Factors(torch.cat([A, start.A]), torch.cat([B, -start.B], dim=1))

    def _weights(self, adapter_name: str) -> Factors:
        """Return the weights of the modules that hold `A` and `B`."""
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        return Factors(gathered_tensor(A), gathered_tensor(B))

    def _delta(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return `s·B·A·x` for an input after dropout."""
        h = self.lora_A[adapter_name](x)
        scale = self._scale(adapter_name, x, h.dtype)
        if self.lora_bias[adapter_name]:
            return self.lora_B[adapter_name](h) * scale
        return self.lora_B[adapter_name](scaled(h, scale))

    def _scale(
        self, adapter_name: str, x: Tensor, dtype: torch.dtype, flat: bool = False
    ) -> float | Tensor:
        """Return an adapter's scale; for an activated one that of each row of the input,
        `[*leading, 1]`, or `[rows, 1]` if `flat`.
        """
        scale = self.scaling[adapter_name]
        if adapter_name not in self.alora_invocation_tokens:
            return scale
        return row_scales(self, adapter_name, x, dtype, scale, flat)

    def apply_by_sample(
        self, batch: AdapterBatch, x: Tensor, result: Tensor, owners: RowOwners
    ) -> Tensor:
        """Apply each sample's own adapter, an activated one to its active rows."""
        if not any(name in self.alora_invocation_tokens for name in batch.samples):
            return super().apply_by_sample(batch, x, result, owners)
        turned = x.transpose(0, 1) if owners.sequence_first else x
        weights = row_scales(self, None, turned, torch.bool)
        if not isinstance(weights, Tensor):  # the call does not tell where they are active
            others = batch.samples.keys() - self.alora_invocation_tokens.keys()
            batch = batch.subset({name: batch.samples[name] for name in others})
            return super().apply_by_sample(batch, x, result, owners)
        with on_all_rows():
            changed = super().apply_by_sample(batch, x, result, owners)
        weights = weights.transpose(0, 1) if owners.sequence_first else weights
        return torch.where(weights, changed, result)

    def _start_from_weight(
        self, adapter_name: str, config: LoraConfig, initialize: bool, start: Factors | None
    ) -> None:
        """Set an adapter to a part of the base weight, and record the part."""

    def delta_activations(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return `s·B·A·x`, with dropout on `x` in training, by calls of the modules."""
        return self._delta(adapter_name, self._dropped(adapter_name, x))

    def _dropped(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return the input in the adapter's dtype, after dropout."""
        A = self.lora_A[adapter_name]
        if isinstance(A.weight, Tensor):  # `quantize_dynamic` makes a method of it
            if not (A.weight.is_meta and is_offloaded(A)):
                check_values(A.weight, x)
            x = self._cast_input_dtype(x, A.weight.dtype)
        return self.lora_dropout[adapter_name](x) if self._drops(adapter_name) else x

    def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype in (torch.float16, torch.bfloat16) and is_autocast(x):
            return x  # autocast would cast it back before the first product
        return super()._cast_input_dtype(x, dtype)

    def _drops(self, adapter_name: str) -> bool:
        dropout = self._modules["lora_dropout"]._modules[adapter_name]
        return dropout.training and not isinstance(dropout, nn.Identity)

    def apply_adapter(self, adapter_name: str, x: Tensor, result: Tensor) -> Tensor:
        """Return `result + Δ(x)` or, with DoRA, `f ⊙ (result - b + s·B·A·x) + b`.

        With dropout in training, DoRA computes the base output's part from the dropped input `x'`
        too: `result + (f - 1) ⊙ W·x' + f ⊙ s·B·A·x'`. Several such adapters apply one after the
        other.

        Source: arXiv:2402.09353, eq. 5 and 11 (the norm has no gradient)
        """
        decomposition = self.decomposition(adapter_name)
        if decomposition is None:
            return super().apply_adapter(adapter_name, x, result)
        dropped = self._dropped(adapter_name, x)
        factor = decomposition.factor(self.scaling[adapter_name])
        if not self._drops(adapter_name):
            return dora.rescaled(self, result + self._delta(adapter_name, dropped), factor)
        factor = dora.by_channel(self, factor)
        base = dora.output_without_bias(self, dropped.to(x.dtype))
        return result + (factor - 1) * base + factor * self._delta(adapter_name, dropped)

    def decomposition(self, adapter_name: str) -> dora.Decomposition | None:
        """Return the norms of a DoRA adapter."""
        if adapter_name not in self._modules["lora_magnitude_vector"]._modules:
            return None
        return dora.Decomposition(
            lambda: gathered_tensor(self.lora_magnitude_vector[adapter_name]()).flatten(),
            lambda scale: self._row_norms(adapter_name, scale),
        )

    def _row_norms(self, adapter_name: str, scale: float | Tensor, on_gpu: bool = False) -> Tensor:
        """Return the norms of the rows of `W + s·B·A`, where `W` has nothing merged into it. All
        steps of one `generate` share them, unless `W` is a copy that each step makes. `on_gpu`
        moves a weight on the CPU to the accelerator for it.
        """
        weight = on_accelerator(base_weight(self)) if on_gpu else base_weight(self)

        def norms() -> Tensor:
            is_grouped = self._is_grouped
            factors = self._weights(adapter_name) if is_grouped else self.factors(adapter_name)
            A, B = map(on_accelerator, factors) if on_gpu else factors
            if is_grouped:
                return grouped_row_norms(weight, A, B, scale)
            return row_norms(self.geometry.as_stored(weight).flatten(1), A, B, scale)

        is_copy = weight is not self.get_base_layer()._parameters.get("weight")
        if is_copy or isinstance(scale, Tensor) or not is_running_often():
            return norms()
        start = self.lora_start[adapter_name].buffers() if adapter_name in self.lora_start else ()
        sources = (weight, *self._weights(adapter_name), *start)
        return reuse(self, adapter_name, "norms", sources, norms, scale)

    @property
    def _is_grouped(self) -> bool:
        """True if the layer is a convolution in groups."""
        return self.geometry.groups > 1

    def _first_magnitude(
        self, adapter_name: str, place: Placement, initialize: bool, config: LoraConfig
    ) -> Tensor:
        """Return the norms that an adapter starts with, `[out]`, or memory for them."""
        shape = (1, -1, *[1] * len(self.geometry.kernel_size)) if self.geometry.is_conv else (-1,)
        scale, on_gpu = self.scaling[adapter_name], config.offloads_ephemerally
        norms = partial(self._row_norms, adapter_name, scale, on_gpu)
        size = self.geometry.out_features
        return dora.first_magnitude(norms if initialize else None, size, place).view(shape)

    def delta_recipe(self, adapter_name: str, **options: object) -> Recipe:
        """Return the factors and their scale."""
        return Recipe(
            scaled_product, (self.geometry, *self.factors(adapter_name), self.scaling[adapter_name])
        )

    def check_mergeable(self, adapter_names: Sequence[str]) -> None:
        """Check that adapters can be merged. A merged `lora_bias` needs a base layer with bias and
        no DoRA adapter after it, and a convolution in groups can't hold a delta across them.

        Raises:
            PeftNotSupportedError: An adapter can't be merged.
        """
        activated = [name for name in adapter_names if name in self.alora_invocation_tokens]
        if activated:
            raise PeftNotSupportedError(
                f"aLoRA does not support merging: adapter {activated[0]} acts on the tokens from "
                "its invocation on, and a weight acts on all."
            )
        if self._is_grouped and any(name in self.scaling for name in adapter_names):
            raise PeftNotSupportedError(
                f"Merging is not supported for {type(self.get_base_layer()).__name__} layers with "
                "groups > 1, which can't hold a delta that goes across them."
            )
        super().check_mergeable(adapter_names)
        names = [name for name in (*self.merged_adapters, *adapter_names) if name in self.scaling]
        biased = [name for name in names if self.lora_bias[name]]
        if biased and self.get_base_layer()._parameters.get("bias") is None:
            raise PeftNotSupportedError(
                f"Adapter {biased[0]} has `lora_bias=True` and the base layer no bias to merge it "
                "into."
            )
        if biased and any(self.use_dora[name] for name in names[names.index(biased[0]) :]):
            raise PeftNotSupportedError(
                f"A DoRA adapter can't be merged after {biased[0]}, which has `lora_bias=True`."
            )

    def merge_bias(self, adapter_name: str, scale: float) -> Tensor | None:
        """Return `lora_bias` times the scale."""
        bias = self.lora_B[adapter_name].bias if self.lora_bias[adapter_name] else None
        return None if bias is None else bias.detach() * scale

    def rank_padding(self, container: str) -> RankPadding | None:
        """Return the axis of the rank: rows of `A`, columns of `B`, a share of it in groups."""
        groups = self.geometry.groups
        if container in ("lora_A", "lora_embedding_A"):
            return RankPadding(0, blocks=groups)
        return RankPadding(1, share=groups) if container in ("lora_B", "lora_embedding_B") else None

    def adapter_cost(self, adapter_name: str, config: LoraConfig) -> AdapterCost:
        """Return the cost of factors of rank `r`."""
        return low_rank_cost(self.geometry, self.r[adapter_name])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether the delta is just a matrix: without `lora_bias`, not across groups, on all
        tokens.
        """
        return self._is_matrix(adapter_name) and adapter_name not in self.alora_invocation_tokens

    def _is_matrix(self, adapter_name: str) -> bool:
        return not (self.lora_bias[adapter_name] or self._is_grouped)

    def is_product(self, adapter_name: str) -> bool:
        """Return whether an adapter's delta is the product of its two factors and nothing else."""
        return self._is_matrix(adapter_name) and not self.use_dora[adapter_name]

    def low_rank_factors(
        self, adapter_name: str, rank: int | float | None = None, **options: object
    ) -> LowRank:
        """Return `s·B·A`, exact at rank `r` (`2r` with a start); DoRA's change by a dense SVD."""
        A, B = self.factors(adapter_name)
        scale = float(self.scaling[adapter_name])
        if adapter_name not in self.lora_magnitude_vector:
            return approximate(B.detach() * scale, A.detach().clone(), rank)
        factor = self.merge_factor(adapter_name, scale)
        assert factor is not None
        change = dora.change(base_weight(self), factor, self.get_delta_weight(adapter_name))
        return cut(dense_svd(self.geometry.as_stored(change).flatten(1)), rank, A.dtype)


def empty_linear(in_features: int, out_features: int, bias: bool, place: Placement) -> nn.Linear:
    """Return an uninitialized `nn.Linear`; `skip_init` would draw on the meta device first."""
    device, dtype = place
    module = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(module)
    module.in_features, module.out_features = in_features, out_features
    module.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
    values = torch.empty(out_features, device=device, dtype=dtype) if bias else None
    module.register_parameter("bias", None if values is None else nn.Parameter(values))
    return module


def lora_tensors(module: nn.Module, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Return `A [r, in · taps]`, `B [out, r]` as the tensors of a module's LoRA layer, by ends of
    keys.
    """
    if isinstance(innermost(module), nn.Embedding):
        return {"lora_embedding_A": A.contiguous(), "lora_embedding_B": B.contiguous()}
    size = geometry(module)
    if size is not None and size.is_conv:
        kernel = size.kernel_size
        A, B = A.unflatten(1, (-1, *kernel)), B.view(*B.shape, *[1] * len(kernel))
    return {"lora_A.weight": A.contiguous(), "lora_B.weight": B.contiguous()}
