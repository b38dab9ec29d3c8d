# SPDX-License-Identifier: Apache-2.0
"""Top-k composition from a vector bank: the arithmetic of VB-LoRA, as pure functions of tensors.

A *position* is one tile of `vector_length` entries of a low-rank factor. It owns a row of
`num_vectors` logits and is the mixture of the `topk` bank vectors it scores highest:

    tile = sum_{i in top-k} softmax(logits[top-k])_i * bank[i]

Shapes: `logits [..., num_vectors]`, `bank [num_vectors, vector_length]`, rank `r`.

Source: arXiv:2405.15179
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.derivatives import gradients_again
from ...ops.dispatch import is_batched, is_eager, shapes

_FUSED_DEVICES = frozenset({"cpu", "cuda"})
"""Where `embedding_bag` is known to have a gradient for its weights."""

_LONG, _BLOCK = 4096, 64
"""From which length on a CPU searches logits by blocks, and of which size these are."""

_INDEX_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def compose(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """Mix each position's `topk` best bank vectors.

    `tile = sum_i softmax(logits[top-k])_i * bank[top-k_i]`, the softmax running over the chosen
    logits only, so that all others get neither weight nor gradient.

    Args:
        logits: `[..., num_vectors]`; entries may be `-inf` as long as one of each row is finite.
        bank: `[num_vectors, vector_length]`.
        topk: between 1 and `num_vectors`; the paper finds 2 best.

    Returns:
        `[..., vector_length]` in the bank's dtype, computed in float32 at least. The cost is
        `positions * topk * vector_length` multiplications, next to a pass over `logits` to select;
        no `[..., topk, vector_length]` is held, now or for a first derivative (save off CPU and
        CUDA).

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
        >>> compose(torch.tensor([0.0, 0.0, -9.0]), bank, topk=2)
        tensor([0.5000, 0.5000])

    Source: arXiv:2405.15179
    """
    return _mixed(*best(logits, topk), bank)


def _mixed(chosen: Tensor, indices: Tensor, bank: Tensor) -> Tensor:
    """Return tiles `[..., vector_length]` for chosen logits `[..., topk]`."""
    # float32 even for a half bank: it rounds once, and CUDA has no bfloat16 gradient for the
    # weights of a bag.
    dtype = torch.promote_types(bank.dtype, torch.float32)
    return _weighted_sum(chosen.softmax(dim=-1, dtype=dtype), indices, bank.to(dtype)).to(
        bank.dtype
    )


def mix(indices: Tensor, weights: Tensor, bank: Tensor) -> Tensor:
    """Tiles of positions of which it is known what they chose:
    `tile = sum_i weights_i * bank[indices_i]`.

    Args:
        indices: `[..., topk]`, any integer dtype.
        weights: `[..., topk]`.
        bank: `[num_vectors, vector_length]`.

    Returns:
        `[..., vector_length]` in the bank's dtype, computed in float32 at least; nothing of size
        `num_vectors` is made.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
        >>> mix(torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([0.25, 0.75]), bank)
        tensor([0.2500, 0.7500])

    Source: arXiv:2405.15179
    """
    dtype = torch.promote_types(bank.dtype, torch.float32)
    return _weighted_sum(weights.to(dtype), indices.int(), bank.to(dtype)).to(bank.dtype)


def best(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """`logits.topk(topk)`, in a time that hardly grows with the bank.

    A long row is first searched by blocks: the `topk` largest numbers are in the `topk` blocks
    whose maxima are largest.

    Args:
        logits: `[..., num_vectors]`.
        topk: between 1 and `num_vectors`.

    Returns:
        The numbers and their indices, `[..., topk]`, largest first; of equal ones any.
    """
    n = logits.shape[-1]
    if (
        torch.jit.is_tracing()
        or logits.device.type != "cpu"
        or n < _LONG
        or n % _BLOCK
        or topk > n // _BLOCK
    ):
        return logits.topk(topk, dim=-1)
    with torch.no_grad():
        blocks = logits.unflatten(-1, (-1, _BLOCK))
        leading = blocks.amax(dim=-1).topk(topk, dim=-1).indices
        numbers = blocks.gather(-2, leading.unsqueeze(-1).expand(*leading.shape, _BLOCK)).flatten(
            -2
        )
        found = numbers.topk(topk, dim=-1).indices
        indices = leading.gather(-1, found // _BLOCK) * _BLOCK + found % _BLOCK
    return logits.gather(-1, indices), indices


def all_weights(weights: Tensor) -> Tensor:
    """The weights `[..., topk]` of which a compact file lacks the last: one minus the others, or
    zero if rounding made it less.

    Example:
        >>> all_weights(torch.tensor([[0.75], [1.0]], dtype=torch.float16))
        tensor([[0.7500, 0.2500],
                [1.0000, 0.0000]])

    Source: arXiv:2405.15179
    """
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    return torch.cat((weights, (1 - weights.sum(dim=-1, keepdim=True)).clamp(min=0)), dim=-1)


def place_tiles(tiles_A: Tensor, tiles_B: Tensor) -> tuple[Tensor, Tensor]:
    """Lay tiles side by side: `A[..., j, t*v + e] = tiles_A[..., j, t, e]`,
    `B[..., t*v + e, j] = tiles_B[..., t, j, e]`.

    Args:
        tiles_A: `[..., r, in / v, v]`.
        tiles_B: `[..., out / v, r, v]`.

    Returns:
        `A [..., r, in]` and `B [..., out, r]`.

    Source: arXiv:2405.15179
    """
    return tiles_A.flatten(-2), tiles_B.transpose(-2, -1).flatten(-3, -2)


def index_dtype(num_vectors: int) -> torch.dtype:
    """Smallest of uint8, int16, int32 and int64 that holds the number `num_vectors` itself.

    The largest index would fit one size lower at 256 and 32768 vectors; readers expect the boundary
    here.

    Example:
        >>> index_dtype(255), index_dtype(256)
        (torch.uint8, torch.int16)

    Source: arXiv:2405.15179
    """
    return next(dtype for dtype in _INDEX_DTYPES if num_vectors <= torch.iinfo(dtype).max)


def choose(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """What each position chooses.

    Args:
        logits: `[..., num_vectors]`.
        topk: vectors chosen per position.

    Returns:
        `indices [..., topk]` in `index_dtype`, best first, and their logits `[..., topk]`.

    Example:
        >>> choose(torch.tensor([1.0, 0.0, 1.5, -4.0]), topk=2)
        (tensor([2, 0], dtype=torch.uint8), tensor([1.5000, 1.0000]))

    Source: arXiv:2405.15179
    """
    chosen, indices = best(logits, topk)
    return indices.to(index_dtype(logits.shape[-1])), chosen


def compress(
    logits: Tensor, topk: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Reduce logits to what inference needs: the chosen vectors and their weights.

    Args:
        logits: `[..., num_vectors]`.
        topk: vectors kept per position.
        dtype: of the weights; other readers want float32.

    Returns:
        `indices [..., topk]` in `index_dtype`, best first, and `weights [..., topk - 1]`: the
        softmax of the chosen logits without its last entry, which is one minus the others.

    Example:
        >>> compress(torch.tensor([1.0, 0.0, 1.5, -4.0]), topk=2)
        (tensor([2, 0], dtype=torch.uint8), tensor([0.6225]))

    Source: arXiv:2405.15179
    """
    indices, chosen = choose(logits, topk)
    weights = chosen.softmax(dim=-1, dtype=torch.float32)[..., :-1]
    return indices, weights.to(dtype).contiguous()


