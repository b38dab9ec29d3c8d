# SPDX-License-Identifier: Apache-2.0
"""Pure functions of tensors that compose low-rank factors from a vector bank: the math of VB-LoRA.

A *tile* is a row of `vector_length` consecutive entries of a low-rank factor (the paper calls it a
sub-vector). Each tile has `num_vectors` logits and is the weighted sum of the `topk` bank vectors
with the largest logits:

    tile = sum_{i in top-k} softmax(logits[top-k])_i * bank[i]

Shapes: `logits [..., num_vectors]`, `bank [num_vectors, vector_length]`, rank `r`; `indices` and
`weights` of selected vectors `[..., topk]`, indices of any integer dtype.

Source: arXiv:2405.15179, section 3
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base.tracing import shapes
from ...ops.derivatives import gradients_again
from ...ops.dispatch import is_batched, is_eager
from ...ops.triton_support import with_kernel

_FUSED_DEVICES = frozenset({"cpu", "cuda"})
"""Devices on which `embedding_bag` has a gradient for its per-sample weights."""

_LONG, _BLOCK = 4096, 64
"""Number of logits from which top-k on a CPU first searches blocks, and the size of a block."""

_INDEX_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


class Selection(NamedTuple):
    """Vectors that tiles select, and their weights."""

    indices: Tensor
    weights: Tensor


def _example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return arguments of `_compose` to try its kernel: no powers of two, no ties."""
    shapes = (3, 2, 37), (5, 3, 37), (37, 20)
    numbers = (
        torch.arange(math.prod(shape), device=device, dtype=torch.float32).sin().view(shape)
        for shape in shapes
    )
    logits_A, logits_B, bank = (tensor.requires_grad_() for tensor in numbers)
    return logits_A, logits_B, bank, 3


