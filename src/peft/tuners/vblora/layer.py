# SPDX-License-Identifier: Apache-2.0
"""Layers with VB-LoRA adapters: they hold the logits and reach the shared bank; the maths is in `bank.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils.error import PeftRuntimeError
from .._accumulate import Steps
from .._geometry import Placement
from .._holder import AdapterParameterDict
from .._layer import BaseTunerLayer
from .._lowrank import LowRank, approximate
from .bank import compose_factors, is_topk_only


class VBLoRALayer(BaseTunerLayer):
    """A layer with VB-LoRA adapters, `Δ(x) = x·Aᵀ·Bᵀ`.

    Args:
        base_layer: The layer to adapt.
        vblora_vector_bank: The banks, `[num_vectors, vector_length]` by adapter name. Not registered here: it has one owner.

    Attributes:
        vblora_logits_A: `[r, in / vector_length, num_vectors]` by adapter name.
        vblora_logits_B: `[out / vector_length, r, num_vectors]` by adapter name.

    Source: arXiv:2405.15179, section 3
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("vblora_logits_A", "vblora_logits_B")
    other_param_names: ClassVar[tuple[str, ...]] = ("r", "topk", "vblora_dropout", "topk_only")

    def __init__(self, base_layer: nn.Module, vblora_vector_bank: AdapterParameterDict) -> None:
        super().__init__(base_layer)
        self.vblora_logits_A = AdapterParameterDict()
        self.vblora_logits_B = AdapterParameterDict()
        self.r: dict[str, int] = {}
        self.topk: dict[str, int] = {}
        self.vblora_dropout: dict[str, float] = {}
        self.topk_only: dict[str, bool] = {}
        self._bank = (vblora_vector_bank,)  # in a tuple, not to be registered
        self.register_load_state_dict_post_hook(_note_all)

    @property
    def vblora_vector_bank(self) -> AdapterParameterDict:
        """The banks by adapter name, shared by all layers."""
        return self._bank[0]

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Also the adapter's bank, so that it is frozen and unfrozen by who goes from layer to layer and knows nothing of it."""
        yield from super().adapter_parameters(adapter_name)
        if adapter_name in self.vblora_vector_bank:
            yield self.vblora_vector_bank[adapter_name]

    def adapter_owners(self) -> Iterator[nn.Module]:
        """Also the banks' owner."""
        yield from super().adapter_owners()
        yield self.vblora_vector_bank

    def requires_grad_(self, requires_grad: bool = True) -> VBLoRALayer:
        """Also of the banks, for the same reason. transformers freezes its own models layer by layer after it has loaded an adapter
        into their parameters, and says no more of that.
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
        initialise: bool = True,
    ) -> None:
        """Make an adapter's logits.

        Args:
            adapter_name: The adapter's name.
            config: Its config.
            placement: Device and dtype, by default the base layer's.
            initialise: False leaves the memory as it is.
        """
        self.r[adapter_name] = config.r
        self.topk[adapter_name] = config.topk
        self.vblora_dropout[adapter_name] = config.vblora_dropout
        self.topk_only[adapter_name] = False
        self.scaling[adapter_name] = self.base_scaling(adapter_name)
        device, dtype = self._placement(placement)
        tiles_in = self.geometry.in_features // config.vector_length
        tiles_out = self.geometry.out_features // config.vector_length
        for container, shape in (
            (self.vblora_logits_A, (config.r, tiles_in, config.num_vectors)),
            (self.vblora_logits_B, (tiles_out, config.r, config.num_vectors)),
        ):
            container[adapter_name] = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            if initialise:
                nn.init.normal_(container[adapter_name], 0, config.init_logits_std)

    def note_loaded(self, adapter_name: str) -> None:
        """See whether an adapter's logits came from a top-k checkpoint, which can't be trained on."""
        if adapter_name in self.scaling:
            self.topk_only[adapter_name] = is_topk_only(self.vblora_logits_A[adapter_name])

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """`A [r, in]` and `B [out, r]`, the layer's scale in `B`."""
        A, B = compose_factors(
            self.vblora_logits_A(adapter_name),
            self.vblora_logits_B(adapter_name),
            self.vblora_vector_bank(adapter_name),
            self.topk[adapter_name],
        )
        scale = self.scaling[adapter_name]
        return A, B * scale if isinstance(scale, Tensor) or scale != 1 else B

    def get_delta_weight(self, adapter_name: str, **options: Any) -> Tensor:
        """`B·A` in the base weight's layout."""
        A, B = self.factors(adapter_name)
        return self.geometry.as_stored(B @ A)

    def low_rank_factors(self, adapter_name: str, rank: int | float | None = None, **options: Any) -> LowRank:
        """`B·A` as composed, exact of rank `r`."""
        A, B = self.factors(adapter_name)
        return approximate(B.detach(), A.detach(), rank)

    def delta_activations(self, adapter_name: str, x: Tensor) -> Tensor:
        """`x·Aᵀ·Bᵀ`, with dropout on `x` in training."""
        part = self.delta_steps(adapter_name, x).part()
        return part.view(*x.shape[:-1], part.shape[1])

    def delta_steps(self, adapter_name: str, x: Tensor) -> Steps:
        """`x·Aᵀ`, then `Bᵀ`.

        Raises:
            PeftRuntimeError: In training, if the logits came from a top-k checkpoint.
        """
        if self.training and self.topk_only[adapter_name]:
            raise PeftRuntimeError(
                "Found infinity values in VB-LoRA logits. Ensure training was not resumed from a `save_only_topk_weights` model."
            )
        A, B = self.factors(adapter_name)
        x = self._cast_input_dtype(x, A.dtype)
        if self.training and (dropout := self.vblora_dropout[adapter_name]):
            x = F.dropout(x, dropout)
        return Steps(x, A.T, lambda h: (h, B.T))


class Linear(VBLoRALayer):
    """A linear layer (`nn.Linear`, `Conv1D`, quantised) with VB-LoRA adapters.

    Args:
        base_layer: The layer to adapt.
        adapter_name: The first adapter's name.
        config: Its config.
        vblora_vector_bank: The banks by adapter name.
        **options: As for `update_layer`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        vblora_vector_bank: AdapterParameterDict,
        **options: Any,
    ) -> None:
        super().__init__(base_layer, vblora_vector_bank)
        self.update_layer(adapter_name, config, **options)
        self.set_adapter(adapter_name)


def _note_all(layer: VBLoRALayer, incompatible_keys: Any = None) -> None:
    for adapter_name in layer.scaling:
        layer.note_loaded(adapter_name)
