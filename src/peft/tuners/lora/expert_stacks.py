# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of single experts as an adapter of a stack, exactly: pure functions of tensors.

Where the weights of several layers lie one below the other in a stack (`gate` and `up`), the factor
`A` has the ranks of all, and `B` is block-diagonal: `[B₁ 0; 0 B₂]·[A₁; A₂] = [B₁A₁; B₂A₂]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from ...base.errors import CheckpointError
from ...checkpoint.format import FusedPart
from .config import LoraConfig


class _Size(NamedTuple):
    """Rank and alpha of a layer's adapter."""

    r: int
    alpha: float

    def scale(self, config: LoraConfig) -> float:
        """Return the scale of the delta."""
        return self.alpha / (math.sqrt(self.r) if config.use_rslora else self.r)


def stack_settings(config: LoraConfig, paths: Mapping[int, str]) -> dict[str, float]:
    """Return rank and alpha of a stack's adapter: the sum of its parts' ranks, and the alpha with
    which it has the scale of the first that is not zero.
    """
    sizes = [_size(config, paths[part]) for part in sorted(paths)]
    r, scale = sum(size.r for size in sizes), _common_scale(config, sizes)
    alpha = scale * (math.sqrt(r) if config.use_rslora else r)
    return {"rank_pattern": r, "alpha_pattern": round(alpha) if alpha == round(alpha) else alpha}


def stack_experts(
    config: LoraConfig, parts: Sequence[FusedPart], shape: tuple[int, ...] | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return `A [experts · r, in]` and `B [out, r · experts]` of a stack, by the ends of their
    keys, and its settings. Experts without an adapter have zeros.

    Args:
        config: The config of the single experts.
        parts: Their adapters.
        shape: The stack's, `[experts, out, in]`; by default that of the parts, which are all.
    """
    _check_tensors(parts)
    paths = {part.part: part.path for part in parts}
    settings = stack_settings(config, paths)
    r = int(settings["rank_pattern"])
    sizes = {part: _size(config, paths[part]) for part in sorted(paths)}
    scale = _common_scale(config, list(sizes.values()))
    heights = {part.part: len(part.tensors["lora_B.weight"]) for part in parts}
    first = parts[0].tensors["lora_A.weight"]
    if shape is None:
        shape = 1 + max(part.expert for part in parts), sum(heights.values()), first.shape[1]
    experts, rows, columns = shape
    A, B = first.new_zeros(experts, r, columns), first.new_zeros(experts, rows, r)
    # Parts that no expert adapts share the rows that the others leave.
    count = max(heights) + 1
    missing = count - len(heights)
    height = (rows - sum(heights.values())) // missing if missing else 0
    tops = [0, *accumulate(heights.get(part, height) for part in range(count))]
    starts = [0, *accumulate(sizes[part].r if part in sizes else 0 for part in range(count))]
    for part in parts:
        up, down = part.tensors["lora_B.weight"], part.tensors["lora_A.weight"]
        top, start = tops[part.part], starts[part.part]
        _check_fit(part, columns, rows - top, sizes[part.part].r, experts)
        ranks = slice(start, start + len(down))
        A[part.expert, ranks] = down
        change = _size(config, part.path).scale(config) / scale if scale else 1.0
        B[part.expert, top : top + len(up), ranks] = up * change
    stacked = B.permute(1, 2, 0).reshape(rows, r * experts).contiguous()
    return {"lora_A.weight": A.flatten(0, 1), "lora_B.weight": stacked}, settings


def _size(config: LoraConfig, path: str) -> _Size:
    return _Size(config.rank_at(path), config.alpha_at(path))


def _common_scale(config: LoraConfig, sizes: Sequence[_Size]) -> float:
    """Return the scale of a stack's delta: that of the first part with any."""
    return next((scale for size in sizes if (scale := size.scale(config))), 0.0)


def _check_tensors(parts: Sequence[FusedPart]) -> None:
    """Raise `CheckpointError` unless each expert's layer has two matrices and nothing else."""
    for part in parts:
        shapes = {end: list(tensor.shape) for end, tensor in part.tensors.items()}
        if shapes.keys() != {"lora_A.weight", "lora_B.weight"} or any(
            len(shape) != 2 for shape in shapes.values()
        ):
            raise CheckpointError(
                f"`{part.path}`: an adapter of a single expert is loaded onto a stack if it has "
                f"`lora_A.weight` and `lora_B.weight`, two matrices; it has {shapes}. Nothing was "
                "loaded."
            )


def _check_fit(part: FusedPart, columns: int, rows: int, r: int, experts: int) -> None:
    """Raise `CheckpointError` if the factors of an expert's layer do not fit into a stack."""
    A, B = (tuple(part.tensors[f"lora_{name}.weight"].shape) for name in "AB")
    if (r, columns) != A or len(B) != 2 or B[0] > rows or B[1] != r or part.expert >= experts:
        raise CheckpointError(
            f"`{part.path}`: its factors {list(A)} and {list(B)} do not fit an expert of this "
            f"model, with {columns} columns, {rows} rows and rank {r}; nothing was loaded."
        )
