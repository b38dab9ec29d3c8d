# SPDX-License-Identifier: Apache-2.0
"""Layers with VB-LoRA adapters: they hold the logits and reach the shared bank; the maths is in
`bank.py`.
"""

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
from ...core.adapters import AdapterParameterDict
from ...core.cost import AdapterCost, thin_cost
from ...core.layer import BaseTunerLayer
from ...ops.dispatch import shapes
from ...ops.exact_merge import Recipe, sum_of_products
from ...ops.fused_linear import Chain, LowRankChain
from ...ops.inference_cache import reuse
from ...ops.low_rank import LowRank, approximate
from ...ops.mixed_precision import scaled
from .bank import (
    all_weights,
    expand,
    index_dtype,
    is_topk_only,
    mix,
    place_tiles,
    savable_parameters,
)
from .config import Form
from .factors import compose_factors
from .packed import PackedTensors
from .storage import GATE, INDICES, LOGITS, WEIGHTS

# What to do about a compact file that is to be trained on.
TRAINING_ON = (
    "To train the weights of those that were, load it with `is_trainable=True` and "
    "`config=VBLoRAConfig.from_pretrained(folder, train_topk_weights=True)`."
)


class VBLoRALayer(BaseTunerLayer):
    """A layer with VB-LoRA adapters, `Δ(x) = x·Aᵀ·Bᵀ`, or `g·x·Aᵀ·Bᵀ` with a gate.

    Args:
        base_layer: The layer to adapt.
        vblora_vector_bank: The adapters' own banks, `[num_vectors, vector_length]` by adapter name.
            Not registered here: they have one owner.
        vblora_shared_banks: Banks that adapters share, by digest; likewise.

    Attributes:
        vblora_logits_A: `[r, in / vector_length, num_vectors]` by adapter name.
        vblora_logits_B: `[out / vector_length, r, num_vectors]`. Both are `[…, topk]` for what is
            trained on from a compact file.
        vblora_logits_A_topk_indices, vblora_logits_B_topk_indices: The vectors that positions
            chose, `[…, topk]`, of adapters that the model has in compact form.
        vblora_logits_A_topk_weights, vblora_logits_B_topk_weights: Their weights but the last,
            `[…, topk - 1]`, of those that are only run.
        vblora_gate: `[1]` by adapter name, of adapters with a gate.
        form: How each adapter's choice is held.

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
        *other_param_names,
        "num_vectors",
        "topk_only",
        "form",
        "bank_key",
    )

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
        self.form: dict[str, Form] = {}
        self.bank_key: dict[str, str | None] = {}
        shared = AdapterParameterDict() if vblora_shared_banks is None else vblora_shared_banks
        self._bank = (vblora_vector_bank, shared)  # in a tuple, not to be registered
        self.register_load_state_dict_post_hook(_note_all)

    @property
    def vblora_vector_bank(self) -> AdapterParameterDict:
        """The adapters' own banks by adapter name, one for all layers."""
        return self._bank[0]

    @property
    def vblora_shared_banks(self) -> AdapterParameterDict:
        """Banks that adapters share, by digest."""
        return self._bank[1]

    def bank(self, adapter_name: str) -> Tensor:
        """The bank of an adapter, its own or the shared one."""
        key = self.bank_key[adapter_name]
        return self._bank[0](adapter_name) if key is None else self._bank[1](key)

    def containers(self) -> Iterator[nn.Module]:
        """Also that of the adapters' own banks, so that these are frozen and unfrozen by who goes
        from layer to layer and knows of no bank.
        """
        yield from super().containers()
        yield self.vblora_vector_bank

    def requires_grad_(self, requires_grad: bool = True) -> VBLoRALayer:
        """Also of the adapters' own banks, for the same reason. transformers freezes its own models
        layer by layer after it has loaded an adapter into their parameters, and says no more of
        that.
        """
        self.vblora_vector_bank.requires_grad_(requires_grad)
        super().requires_grad_(requires_grad)
        _note_all(self)
        return self

    def update_layer(
        self,
        adapter_name: str,
        config: Any,
        placement: Placement | None = None,
        initialize: bool = True,
        bank_key: str | None = None,
    ) -> None:
        """Make an adapter's logits, or what stands for them.

        Args:
            adapter_name: The adapter's name.
            config: Its config.
            placement: Device and dtype, by default the base layer's.
            initialize: False leaves the memory as it is.
            bank_key: The digest of the shared bank that it uses; None for its own.
        """
        self.r[adapter_name] = config.r
        self.topk[adapter_name] = config.topk
        self.num_vectors[adapter_name] = config.num_vectors
        self.vblora_dropout[adapter_name] = config.vblora_dropout
        self.form[adapter_name] = config.form
        self.bank_key[adapter_name] = bank_key
        self.topk_only[adapter_name] = config.form is Form.WEIGHTS
        self.scaling[adapter_name] = self.base_scaling(adapter_name)
        device, dtype = self._placement(placement)
        tiles_in, tiles_out = (
            config.tiles(self.geometry.in_features),
            config.tiles(self.geometry.out_features),
        )
        for name, positions in zip(
            LOGITS, ((config.r, tiles_in), (tiles_out, config.r)), strict=True
        ):
            if config.form is not Form.LOGITS:
                indices = torch.zeros(
                    *positions, config.topk, device=device, dtype=index_dtype(config.num_vectors)
                )
                getattr(self, name + INDICES)[adapter_name] = indices
            if config.form is Form.WEIGHTS:
                weights = torch.zeros(
                    *positions, config.topk - 1, device=device, dtype=config.weights_dtype
                )
                getattr(self, name + WEIGHTS)[adapter_name] = weights
                continue
            length = config.num_vectors if config.form is Form.LOGITS else config.topk
            logits = nn.Parameter(torch.empty(*positions, length, device=device, dtype=dtype))
            getattr(self, name)[adapter_name] = logits
            if initialize:
                nn.init.normal_(logits, 0, config.init_logits_std)
        if config.output_gate:
            self.vblora_gate[adapter_name] = nn.Parameter(
                torch.zeros(1, device=device, dtype=dtype)
            )

    def note_loaded(self, adapter_name: str) -> None:
        """See whether an adapter's logits came from a top-k checkpoint, which can't be trained on."""
        if adapter_name in self.scaling and self.form[adapter_name] is Form.LOGITS:
            self.topk_only[adapter_name] = is_topk_only(self.vblora_logits_A[adapter_name])

    def savable_parameters(self, adapter_name: str, config: Any) -> float:
        """What saving an adapter's part in this layer writes, in float32 numbers."""
        topk = config.topk if config.save_only_topk_weights else None
        n = config.num_vectors
        count = 0.0 if adapter_name not in self.vblora_gate else 1.0
        for name in LOGITS:
            if self.form[adapter_name] is Form.LOGITS:
                positions = getattr(self, name)[adapter_name].numel() // n
            else:
                positions = getattr(self, name + INDICES)[adapter_name].numel() // config.topk
            count += savable_parameters(positions * n, n, topk, config.weights_dtype)
        return count

    def logits(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Logits `[…, num_vectors]` for `A` and `B`, rebuilt where the adapter is held in compact
        form.
        """
        if self.form[adapter_name] is Form.LOGITS:
            return self.vblora_logits_A(adapter_name), self.vblora_logits_B(adapter_name)
        A, B = (
            expand(i, w[..., :-1], self.num_vectors[adapter_name], w.dtype)
            for i, w in self.chosen(adapter_name)
        )
        return A, B

    def chosen(self, adapter_name: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Indices and weights `[…, topk]` that an adapter in compact form has, for `A` and for `B`."""
        dtype = torch.promote_types(self.bank(adapter_name).dtype, torch.float32)
        if self.form[adapter_name] is Form.WEIGHTS:
            weights_A = all_weights(self.vblora_logits_A_topk_weights(adapter_name).to(dtype))
            weights_B = all_weights(self.vblora_logits_B_topk_weights(adapter_name).to(dtype))
        else:
            weights_A = self.vblora_logits_A(adapter_name).softmax(-1, dtype)
            weights_B = self.vblora_logits_B(adapter_name).softmax(-1, dtype)
        return (
            (self.vblora_logits_A_topk_indices(adapter_name), weights_A),
            (self.vblora_logits_B_topk_indices(adapter_name), weights_B),
        )

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """`A [r, in]` and `B [out, r]`, the layer's scale and the gate in `B`."""
        A, B = self._composed(adapter_name)
        if adapter_name in self.vblora_gate:
            B = B * self.vblora_gate(adapter_name)
        return A, scaled(B, self.scaling[adapter_name])

    def _composed(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """`A [r, in]` and `B [out, r]` as they are made of vectors; nothing may write to them."""
        bank = self.bank(adapter_name)
        if self.form[adapter_name] is Form.LOGITS:
            topk, sources = self.topk[adapter_name], (*self.logits(adapter_name), bank)
            if self._modules["vblora_logits_A"]._parameters.get(adapter_name) is sources[0]:  # type: ignore[union-attr]
                A, B = reuse(
                    self, adapter_name, topk, sources, lambda: compose_factors(*sources, topk)
                )
            else:  # offloaded, and here for this call only
                A, B = compose_factors(*sources, topk)
        else:
            of_A, of_B = self.chosen(adapter_name)
            A, B = place_tiles(mix(*of_A, bank), mix(*of_B, bank))
        return self._to_size(A, B)

    def _to_size(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Factors `[…, r, in]` and `[…, out, r]` without what their last tiles have too much."""
        (*_, columns), (*_, rows, _) = shapes(A, B)
        if columns != self.geometry.in_features:
            A = A[..., : self.geometry.in_features]
        if rows != self.geometry.out_features:
            B = B[..., : self.geometry.out_features, :]
        return A, B

    def get_delta_weight(self, adapter_name: str, **options: Any) -> Tensor:
        """`B·A` in the base weight's layout."""
        return self.delta_recipe(adapter_name).weight()

    def delta_recipe(self, adapter_name: str, **options: Any) -> Recipe:
        """The factors as composed."""
        return Recipe(sum_of_products, (self.geometry, self.factors(adapter_name)))

    def adapter_cost(self, adapter_name: str, config: Any) -> AdapterCost:
        """That of factors of rank `r`, beside composing them once for a forward."""
        return thin_cost(self.geometry, self.r[adapter_name])

    def low_rank_factors(
        self, adapter_name: str, rank: int | float | None = None, **options: Any
    ) -> LowRank:
        """`B·A` as composed, exact of rank `r`."""
        A, B = self.factors(adapter_name)
        return approximate(B.detach(), A.detach(), rank)

    def delta_activations(self, adapter_name: str, x: Tensor) -> Tensor:
        """`x·Aᵀ·Bᵀ`, with dropout on `x` in training."""
        A, B = self._factors_for_forward(adapter_name)
        x = self._cast_input_dtype(x, A.dtype)
        if dropout := self._dropout(adapter_name):
            x = F.dropout(x, dropout)
        return F.linear(scaled(F.linear(x, A), self.scaling[adapter_name]), B)

    def delta_chain(self, adapter_name: str, x: Tensor) -> Chain:
        """`x·Aᵀ`, then `Bᵀ`."""
        A, B = self._factors_for_forward(adapter_name)
        dropout = self._dropout(adapter_name)
        x = (
            F.dropout(self._cast_input_dtype(x, A.dtype), dropout)
            if dropout
            else self._input_of_chain(x, A.dtype)
        )
        return LowRankChain(x, A.T, B.T, self.scaling[adapter_name])

    def _factors_for_forward(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """`A [r, in]` and `B [out, r]`, the gate in `B`.

        Raises:
            PeftRuntimeError: In training, if the logits came from a top-k checkpoint.
        """
        if self.training and self.topk_only[adapter_name]:
            self.note_loaded(adapter_name)  # other numbers may have been written since
        if self.training and self.topk_only[adapter_name]:
            raise PeftRuntimeError(
                "Found infinity values in VB-LoRA logits. Ensure training was not resumed from a "
                "`save_only_topk_weights` model, which lacks the logits of vectors that were not "
                f"chosen. {TRAINING_ON}"
            )
        A, B = self._composed(adapter_name)
        if adapter_name in self.vblora_gate:
            B = B * self.vblora_gate(adapter_name)
        return A, B

    def _dropout(self, adapter_name: str) -> float:
        """The share of the input that is dropped at present."""
        return self.vblora_dropout[adapter_name] if self.training else 0.0

    def _apply_by_sample(
        self, batch: AdapterBatch, x: Tensor, result: Tensor, shared: RowOwners
    ) -> Tensor:
        """Compact adapters over one shared bank are composed and applied all at once, the others
        one by one.
        """
        together = (
            [] if self.training else [names for names in self._kinds(batch) if len(names) > 1]
        )
        for names in together:
            result = self._apply_together(names, batch, x, result, shared)
        if not together:
            return super()._apply_by_sample(batch, x, result, shared)
        done = {name for names in together for name in names}
        rest = {
            name: samples
            for name, samples in batch.samples.items()
            if name in self.scaling and name not in done
        }
        return super()._apply_by_sample(batch.subset(rest), x, result, shared) if rest else result

    def _kinds(self, batch: AdapterBatch) -> Iterable[tuple[str, ...]]:
        """Those of a call's adapters that can be applied together: compact ones, not scaled, whose
        tensors are in the same buffers, over the same bank.
        """
        places = [getattr(self, name + end).place for name in LOGITS for end in (INDICES, WEIGHTS)]
        bank_key, form, scaling, gated = (
            self.bank_key,
            self.form,
            self.scaling,
            self.vblora_gate._parameters,
        )
        kinds: dict[Any, list[str]] = {}
        for name in batch.samples:
            if form.get(name) is Form.WEIGHTS and bank_key[name] is not None and name not in gated:
                scale = scaling[name]
                if not isinstance(scale, Tensor) and scale == 1:
                    kinds.setdefault(
                        (bank_key[name], *[place(name)[0] for place in places]), []
                    ).append(name)
        return map(tuple, kinds.values())

    def _apply_together(
        self,
        names: tuple[str, ...],
        batch: AdapterBatch,
        x: Tensor,
        result: Tensor,
        shared: RowOwners,
    ) -> Tensor:
        """`result` with the parts of several adapters of one kind, each added to its samples' rows."""
        bank = self.bank(names[0])
        tiles = []
        for name in LOGITS:
            indices, weights = (
                self._rows_of(getattr(self, name + end), names, batch) for end in (INDICES, WEIGHTS)
            )
            tiles.append(mix(indices, all_weights(weights), bank))
        A = tiles[0].flatten(-2)[..., : self.geometry.in_features]  # [names, r, in]
        B = (
            tiles[1].transpose(-3, -2).flatten(-2)[..., : self.geometry.out_features]
        )  # [names, r, out], transposed
        rows, owner = batch.rows_of(names, x, shared)
        if len(rows) != len(names):  # else each has one row, and both are in order
            A, B = A[owner], B[owner]
        is_all = len(rows) == len(x)
        own = self._cast_input_dtype(x if is_all else x[rows], A.dtype).reshape(
            len(rows), -1, x.shape[-1]
        )
        delta = (own @ A.mT @ B).view(len(rows), *result.shape[1:]).to(result.dtype)
        return result + delta if is_all else result.index_add(0, rows, delta)

    @staticmethod
    def _rows_of(holder: PackedTensors, names: tuple[str, ...], batch: AdapterBatch) -> Tensor:
        """The entries of adapters that are in one buffer, `[names, …]`."""
        place = holder.place
        pack = holder.pack(place(names[0])[0])
        return pack[batch.index_tensor(tuple([place(name)[1] for name in names]), pack.device)]


class Linear(VBLoRALayer):
    """A linear layer (`nn.Linear`, `Conv1D`, quantised) with VB-LoRA adapters.

    Args:
        base_layer: The layer to adapt.
        adapter_name: The first adapter's name.
        config: Its config.
        vblora_vector_bank: The adapters' own banks by adapter name.
        vblora_shared_banks: Banks that adapters share, by digest.
        **options: As for `update_layer`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        vblora_vector_bank: AdapterParameterDict,
        vblora_shared_banks: AdapterParameterDict | None = None,
        **options: Any,
    ) -> None:
        super().__init__(base_layer, vblora_vector_bank, vblora_shared_banks)
        self.update_layer(adapter_name, config, **options)
        self.set_adapter(adapter_name)


def _note_all(layer: VBLoRALayer, incompatible_keys: Any = None) -> None:
    for adapter_name in layer.scaling:
        layer.note_loaded(adapter_name)