def chosen_logits(weights: Tensor) -> Tensor:
    """Logits `[..., topk]` of chosen vectors whose softmax is their weights, of which
    `weights [..., topk - 1]` lacks the last.

    Source: arXiv:2405.15179
    """
    return all_weights(weights).clamp(min=torch.finfo(torch.float32).tiny).log()


def expand(
    indices: Tensor, weights: Tensor, num_vectors: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rebuild logits that compose to the same tiles as those that were compressed.

    `logits[indices] = log(weights)`, `-inf` elsewhere: the softmax over the chosen ones gives the
    weights back.

    Args:
        indices: `[..., topk]`, any integer dtype.
        weights: `[..., topk - 1]`, any floating dtype.
        num_vectors: size of the bank.
        dtype: of the result.

    Returns:
        `[..., num_vectors]`. A weight of zero (or a last one that rounding made negative) becomes
        the log of the smallest normal float32, not `-inf`, so top-k finds every index again.

    Example:
        >>> expand(torch.tensor([2, 0]), torch.tensor([1.0]), num_vectors=3).softmax(-1)
        tensor([1.1755e-38, 0.0000e+00, 1.0000e+00])

    Source: arXiv:2405.15179
    """
    chosen = chosen_logits(weights)
    logits = chosen.new_full((*indices.shape[:-1], num_vectors), -torch.inf)
    return logits.scatter(-1, indices.long(), chosen).to(dtype)


def is_topk_only(logits: Tensor) -> bool:
    """Whether `logits` came out of `expand` and so cannot be trained further.

    Reads the values, which waits for the device: ask once, after loading, never in a forward. With
    `topk == num_vectors` nothing was left out, and the answer is no.

    Source: arXiv:2405.15179
    """
    return bool(torch.isneginf(logits).any())


def savable_parameters(
    count: int, num_vectors: int, topk: int | None = None, dtype: torch.dtype = torch.float32
) -> float:
    """Size in a checkpoint of one logits tensor, in float32 numbers.

    Args:
        count: entries of the logits tensor, `positions * num_vectors`.
        num_vectors: size of the bank.
        topk: vectors kept per position by the compact form; `None` for the full logits.
        dtype: of the compact form's weights.

    Returns:
        `count`, or `positions * ((topk - 1) * weightsize / 4 + topk * itemsize / 4)` for indices of
        `itemsize` bytes. Fractions are meant to be added up over the model before the sum is cut to
        an integer.

    Example:
        >>> savable_parameters(3 * 10, num_vectors=10), savable_parameters(3 * 10, num_vectors=10, topk=2)
        (30.0, 4.5)

    Source: arXiv:2405.15179
    """
    if topk is None:
        return float(count)
    return (
        count
        // num_vectors
        * ((topk - 1) * dtype.itemsize + topk * index_dtype(num_vectors).itemsize)
        / 4
    )


def compose_in_full(
    logits_A: Tensor, logits_B: Tensor, bank: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """Compose both low-rank factors of one layer in plain operations; as `factors.compose_factors`."""
    (chosen_A, indices_A), (chosen_B, indices_B) = best(logits_A, topk), best(logits_B, topk)
    # All positions are one bag after the other, so that there is one gradient of the bank's size.
    chosen = torch.cat([chosen_A.flatten(0, 1), chosen_B.flatten(0, 1)])
    tiles = _mixed(chosen, torch.cat([indices_A.flatten(0, 1), indices_B.flatten(0, 1)]), bank)
    (r, tiles_A, _), (tiles_B, *_) = shapes(logits_A, logits_B)
    of_A, of_B = tiles.split([r * tiles_A, tiles_B * r])
    return place_tiles(of_A.unflatten(0, (r, tiles_A)), of_B.unflatten(0, (tiles_B, r)))


def _weighted_sum(weights: Tensor, indices: Tensor, bank: Tensor) -> Tensor:
    """`sum_k weights[..., k] * bank[indices[..., k]]`: two of `[..., topk]` and a bank to
    `[..., vector_length]`.
    """
    compiled = torch.compiler.is_compiling()
    if bank.device.type not in _FUSED_DEVICES or not (compiled or is_eager()):
        return _gathered_sum(weights, indices, bank)
    # One kernel, as fast as gather-and-sum (at half precision up to twice as fast) while the
    # backward keeps `topk` numbers a position in place of `topk * vector_length`; a dense
    # `[positions, num_vectors] @ bank` took 2 to 8 times as long for 256 to 2048 vectors.
    topk = indices.shape[-1]
    flat, rows = weights.reshape(-1, topk), indices.reshape(-1, topk)
    bags = F.embedding_bag(rows, bank, mode="sum", per_sample_weights=flat)
    if not compiled and bags.grad_fn is not None:
        bags.grad_fn.register_hook(functools.partial(_differentiable, flat, rows, bank))
    return bags.reshape(*indices.shape[:-1], bank.shape[-1])


def _gathered_sum(weights: Tensor, indices: Tensor, bank: Tensor) -> Tensor:
    """Return the same by operations that every transform knows."""
    return (weights.unsqueeze(-1) * F.embedding(indices, bank)).sum(dim=-2)


def _differentiable(
    weights: Tensor, indices: Tensor, bank: Tensor, of_inputs: Any, of_outputs: Any
) -> Any:
    """Return gradients in place of those of `embedding_bag`, where these are differentiated again.

    Its own can't be. This is a hook of its node in the graph.
    """
    if not (torch.is_grad_enabled() or is_batched(of_outputs[0])):
        return None
    wanted = [gradient is not None for gradient in of_inputs]
    own = gradients_again(
        lambda bank, weights: _gathered_sum(weights, indices, bank),
        (bank, weights),
        wanted,
        of_outputs[:1],
    )
    return tuple(
        [
            g if g is None else g.view(shape)
            for g, shape in zip(own, (bank.shape, (-1,)), strict=True)
        ]
    )
