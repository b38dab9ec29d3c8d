# SPDX-License-Identifier: Apache-2.0
"""`ParamWrapper`: LoHa on a parameter that is a matrix or a stack of experts' matrices."""

from __future__ import annotations

from torch import Tensor

from ...core.parameter_layer import stored
from ...ops.exact_merge import Recipe
from ...ops.grouped import GroupedRows
from ..lycoris_utils import LycorisParameters
from .hadamard import HadamardFactors, hadamard_weight, is_low_rank, low_rank_pair
from .layer import LoHaLayer


class ParamWrapper(LycorisParameters, LoHaLayer):  # type: ignore[misc]
    """A layer around a module with LoHa on one of its parameters. The factors of a stack are
    `hada_w1_a [experts, out, r]`, `hada_w1_b [experts, r, in]`, and so on.

    Source: arXiv:2108.06098, section 2.2
    """

    def delta_recipe(self, adapter_name: str, **options: object) -> Recipe:
        """Return ΔW as a function of its factors."""
        factors, scale = self.factors(adapter_name), self.scaling[adapter_name]
        return Recipe(_dense, (factors, scale, self.geometry.transposed))

    def expert_product(self, adapter_name: str, x: Tensor, rows: GroupedRows) -> Tensor:
        """Return `ΔW[e]·x` for rows that are sorted by expert, by factors of rank `r²` or the dense
        products, whichever are cheaper.
        """
        factors = self.factors(adapter_name)
        if not is_low_rank(factors):
            return super().expert_product(adapter_name, x, rows)
        return rows.low_rank(x, *low_rank_pair(factors, self.scaling[adapter_name]))


def _dense(factors: HadamardFactors, scale: float | Tensor, transposed: bool) -> Tensor:
    """Return ΔW in the parameter's layout."""
    return stored(hadamard_weight(factors, scale), transposed)
