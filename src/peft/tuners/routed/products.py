# SPDX-License-Identifier: Apache-2.0
"""The delta of many experts, `Δ(x) = Σ_e w_e · B_e·A_e·x`, whose factors lie side by side. Pure
functions of tensors.

Three forms compute it, none of them with a loop over experts or tokens; `_form` takes the cheapest:

- "all": every expert for every row, weighted between the two products; for few experts.
- "own": the factors of each sample's experts are gathered, with one product for each sample; for
  few rows, and for samples with many rows each.
- "blocks": rows are sorted into blocks of one expert, whose factors are gathered; for many rows and
  experts.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...base.tracing import shapes
from ...ops.fused_linear import Chain, Ends
from .choice import Choice

Form = Literal["all", "own", "blocks"]

# Cost of moving one number through memory, in multiplications of a large product.
_MOVE = 16
# Cost of the further operations that gathering takes, in multiplications.
_CALLS = 300_000
# Rows of a block.
_BLOCK = 16


class Factors(NamedTuple):
    """Factors of a layer's experts, one after the other along the rank.

    Attributes:
        down: All `A`, `[Σ r, in]`.
        up: All `Bᵀ`, `[Σ r, out]`.
        owner: The expert of each rank, `[Σ r]`.
        rows: The ranks of each expert, `[experts, r]`, for the largest `r`; smaller experts repeat
            their first.
        real: 1 where `rows` is not such a repetition, `[experts, r]`; None if all have one rank.
    """

    down: Tensor
    up: Tensor
    owner: Tensor
    rows: Tensor
    real: Tensor | None = None


def experts_chain(x: Tensor, choice: Choice, factors: Factors) -> Chain:
    """Return `Σ_e w_e · B_e·A_e·x` as a chain of products.

    Args:
        x: `[rows, *leading, in]`, in the factors' dtype.
        choice: Weights `[experts]` for all rows; or weights, and indices of experts, of samples
            `[samples, k]`, each with the same number of consecutive rows, or of tokens
            `[rows, *leading, k]`. Weights can be of tokens where experts are of samples.
        factors: Those of the experts.
    """
    weights, experts = choice.weights.to(factors.down.dtype), choice.experts
    weights = weights if weights.dim() == 1 else weights.flatten(0, -2)
    if experts is None:
        return _all(x, weights, factors)
    experts = experts.flatten(0, -2)
    form = _form(x, experts, factors)
    if form == "all":
        (rows, _), (samples, _) = shapes(weights, experts)
        experts = experts if rows == samples else experts.repeat_interleave(rows // samples, 0)
        every = weights.new_zeros(rows, factors.rows.shape[0])
        return _all(x, every.scatter(1, experts, weights), factors)
    middle = _own if form == "own" else _blocks
    operands = weights, factors.down, factors.up
    rest = partial(middle, experts=experts, rows=factors.rows, real=factors.real)
    return Chain(x, None, operands, rest)


def _form(x: Tensor, experts: Tensor, factors: Factors) -> Form:
    """Return the form with the least cost: multiplications, and numbers that are moved."""
    sizes, (samples, k), (ranks, _), (number, r) = shapes(x, experts, factors.down, factors.rows)
    wide, rows = sizes[-1] + factors.up.shape[1], 1
    for size in sizes[:-1]:
        rows *= size
    every = ranks * wide * (rows + _MOVE)
    own = k * r * wide * (rows + 3 * samples * _MOVE) + _CALLS
    if samples != rows:
        return "own" if own <= every else "all"
    pairs = rows * k
    padded = pairs + number * _BLOCK
    moved = padded * sizes[-1] + 2 * pairs * wide + 3 * (padded // _BLOCK) * r * wide
    blocks = padded * r * wide + 2 * _MOVE * moved
    if blocks < own and blocks < every:
        return "blocks"
    return "own" if own <= every else "all"


def _all(x: Tensor, weights: Tensor, factors: Factors) -> Chain:
    middle = partial(_weigh, owner=factors.owner)
    return Chain(x, factors.down.mT, (weights, factors.up), middle)


def _weigh(h: Tensor, weights: Tensor, up: Tensor, owner: Tensor) -> Ends:
    """Weigh the first product `h [rows, Σ r]` of all experts."""
    h, each = h.reshape(-1, up.shape[0]), weights.index_select(-1, owner)
    if each.dim() == 1:
        return Ends(h * each, up)
    samples = shapes(each)[0][0]
    if shapes(h)[0][0] == samples:
        return Ends(h * each, up)
    return Ends((h.view(samples, -1, up.shape[0]) * each.unsqueeze(1)).flatten(0, 1), up)


def _own(
    x: Tensor,
    weights: Tensor,
    down: Tensor,
    up: Tensor,
    experts: Tensor,
    rows: Tensor,
    real: Tensor | None,
) -> Tensor:
    """Return the delta `[samples, rows, out]` by one product for each sample, `experts
    [samples, k]`.
    """
    samples, k = shapes(experts)[0]
    index = rows.index_select(0, experts.flatten())  # [samples · k, r]
    if real is not None:
        real = real.index_select(0, experts.flatten()).view(samples, 1, k, -1)
    index = index.flatten()
    own_down = down.index_select(0, index).view(samples, -1, down.shape[1])
    own_up = up.index_select(0, index).view(samples, -1, up.shape[1])
    h = torch.bmm(x.reshape(samples, -1, down.shape[1]), own_down.mT)
    weights = weights.view(samples, -1, k, 1)
    weights = weights if real is None else weights * real
    h = (h.unflatten(-1, (k, -1)) * weights).flatten(2)
    return torch.bmm(h, own_up)


def _blocks(
    x: Tensor,
    weights: Tensor,
    down: Tensor,
    up: Tensor,
    experts: Tensor,
    rows: Tensor,
    real: Tensor | None,
) -> Tensor:
    """Return the delta `[tokens, out]` by one product for each block of rows of one expert,
    `experts [tokens, k]`.

    There are at most `pairs // block + experts` blocks; that bound needs no count from the device.
    """
    (tokens, k), (number, _) = shapes(experts, rows)
    pairs = tokens * k
    blocks = pairs // _BLOCK + min(number, pairs)
    slot, expert = _slots(experts.flatten(), number, blocks)
    # The token and the weight in each slot; a slot that stays empty has weight 0.
    pair = torch.arange(pairs, device=x.device)
    token = pair.new_zeros(blocks * _BLOCK).scatter(0, slot, pair.div(k, rounding_mode="floor"))
    weight = weights.new_zeros(blocks * _BLOCK).scatter(0, slot, weights.flatten())
    gathered = x.reshape(-1, down.shape[1]).index_select(0, token).view(blocks, _BLOCK, -1)
    each = weight.view(blocks, _BLOCK, 1)
    if real is not None:
        each = each * real.index_select(0, expert).unsqueeze(1)
    index = rows.index_select(0, expert).flatten()
    own_down = down.index_select(0, index).view(blocks, -1, down.shape[1])
    own_up = up.index_select(0, index).view(blocks, -1, up.shape[1])
    h = torch.bmm(gathered, own_down.mT) * each
    found = torch.bmm(h, own_up).flatten(0, 1).index_select(0, slot)
    return found.view(tokens, k, -1).sum(1)


def _slots(experts: Tensor, number: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Return the slot of each pair of token and expert, and the expert of each block.

    Args:
        experts: The expert of each pair, `[pairs]`.
        number: Number of experts.
        blocks: Number of blocks, enough for all.
    """
    counts = experts.new_zeros(number).scatter_add(0, experts, torch.ones_like(experts))
    used = counts.add(_BLOCK - 1).div(_BLOCK, rounding_mode="floor")
    ends = used.cumsum(0)
    order = experts.argsort(stable=True)
    ordered = experts.index_select(0, order)
    place = torch.arange(experts.shape[0], device=experts.device)
    place = place - (counts.cumsum(0) - counts).index_select(0, ordered)  # among the expert's pairs
    place = place + (ends - used).index_select(0, ordered) * _BLOCK
    slot = torch.empty_like(place).scatter(0, order, place)
    every = torch.arange(blocks, device=experts.device)
    expert = torch.searchsorted(ends, every, right=True).clamp(max=number - 1)
    return slot, expert
