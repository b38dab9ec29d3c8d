# SPDX-License-Identifier: Apache-2.0
"""`ParamWrapper`: LoRA on a parameter that is a matrix or a stack of experts' matrices."""

from __future__ import annotations

from torch import Tensor, nn

from ...base.geometry import Placement
from ...checkpoint.rank_padding import RankPadding
from ...core.adapted_parameters import add_delta
from ...core.method_info import AdapterCost, low_rank_cost
from ...core.parameter_layer import ParameterLayer, stacked_product
from ...integrations.distributed import gathered_tensor
from ...ops.exact_merge import Recipe
from ...ops.grouped import GroupedRows
from .base import LoraLayer, empty_linear
from .config import LoraConfig
from .factors import Factors, draw


class ParamWrapper(ParameterLayer, LoraLayer):
    """A layer around a module with LoRA on one of its parameters, `ΔW = s · B·A`, or
    `ΔW[e] = s · B[e]·A[e]` for each expert `e`.

    Attributes:
        lora_A: Linear maps with weights `[experts · r, in]`, by adapter name: those of one expert
            after the other.
        lora_B: Linear maps with weights `[out, r · experts]`, by adapter name: the first column of
            each expert, then the second of each.

    Source: arXiv:2106.09685, section 4.1
    """

    def _make(self, adapter_name: str, place: Placement) -> None:
        r = self.r[adapter_name] * self.num_experts
        self.lora_A[adapter_name] = empty_linear(self.in_features, r, False, place)
        self.lora_B[adapter_name] = empty_linear(r, self.out_features, False, place)

    def reset_lora_parameters(
        self, adapter_name: str, init_lora_weights: bool | str = True
    ) -> None:
        """Draw an adapter's factors again."""
        A, B = self._weights(adapter_name)
        draw(A, B, init_lora_weights)
        if init_lora_weights == "gaussian":
            nn.init.normal_(A, std=1 / self.r[adapter_name])

    def factors(self, adapter_name: str) -> Factors:
        """Return `A [experts, r, in]` and `B [experts, out, r]`, of a matrix `[r, in]` and
        `[out, r]`.
        """
        A, B = (gathered_tensor(weight) for weight in self._weights(adapter_name))
        if not self.is_stacked:
            return Factors(A, B)
        r = self.r[adapter_name]
        stacked = B.view(self.out_features, r, self.num_experts).permute(2, 0, 1)
        return Factors(A.view(self.num_experts, r, self.in_features), stacked)

    def delta_recipe(self, adapter_name: str, **options: object) -> Recipe:
        """Return the factors and their scale."""
        factors, scale = self.factors(adapter_name), self.scaling[adapter_name]
        return Recipe(stacked_product, (self.geometry.transposed, *factors, scale))

    def expert_delta(self, adapter_name: str, x: Tensor, rows: GroupedRows) -> Tensor:
        """Return `s·B[e]·A[e]·x` for rows that are sorted by expert."""
        return rows.low_rank(x, *self.factors(adapter_name), self.scaling[adapter_name])

    def adapter_cost(self, adapter_name: str, config: LoraConfig) -> AdapterCost:
        """Return the cost for a row, which goes to one expert."""
        return low_rank_cost(self.geometry, self.r[adapter_name])

    def rank_padding(self, container: str) -> RankPadding | None:
        """Return None: the ranks of all experts share a dimension."""
        return None


class LoraParameterProxy(nn.Module):
    """A parametrization `W + ΔW`, for `torch.nn.utils.parametrize`."""

    def __init__(self, delta_weight: Tensor) -> None:
        super().__init__()
        self.delta_weight = delta_weight

    def forward(self, W: Tensor) -> Tensor:
        """Return the sum in the dtype of `W`."""
        return add_delta(W, self.delta_weight)