@with_kernel(
    "compose_factors",
    "Tensor logits_A, Tensor logits_B, Tensor bank, int topk",
    "(Tensor, Tensor)",
    _example,
)
def _compose(logits_A: Tensor, logits_B: Tensor, bank: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return `A [r, in]` and the transpose of `B`, `[r, out]`."""
    selected_A, indices_A = fast_topk(logits_A, topk)
    selected_B, indices_B = fast_topk(logits_B, topk)
    # The tiles of both factors are one batch, so that one gradient of the bank's size is made.
    selected = torch.cat([selected_A.flatten(0, 1), selected_B.flatten(0, 1)])
    indices = torch.cat([indices_A.flatten(0, 1), indices_B.flatten(0, 1)])
    # float32 also for a half-precision bank: the result is rounded once, and CUDA has no bfloat16
    # gradient for the weights of `embedding_bag`.
    dtype = torch.promote_types(bank.dtype, torch.float32)
    weights = selected.softmax(dim=-1, dtype=dtype)
    tiles = _weighted_sum(weights, indices, bank.to(dtype)).to(bank.dtype)
    (r, columns, _), (rows, *_) = shapes(logits_A, logits_B)
    tiles_A, tiles_B = tiles.split([r * columns, rows * r])
    A, B = place_tiles(tiles_A.unflatten(0, (r, columns)), tiles_B.unflatten(0, (rows, r)))
    return A, B.mT


def compose_factors(
    logits_A: Tensor, logits_B: Tensor, bank: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """Compose both low-rank factors of one layer, `ΔW = B @ A`.

    `A[j, t*v + e] = tile_A[j, t, e]` and `B[t*v + e, j] = tile_B[t, j, e]` with
    `v = vector_length`: a tile always runs along the features.
    `tile = sum_i softmax(logits[top-k])_i * bank[top-k_i]`: the softmax runs over the selected
    logits only, so the others get no weight and no gradient.

    Args:
        logits_A: `[r, in / vector_length, num_vectors]`; entries may be `-inf` if at least one of
            each row is finite.
        logits_B: `[out / vector_length, r, num_vectors]`.
        bank: `[num_vectors, vector_length]`.
        topk: Vectors summed into each tile, from 1 to `num_vectors`. The paper recommends 2.

    Returns:
        `A [r, in]` and `B [out, r]` in the bank's dtype, computed in float32 or wider. Cost:
        `r * (in + out) * topk` multiplications and one pass over the logits for top-k. On CPU and
        CUDA no tensor `[..., topk, vector_length]` is allocated, in forward or first backward. Runs
        as one kernel of `bank_triton.py` on GPUs where that can be launched, unless
        `torch.use_deterministic_algorithms` is on.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
        >>> logits = torch.tensor([[[0.0, 0.0, -9.0]]])
        >>> compose_factors(logits, logits, bank, topk=2)[0]
        tensor([[0.5000, 0.5000]])

    Source: arXiv:2405.15179, section 3
    """
    A, B = _compose(logits_A, logits_B, bank, topk)
    return A, B.mT


def compose_tiles(indices: Tensor, weights: Tensor, bank: Tensor) -> Tensor:
    """Return the tiles of given indices and weights: `tile = sum_i weights_i * bank[indices_i]`.

    Returns:
        `[..., vector_length]` in the bank's dtype, computed in float32 or wider, at
        `tiles * topk * vector_length` multiplications. No tensor of `num_vectors` entries is made.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
        >>> compose_tiles(torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([0.25, 0.75]), bank)
        tensor([0.2500, 0.7500])

    Source: arXiv:2405.15179, section 3
    """
    dtype = torch.promote_types(bank.dtype, torch.float32)
    return _weighted_sum(weights.to(dtype), indices.int(), bank.to(dtype)).to(bank.dtype)


def place_tiles(tiles_A: Tensor, tiles_B: Tensor) -> tuple[Tensor, Tensor]:
    """Join tiles along the features: `A[..., j, t*v + e] = tiles_A[..., j, t, e]`,
    `B[..., t*v + e, j] = tiles_B[..., t, j, e]` with `v = vector_length`.

    Args:
        tiles_A: `[..., r, in / v, v]`.
        tiles_B: `[..., out / v, r, v]`.

    Returns:
        `A [..., r, in]` and `B [..., out, r]`, the transpose of a contiguous tensor. No
        multiplications; `B` is copied.
    """
    return tiles_A.flatten(-2), tiles_B.transpose(-3, -2).flatten(-2).mT


def fast_topk(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Compute `logits.topk(topk)`; on a CPU its time hardly grows with the bank.

    Long rows are searched by blocks: the `topk` largest entries are in the `topk` blocks with the
    largest maxima.

    Returns:
        Values and indices `[..., topk]`, largest first, in any order among equal values. Cost: one
        pass over `logits`.
    """
    n = logits.shape[-1]
    if torch.jit.is_tracing() or logits.device.type != "cpu":
        return logits.topk(topk, dim=-1)
    if n < _LONG or n % _BLOCK or topk > n // _BLOCK:
        return logits.topk(topk, dim=-1)
    with torch.no_grad():
        blocks = logits.unflatten(-1, (-1, _BLOCK))
        leading = blocks.amax(dim=-1).topk(topk, dim=-1).indices
        entries = leading.unsqueeze(-1).expand(*leading.shape, _BLOCK)
        candidates = blocks.gather(-2, entries).flatten(-2)
        best = candidates.topk(topk, dim=-1).indices
        indices = leading.gather(-1, best // _BLOCK) * _BLOCK + best % _BLOCK
    return logits.gather(-1, indices), indices


def select_topk(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return the indices of each tile's vectors, in `index_dtype`, largest logit first, and their
    logits `[..., topk]`.

    Example:
        >>> select_topk(torch.tensor([1.0, 0.0, 1.5, -4.0]), topk=2)
        (tensor([2, 0], dtype=torch.uint8), tensor([1.5000, 1.0000]))
    """
    selected, indices = fast_topk(logits, topk)
    return indices.to(index_dtype(logits.shape[-1])), selected


def compress(
    logits: Tensor, topk: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Reduce logits to the indices and weights of the selected vectors, as a compact file has them.

    Args:
        dtype: Dtype of the weights; Hugging Face PEFT reads float32.

    Returns:
        The indices of `select_topk`, and `weights [..., topk - 1]`: the softmax of the selected
        logits without its last entry, which is one minus the others.

    Example:
        >>> compress(torch.tensor([1.0, 0.0, 1.5, -4.0]), topk=2)
        (tensor([2, 0], dtype=torch.uint8), tensor([0.6225]))

    Source: arXiv:2405.15179, section 3
    """
    indices, selected = select_topk(logits, topk)
    weights = selected.softmax(dim=-1, dtype=torch.float32)[..., :-1]
    return indices, weights.to(dtype).contiguous()


def expand(
    indices: Tensor, weights: Tensor, num_vectors: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rebuild logits that compose to the same tiles as the logits that were compressed.

    `logits[indices] = log(weights)` and `-inf` elsewhere: the softmax over the selected logits
    gives the weights.

    Args:
        weights: `[..., topk - 1]`, any floating dtype.
        dtype: Dtype of the result.

    Returns:
        `[..., num_vectors]`. For a weight of zero (or a last one that rounding made negative) the
        logit is the log of the smallest normal float32, not `-inf`, so top-k selects its index.

    Example:
        >>> expand(torch.tensor([2, 0]), torch.tensor([1.0]), num_vectors=3).softmax(-1)
        tensor([1.1755e-38, 0.0000e+00, 1.0000e+00])
    """
    selected = selected_logits(weights)
    logits = selected.new_full((*indices.shape[:-1], num_vectors), -torch.inf)
    return logits.scatter(-1, indices.long(), selected).to(dtype)


def all_weights(weights: Tensor) -> Tensor:
    """Return the weights `[..., topk]` of a compact file's `weights [..., topk - 1]`, which lack
    the last: one minus the others, or zero where rounding made it negative.

    Example:
        >>> all_weights(torch.tensor([[0.75], [1.0]], dtype=torch.float16))
        tensor([[0.7500, 0.2500],
                [1.0000, 0.0000]])
    """
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    return torch.cat((weights, (1 - weights.sum(dim=-1, keepdim=True)).clamp(min=0)), dim=-1)


def selected_logits(weights: Tensor) -> Tensor:
    """Return logits `[..., topk]` whose softmax is `all_weights(weights)`, for a compact file's
    `weights [..., topk - 1]`.

    Source: arXiv:2405.15179, section 3
    """
    return all_weights(weights).clamp(min=torch.finfo(torch.float32).tiny).log()


def index_dtype(num_vectors: int) -> torch.dtype:
    """Return the smallest of uint8, int16, int32 and int64 that holds the number `num_vectors`.

    The largest index, `num_vectors - 1`, would fit the smaller dtype at 256 and 32768 vectors;
    Hugging Face PEFT changes the dtype at the same number as this function.

    Example:
        >>> index_dtype(255), index_dtype(256)
        (torch.uint8, torch.int16)
    """
    return next(dtype for dtype in _INDEX_DTYPES if num_vectors <= torch.iinfo(dtype).max)


def is_topk_only(logits: Tensor) -> bool:
    """Return whether `logits` came out of `expand` and so can't be trained further.

    Reads the values, which waits for the device: call it after loading, never in a forward. The
    result is False for `topk == num_vectors`, where no logit was left out.
    """
    return bool(torch.isneginf(logits).any())


def savable_parameters(
    tiles: int, num_vectors: int, topk: int | None = None, dtype: torch.dtype = torch.float32
) -> float:
    """Return the size of the logits of some tiles in a checkpoint, in float32 numbers.

    Args:
        topk: Vectors kept for each tile in a compact file; None for the full logits.
        dtype: Dtype of a compact file's weights.

    Returns:
        `tiles * num_vectors`, or `tiles * ((topk - 1) * weight_size + topk * index_size) / 4` with
        sizes in bytes. Add the fractions of all tensors before rounding down.

    Example:
        >>> savable_parameters(3, num_vectors=10), savable_parameters(3, num_vectors=10, topk=2)
        (30.0, 4.5)
    """
    if topk is None:
        return float(tiles * num_vectors)
    return tiles * ((topk - 1) * dtype.itemsize + topk * index_dtype(num_vectors).itemsize) / 4


def _weighted_sum(weights: Tensor, indices: Tensor, bank: Tensor) -> Tensor:
    """Return `sum_k weights[..., k] * bank[indices[..., k]]`, `[..., vector_length]`."""
    # Compilers make one kernel of the plain sum.
    if bank.device.type not in _FUSED_DEVICES or not is_eager():
        return _gathered_sum(weights, indices, bank)
    # One kernel, as fast as gather-and-sum (at half precision up to twice as fast), whose backward
    # keeps `topk` numbers a tile in place of `topk * vector_length`. A dense
    # `[tiles, num_vectors] @ bank` took 2 to 8 times as long for 256 to 2048 vectors.
    topk = indices.shape[-1]
    flat, rows = weights.reshape(-1, topk), indices.reshape(-1, topk)
    sums = F.embedding_bag(rows, bank, mode="sum", per_sample_weights=flat)
    if sums.grad_fn is not None:
        sums.grad_fn.register_hook(functools.partial(_differentiable_gradients, flat, rows, bank))
    return sums.reshape(*indices.shape[:-1], bank.shape[-1])


def _gathered_sum(weights: Tensor, indices: Tensor, bank: Tensor) -> Tensor:
    """Compute `_weighted_sum` with operations that all transforms of autograd support."""
    return (weights.unsqueeze(-1) * F.embedding(indices, bank)).sum(dim=-2)


def _differentiable_gradients(
    weights: Tensor,
    indices: Tensor,
    bank: Tensor,
    grad_inputs: tuple[Tensor | None, ...],
    grad_outputs: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...] | None:
    """Replace the gradients of `embedding_bag`, a hook of its node, where they are differentiated
    again or come in a batch: its own backward supports neither.
    """
    if not (torch.is_grad_enabled() or is_batched(grad_outputs[0])):
        return None
    grad_bank, grad_weights = gradients_again(
        lambda bank, weights: _gathered_sum(weights, indices, bank),
        (bank, weights),
        [gradient is not None for gradient in grad_inputs],
        grad_outputs[:1],
    )
    return (
        None if grad_bank is None else grad_bank.view(bank.shape),
        None if grad_weights is None else grad_weights.view(-1),
    )
