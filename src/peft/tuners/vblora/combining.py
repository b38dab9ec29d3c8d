# SPDX-License-Identifier: Apache-2.0
"""Exact weighted sums of VB-LoRA adapters: the ranks side by side, the banks concatenated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...base.errors import PeftNotSupportedError
from ...base.geometry import Geometry
from ...core.combining import Combination, Combined, check_same, uniform_scale
from ...ops.low_rank import wide
from .config import VBLoRAConfig
from .layer import VBLoRALayer
from .storage import BANK, LOGITS

# Distance of logits that must not be selected below the selected ones: their weight underflows to
# zero.
_FAR = 1000.0


class JoinedBank(NamedTuple):
    """Bank with the vectors of several adapters.

    Attributes:
        vectors: `[num_vectors, vector_length]`.
        a_starts, b_starts: Index of the first vector of each adapter, for its factors `A` and `B`.
        zero: Index of a vector of zeros at the end, for layers that an adapter lacks.
    """

    vectors: Tensor
    a_starts: list[int]
    b_starts: list[int]
    zero: int


def join_banks(banks: Sequence[Tensor], weights: Sequence[float], with_zero: bool) -> JoinedBank:
    """Concatenate banks, each scaled by the root of its adapter's weight.

    Both `A` and `B` are composed from the bank, so their product has the weight. For a negative
    weight `B` uses a negated copy of the vectors.

    Args:
        banks: `[num_vectors, vector_length]` each.
        weights: Weight of each adapter.
        with_zero: Add the vector of zeros.
    """
    blocks: list[Tensor] = []
    a_starts, b_starts, count = [], [], 0
    for bank, weight in zip(banks, weights, strict=True):
        scaled = wide(bank) * math.sqrt(abs(weight))
        copies = [scaled, -scaled] if weight < 0 else [scaled]
        a_starts.append(count)
        b_starts.append(count + len(bank) * (len(copies) - 1))
        blocks += copies
        count += len(bank) * len(copies)
    if with_zero:
        blocks.append(torch.zeros_like(blocks[0][:1]))
    return JoinedBank(torch.cat(blocks), a_starts, b_starts, count)


def embed_logits(logits: Tensor, topk: int, start: int, num_vectors: int, new_topk: int) -> Tensor:
    """Return logits over a larger bank that select the same vectors with the same weights.

    Args:
        logits: `[..., n]`.
        topk: Number of vectors that they select.
        start: Index of the first of the `n` vectors in the larger bank.
        num_vectors: Size of the larger bank.
        new_topk: Number of vectors to select, at least `topk`; the others get no weight.

    Returns:
        `[..., num_vectors]`.
    """
    logits = wide(logits)
    selected, indices = logits.topk(topk, dim=-1)
    far = selected[..., -1:] - _FAR
    if new_topk > topk:
        # Minus infinity stays: it tells that a compact file lacked the logit.
        others = far.expand_as(logits).where(~logits.isneginf(), logits)
        logits = others.scatter(-1, indices, selected)
    result = far.repeat_interleave(num_vectors, dim=-1)
    result[..., start : start + logits.shape[-1]] = logits
    return result


def combine(
    configs: Mapping[str, VBLoRAConfig], layers: Mapping[str, VBLoRALayer], request: Combination
) -> Combined:
    """Return the weighted sum of adapters without gates, of one vector length."""
    check_same(configs, request, "vector_length")
    gated = [name for name in request.adapters if configs[name].output_gate]
    if gated:
        raise PeftNotSupportedError(
            f"Adapters with an output gate ({', '.join(gated)}) have a factor in each layer; merge "
            "them instead."
        )
    adapters = [configs[name] for name in request.adapters]
    weights = [weight * uniform_scale(layers.values(), name) for name, weight in request.terms()]
    banks = [
        next(layer for layer in layers.values() if name in layer.scaling).bank(name).detach()
        for name in request.adapters
    ]
    incomplete = any(
        name not in layer.scaling for layer in layers.values() for name in request.adapters
    )
    bank = join_banks(banks, weights, incomplete)
    num_vectors, topk = len(bank.vectors), max(config.topk for config in adapters)
    result = Combined(
        replace(
            adapters[0],
            r=sum(config.r for config in adapters),
            num_vectors=num_vectors,
            topk=topk,
            bank=None,
            bank_sha256=None,
            output_gate=False,
            train_topk_weights=False,  # the logits below are full
        )
    )
    result.tensors[BANK] = bank.vectors
    for path, layer in layers.items():
        blocks_A, blocks_B = [], []
        for i, (name, config) in enumerate(zip(request.adapters, adapters, strict=True)):
            if name in layer.scaling:
                logits_A, logits_B = layer.logits(name)
                k, start_A, start_B = config.topk, bank.a_starts[i], bank.b_starts[i]
            else:
                logits_A, logits_B = _logits_of_one_vector(config, layer.geometry, banks[i])
                k, start_A, start_B = 1, bank.zero, bank.zero
            blocks_A.append(embed_logits(logits_A, k, start_A, num_vectors, topk))
            blocks_B.append(embed_logits(logits_B, k, start_B, num_vectors, topk))
        for name, logits in zip(LOGITS, (torch.cat(blocks_A), torch.cat(blocks_B, 1)), strict=True):
            result.tensors[f"{path}.{name}"] = logits
        result.errors[path] = 0.0
    return result


def _logits_of_one_vector(
    config: VBLoRAConfig, size: Geometry, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return logits of `A` and `B` over a bank of one vector."""
    tiles_in, tiles_out = config.tiles(size.in_features), config.tiles(size.out_features)
    return like.new_zeros(config.r, tiles_in, 1), like.new_zeros(tiles_out, config.r, 1)
