# SPDX-License-Identifier: Apache-2.0
"""`ParamWrapper`: VB-LoRA on a parameter that is a matrix or a stack of experts' matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...core.adapters import AdapterParameterDict
from ...core.method_info import AdapterCost, low_rank_cost
from ...core.parameter_layer import ParameterLayer, stacked_product
from ...ops.exact_merge import Recipe
from ...ops.grouped import GroupedRows
from .config import VBLoRAConfig
from .layer import VBLoRALayer


class ParamWrapper(ParameterLayer, VBLoRALayer):
    """A layer around a module with VB-LoRA on one of its parameters.

    A stack has the logits of one layer of rank `experts · r`; an expert has `r` of the ranks.

    Attributes:
        vblora_logits_A: `[experts · r, in / vector_length, num_vectors]`, by adapter name.
        vblora_logits_B: `[out / vector_length, experts · r, num_vectors]`.

    Source: arXiv:2405.15179, section 3
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: VBLoRAConfig,
        parameter_name: str,
        vblora_vector_bank: AdapterParameterDict,
        vblora_shared_banks: AdapterParameterDict | None = None,
        **options: Any,
    ) -> None:
        self.parameter_name = parameter_name
        VBLoRALayer.__init__(self, base_layer, vblora_vector_bank, vblora_shared_banks)
        self.update_layer(adapter_name, config, **options)
        self.set_adapter(adapter_name)

    def update_layer(  # type: ignore[override]
        self, adapter_name: str, config: VBLoRAConfig, **options: Any
    ) -> None:
        """Make an adapter's logits for all experts."""
        super().update_layer(
            adapter_name, replace(config, r=config.r * self.num_experts), **options
        )
        self.r[adapter_name] = config.r

    def savable_parameters(self, adapter_name: str, config: VBLoRAConfig) -> float:
        """Return the size of the adapter's tensors of this layer in a file, in float32 numbers."""
        stacked = replace(config, r=config.r * self.num_experts)
        return super().savable_parameters(adapter_name, stacked)

    def stacked_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return `A [experts, r, in]` and `B [experts, out, r]`, of a matrix `[r, in]` and
        `[out, r]`, with the layer's scale and the gate in `B`.
        """
        if self.training and self.topk_only[adapter_name]:
            self.refuse_training(adapter_name)
        A, B = self.factors(adapter_name)
        if not self.is_stacked:
            return A, B
        sizes = self.num_experts, self.r[adapter_name]
        return A.unflatten(0, sizes), B.unflatten(1, sizes).transpose(0, 1)

    def delta_recipe(self, adapter_name: str, **options: object) -> Recipe:
        """Return the composed factors, for exact merging."""
        A, B = self.stacked_factors(adapter_name)
        return Recipe(stacked_product, (self.geometry.transposed, A, B))

    def expert_delta(self, adapter_name: str, x: Tensor, rows: GroupedRows) -> Tensor:
        """Return `B[e]·A[e]·x` for rows that are sorted by expert."""
        return rows.low_rank(x, *self.stacked_factors(adapter_name))

    def adapter_cost(self, adapter_name: str, config: object) -> AdapterCost:
        """Return the cost for a row, which goes to one expert."""
        return low_rank_cost(self.geometry, self.r[adapter_name])
