# SPDX-License-Identifier: Apache-2.0
"""Layers with VB-LoRA adapters: logits, and access to the bank; the math is in `bank.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base.calls.adapter_batch import AdapterBatch
from ...base.calls.rows import RowOwners
from ...base.errors import PeftRuntimeError
from ...base.geometry import Placement
from ...base.tracing import shapes
from ...core.adapters import AdapterParameterDict, read
from ...core.layer import BaseTunerLayer
from ...core.method_info import AdapterCost, low_rank_cost
from ...ops.exact_merge import Recipe, sum_of_products
from ...ops.fused_linear import Chain
from ...ops.inference_cache import cached
from ...ops.low_rank import LowRank, approximate
from ...ops.mixed_precision import scaled
from .bank import (
    Selection,
    all_weights,
    compose_factors,
    compose_tiles,
    expand,
    index_dtype,
    is_topk_only,
    place_tiles,
    savable_parameters,
    select_topk,
)
from .config import VBLoRAConfig
from .packed import PackedTensors
from .storage import GATE, INDICES, LOGITS, WEIGHTS, StorageFormat

# The remedy in messages about training after a compact file.
TRAINING_REMEDY = (
    "To train the weights of the selected ones, load it with `is_trainable=True` and "
    "`config=VBLoRAConfig.from_pretrained(folder, train_topk_weights=True)`."
)


class VBLoRALayer(BaseTunerLayer):
    """A layer with VB-LoRA adapters, `Δ(x) = x·Aᵀ·Bᵀ`, or `g·x·Aᵀ·Bᵀ` with a gate, where `A` and
    `B` are composed from a vector bank.

    Args:
        base_layer: The layer to adapt.
        vblora_vector_bank: Own banks of adapters, `[num_vectors, vector_length]`, by adapter name.
            All layers refer to the same container, which the model registers.
        vblora_shared_banks: Banks that adapters share, by digest, also in one container.

    Attributes:
        vblora_logits_A: `[r, in / vector_length, num_vectors]`, or `[…, topk]` if only the selected
            vectors are kept; by adapter name. `storage.py` has the table of all formats.
        vblora_logits_B: `[out / vector_length, r, num_vectors]`, or `[…, topk]`.
        vblora_logits_A_topk_indices, vblora_logits_B_topk_indices: Indices of the selected vectors,
            `[…, topk]`, if only these are kept.
        vblora_logits_A_topk_weights, vblora_logits_B_topk_weights: Their weights without the last,
            `[…, topk - 1]`, if only these are kept, for inference.
        vblora_gate: `[1]`, of adapters with a gate.
        storage_format: Storage format of each adapter.

    Source: arXiv:2405.15179, section 3
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = (*LOGITS, "vblora_vector_bank")
    other_param_names: ClassVar[tuple[str, ...]] = ("r", "topk", "vblora_dropout")
    container_names: ClassVar[tuple[str, ...]] = (
        *LOGITS,
        *(name + end for end in (INDICES, WEIGHTS) for name in LOGITS),
        GATE,
    )
    value_names: ClassVar[tuple[str, ...]] = (
        *other_param_names, "num_vectors", "topk_only", "storage_format", "bank_key",
    )  # fmt: skip

    def __init__(
        self,
        base_layer: nn.Module,
        vblora_vector_bank: AdapterParameterDict,
        vblora_shared_banks: AdapterParameterDict | None = None,
    ) -> None:
        super().__init__(base_layer)
        for name in LOGITS:
            setattr(self, name, AdapterParameterDict())
            setattr(self, name + INDICES, PackedTensors())
            setattr(self, name + WEIGHTS, PackedTensors())
        self.vblora_gate = AdapterParameterDict()
        self.r: dict[str, int] = {}
        self.topk: dict[str, int] = {}
        self.num_vectors: dict[str, int] = {}
        self.vblora_dropout: dict[str, float] = {}
        self.topk_only: dict[str, bool] = {}
        self.storage_format: dict[str, StorageFormat] = {}
        self.bank_key: dict[str, str | None] = {}
        shared = AdapterParameterDict() if vblora_shared_banks is None else vblora_shared_banks
        self._bank = (vblora_vector_bank, shared)  # in a tuple, not to be registered
        self.register_load_state_dict_post_hook(_note_all)

    @property
    def vblora_vector_bank(self) -> AdapterParameterDict:
        """Own banks of adapters by adapter name, one container for all layers."""
        return self._bank[0]

    @property
    def vblora_shared_banks(self) -> AdapterParameterDict:
        """Banks that adapters share, by digest."""
        return self._bank[1]

    def containers(self) -> Iterator[nn.Module]:
        """Yield this layer's containers and that of the own banks, to be frozen with the layers."""
        yield from super().containers()
        yield self.vblora_vector_bank

    def requires_grad_(self, requires_grad: bool = True) -> VBLoRALayer:
        """Freeze or unfreeze this layer and the own banks of its adapters.

        transformers freezes a model layer by layer after it has loaded an adapter into it, and
        calls nothing else then.
        """
        self.vblora_vector_bank.requires_grad_(requires_grad)
        super().requires_grad_(requires_grad)
        _note_all(self)
        return self

    def update_layer(
        self,
        adapter_name: str,
        config: VBLoRAConfig,
        placement: Placement | None = None,
        initialize: bool = True,
        bank_key: str | None = None,
        storage_format: StorageFormat = StorageFormat.LOGITS,
    ) -> None:
        """Make an adapter's logits, or the tensors that replace them in its storage format.
        `bank_key` is the digest of a shared bank; None for its own.
        """
        self.r[adapter_name] = config.r
        self.topk[adapter_name] = config.topk
        self.num_vectors[adapter_name] = config.num_vectors
        self.vblora_dropout[adapter_name] = config.vblora_dropout
        self.storage_format[adapter_name] = storage_format
        self.bank_key[adapter_name] = bank_key
        self.topk_only[adapter_name] = storage_format is StorageFormat.TOPK_WEIGHTS
        self.scaling[adapter_name] = self.base_scaling(adapter_name)
        device, dtype = self._placement(placement)
        tiles_in = config.tiles(self.geometry.in_features)
        tiles_out = config.tiles(self.geometry.out_features)
        tiles = (config.r, tiles_in), (tiles_out, config.r)
        for name, shape in zip(LOGITS, tiles, strict=True):
            if storage_format is not StorageFormat.LOGITS:
                kind = index_dtype(config.num_vectors)
                indices = torch.zeros(*shape, config.topk, device=device, dtype=kind)
                getattr(self, name + INDICES)[adapter_name] = indices
            if storage_format is StorageFormat.TOPK_WEIGHTS:
                kind = config.weights_dtype
                weights = torch.zeros(*shape, config.topk - 1, device=device, dtype=kind)
                getattr(self, name + WEIGHTS)[adapter_name] = weights
                continue
            length = config.num_vectors if storage_format is StorageFormat.LOGITS else config.topk
            logits = nn.Parameter(torch.empty(*shape, length, device=device, dtype=dtype))
            getattr(self, name)[adapter_name] = logits
            if initialize:
                nn.init.normal_(logits, 0, config.init_logits_std)
        if config.output_gate:
            gate = torch.zeros(1, device=device, dtype=dtype)
            self.vblora_gate[adapter_name] = nn.Parameter(gate)

    def delta_chain(self, adapter_name: str, x: Tensor) -> Chain:
        """Return `x·Aᵀ`, then `·Bᵀ`, with dropout on `x`; refuse to train compact logits."""
        if self.training and self.topk_only[adapter_name]:
            self.refuse_training(adapter_name)
        A, B = self._gated_factors(adapter_name)
        if self.training and (dropout := self.vblora_dropout[adapter_name]):
            x = F.dropout(self._cast_input_dtype(x, A.dtype), dropout)
        elif x.dtype != A.dtype:
            x = self._chain_input(x, A.dtype)
        return Chain(x, A.T, (B.T,), scale=self.scaling[adapter_name])

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return `A [r, in]` and `B [out, r]`, with the layer's scale and the gate in `B`."""
        A, B = self._gated_factors(adapter_name)
        return A, scaled(B, self.scaling[adapter_name])

    def _gated_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return `A [r, in]` and `B [out, r]`, with the gate in `B`."""
        A, B = self._composed_factors(adapter_name)
        gates = self._modules["vblora_gate"]
        return A, B * gates(adapter_name) if adapter_name in gates._keys else B

    def _composed_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return `A [r, in]` and `B [out, r]`, possibly cached: they must not be written to."""
        if self.storage_format[adapter_name] is not StorageFormat.LOGITS:
            selections, bank = self.selections(adapter_name), self.bank(adapter_name)
            tiles_A, tiles_B = (compose_tiles(*selection, bank) for selection in selections)
            return self._to_size(*place_tiles(tiles_A, tiles_B))
        modules = self._modules
        containers = modules["vblora_logits_A"], modules["vblora_logits_B"]
        logits_A, logits_B = read(adapter_name, containers)
        topk, sources = self.topk[adapter_name], (logits_A, logits_B, self.bank(adapter_name))

        def compose() -> tuple[Tensor, Tensor]:
            return self._to_size(*compose_factors(*sources, topk))

        def in_order() -> tuple[Tensor, Tensor]:  # of memory, as products read them fastest
            A, B = compose()
            return A.T.contiguous().T, B.T.contiguous().T

        # Offloaded tensors exist for this call only.
        is_own = containers[0]._parameters.get(adapter_name) is logits_A
        factors = cached(self, adapter_name, "factors", sources, in_order, topk) if is_own else None
        return compose() if factors is None else factors

    def _to_size(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Cut the last tiles of factors `[…, r, in]` and `[…, out, r]` to the layer's sizes."""
        (*_, columns), (*_, rows, _) = shapes(A, B)
        if columns != self.geometry.in_features:
            A = A[..., : self.geometry.in_features]
        if rows != self.geometry.out_features:
            B = B[..., : self.geometry.out_features, :]
        return A, B

    def bank(self, adapter_name: str) -> Tensor:
        """Return the bank of an adapter, its own or a shared one."""
        key = self.bank_key[adapter_name]
        return self._bank[0](adapter_name) if key is None else self._bank[1](key)

    def logits(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return logits `[…, num_vectors]` of `A` and `B`, rebuilt from a compact format."""
        if self.storage_format[adapter_name] is StorageFormat.LOGITS:
            return self.vblora_logits_A(adapter_name), self.vblora_logits_B(adapter_name)
        A, B = (
            expand(indices, weights[..., :-1], self.num_vectors[adapter_name], weights.dtype)
            for indices, weights in self.selections(adapter_name)
        )
        return A, B

    def selections(self, adapter_name: str) -> tuple[Selection, Selection]:
        """Return the vectors that the tiles of `A` and of `B` select, in any storage format."""
        dtype = torch.promote_types(self.bank(adapter_name).dtype, torch.float32)
        name_A, name_B = LOGITS
        selection_A = self._selection(name_A, adapter_name, dtype)
        return selection_A, self._selection(name_B, adapter_name, dtype)

    def _selection(self, logits: str, adapter_name: str, dtype: torch.dtype) -> Selection:
        """Return the vectors that one factor's tiles select; `logits` names its container."""
        storage_format = self.storage_format[adapter_name]
        if storage_format is StorageFormat.LOGITS:
            topk = self.topk[adapter_name]
            indices, selected = select_topk(getattr(self, logits)(adapter_name), topk)
            return Selection(indices, selected.softmax(-1, dtype))
        indices = getattr(self, logits + INDICES)(adapter_name)
        if storage_format is StorageFormat.TOPK_WEIGHTS:
            weights = getattr(self, logits + WEIGHTS)(adapter_name)
            return Selection(indices, all_weights(weights.to(dtype)))
        return Selection(indices, getattr(self, logits)(adapter_name).softmax(-1, dtype))

    def delta_recipe(self, adapter_name: str, **options: object) -> Recipe:
        """Return the composed factors, for exact merging."""
        return Recipe(sum_of_products, (self.geometry, self.factors(adapter_name)))

    def low_rank_factors(
        self, adapter_name: str, rank: int | float | None = None, **options: object
    ) -> LowRank:
        """Return `B·A`, exact at rank `r`."""
        A, B = self.factors(adapter_name)
        return approximate(B.detach(), A.detach(), rank)

    def adapter_cost(self, adapter_name: str, config: object) -> AdapterCost:
        """Return the cost of applying factors of rank `r`; the cost of composing is left out."""
        return low_rank_cost(self.geometry, self.r[adapter_name])

    def savable_parameters(self, adapter_name: str, config: VBLoRAConfig) -> float:
        """Return the size of the adapter's tensors of this layer in a file, in float32 numbers."""
        topk = config.topk if config.save_only_topk_weights else None
        size = self.geometry
        tiles = config.r * (config.tiles(size.in_features) + config.tiles(size.out_features))
        count = savable_parameters(tiles, config.num_vectors, topk, config.weights_dtype)
        return count + (1.0 if adapter_name in self.vblora_gate else 0.0)

    def note_loaded(self, adapter_name: str) -> None:
        """Update `topk_only`: logits from a compact file lack values and can't be trained."""
        if self.storage_format.get(adapter_name) is not StorageFormat.LOGITS:
            return
        try:
            self.topk_only[adapter_name] = is_topk_only(self.vblora_logits_A[adapter_name])
        except RuntimeError:  # out of memory: the first forward in training asks again
            self.topk_only[adapter_name] = True

    def refuse_training(self, adapter_name: str) -> None:
        """Raise for logits from a compact file, unless others were written to them since."""
        self.note_loaded(adapter_name)
        if self.topk_only[adapter_name]:
            raise PeftRuntimeError(
                "Found infinity values in VB-LoRA logits. Ensure training was not resumed from a "
                "`save_only_topk_weights` model, which lacks the logits of vectors that were not "
                f"selected. {TRAINING_REMEDY}"
            )

    def apply_by_sample(
        self, batch: AdapterBatch, x: Tensor, result: Tensor, shared: RowOwners
    ) -> Tensor:
        """Apply compact adapters over one shared bank together, the others one by one."""
        groups = () if self.training else self._groups(batch)
        together = [names for names in groups if len(names) > 1]
        for names in together:
            result = self._apply_together(names, batch, x, result, shared)
        if not together:
            return super().apply_by_sample(batch, x, result, shared)
        done = {name for names in together for name in names}
        left = [name for name in batch.samples if name in self.scaling and name not in done]
        rest = {name: batch.samples[name] for name in left}
        return super().apply_by_sample(batch.subset(rest), x, result, shared) if rest else result

    def _groups(self, batch: AdapterBatch) -> Iterable[tuple[str, ...]]:
        """Return groups of a call's adapters that can be applied together: compact, not scaled,
        without a gate, over one bank, with tensors in the same buffers.
        """
        locations = [
            getattr(self, name + end).location for name in LOGITS for end in (INDICES, WEIGHTS)
        ]
        bank_key, formats, scaling = self.bank_key, self.storage_format, self.scaling
        gated = self.vblora_gate._parameters
        groups: dict[tuple[str | None, ...], list[str]] = {}
        for name in batch.samples:
            if (
                formats.get(name) is StorageFormat.TOPK_WEIGHTS
                and bank_key[name] is not None
                and name not in gated
            ):
                scale = scaling[name]
                if not isinstance(scale, Tensor) and scale == 1:
                    buffers = [location(name).buffer for location in locations]
                    groups.setdefault((bank_key[name], *buffers), []).append(name)
        return map(tuple, groups.values())

    def _apply_together(
        self,
        names: tuple[str, ...],
        batch: AdapterBatch,
        x: Tensor,
        result: Tensor,
        shared: RowOwners,
    ) -> Tensor:
        """Return `result` plus the deltas of a group of adapters, each on its samples' rows."""
        bank = self.bank(names[0])
        tiles = []
        for name in LOGITS:
            indices, weights = (
                self._rows_of(getattr(self, name + end), names, batch) for end in (INDICES, WEIGHTS)
            )
            tiles.append(compose_tiles(indices, all_weights(weights), bank))
        # `A [names, r, in]`, and `B` transposed, `[names, r, out]`.
        A = tiles[0].flatten(-2)[..., : self.geometry.in_features]
        B = tiles[1].transpose(-3, -2).flatten(-2)[..., : self.geometry.out_features]
        rows, owner = batch.rows_of(names, x, shared)
        if len(rows) != len(names):  # else each adapter has one row, in order
            A, B = A[owner], B[owner]
        is_all = len(rows) == len(x)
        inputs = self._cast_input_dtype(x if is_all else x[rows], A.dtype)
        inputs = inputs.reshape(len(rows), -1, x.shape[-1])
        delta = (inputs @ A.mT @ B).view(len(rows), *result.shape[1:]).to(result.dtype)
        return result + delta if is_all else result.index_add(0, rows, delta)

    @staticmethod
    def _rows_of(packed: PackedTensors, names: tuple[str, ...], batch: AdapterBatch) -> Tensor:
        """Return the packed tensors of a group of adapters, `[names, …]`."""
        location = packed.location
        buffer = packed.buffer(location(names[0]).buffer)
        rows = tuple([location(name).row for name in names])
        return buffer[batch.index_tensor(rows, buffer.device)]


class Linear(VBLoRALayer):
    """A linear layer (`nn.Linear`, `Conv1D`, quantized) with VB-LoRA adapters."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: VBLoRAConfig,
        vblora_vector_bank: AdapterParameterDict,
        vblora_shared_banks: AdapterParameterDict | None = None,
        **options: Any,
    ) -> None:
        super().__init__(base_layer, vblora_vector_bank, vblora_shared_banks)
        self.update_layer(adapter_name, config, **options)
        self.set_adapter(adapter_name)


def _note_all(layer: VBLoRALayer, incompatible_keys: object = None) -> None:
    for adapter_name in layer.scaling:
        layer.note_loaded(adapter_name)
