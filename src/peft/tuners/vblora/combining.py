# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of VB-LoRA adapters, exact: their ranks side by side, and their banks one below the
other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...base.errors import PeftNotSupportedError
from ...core.combining import Combination, Combined, check_same, uniform_scale
from ...ops.low_rank import wide
from .config import VBLoRAConfig
from .layer import VBLoRALayer

# How far below its chosen logits a position has those that it must not choose: their weight
# underflows to zero.
_FAR = 1000.0


class JoinedBank:
    """A bank that holds those of several adapters, each scaled by the root of its weight.

    `A` and `B` are both composed from an adapter's vectors, so that the root comes in twice. Of a
    negative weight the sign goes to `B`, which then has a copy of the vectors to itself. A vector
    of zeros is for layers that an adapter lacks.

    Args:
        banks: `[num_vectors, vector_length]` each.
        weights: Each adapter's factor.
        with_zero: Whether to add the vector of zeros.

    Attributes:
        vectors: All of them.
        for_A, for_B: Where each adapter's vectors begin, for its factors `A` and `B`.
        zero: Where the vector of zeros is.
    """

    def __init__(self, banks: Sequence[Tensor], weights: Sequence[float], with_zero: bool) -> None:
        blocks: list[Tensor] = []
        self.for_A, self.for_B = [], []
        count = 0
        for bank, weight in zip(banks, weights, strict=True):
            scaled = wide(bank) * math.sqrt(abs(weight))
            own = [scaled, -scaled] if weight < 0 else [scaled]
            self.for_A.append(count)
            self.for_B.append(count + len(bank) * (len(own) - 1))
            blocks += own
            count += len(bank) * len(own)
        self.zero = count
        if with_zero:
            blocks.append(torch.zeros_like(blocks[0][:1]))
        self.vectors = torch.cat(blocks)


def placed(logits: Tensor, topk: int, begin: int, num_vectors: int, wanted: int) -> Tensor:
    """Logits over a larger bank that choose the vectors they chose, with the same weights.

    Args:
        logits: `[..., n]`.
        topk: How many of them are chosen.
        begin: Where the `n` vectors begin in the larger bank.
        num_vectors: Its size.
        wanted: How many will be chosen; those above `topk` get no weight.

    Returns:
        `[..., num_vectors]`.
    """
    logits = wide(logits)
    chosen, indices = logits.topk(topk, dim=-1)
    far = chosen[..., -1:] - _FAR
    if wanted > topk:
        unchosen = far.expand_as(logits).where(
            ~logits.isneginf(), logits
        )  # minus infinity says that the rest was not saved
        logits = unchosen.scatter(-1, indices, chosen)
    result = far.repeat_interleave(num_vectors, dim=-1)
    result[..., begin : begin + logits.shape[-1]] = logits
    return result


def combine(
    configs: Mapping[str, VBLoRAConfig], layers: Mapping[str, VBLoRALayer], request: Combination
) -> Combined:
    """Return the weighted sum of adapters.

    Args:
        configs: The model's configs by adapter name.
        layers: The layers that have any of the adapters, by module path.
        request: The request.

    Raises:
        PeftValueError: Their vectors differ in length, or layers are scaled each in its own way.
        PeftNotSupportedError: One has an output gate.
    """
    check_same(configs, request, "vector_length")
    gated = [name for name in request.adapters if configs[name].output_gate]
    if gated:
        raise PeftNotSupportedError(
            f"Adapters with an output gate ({', '.join(gated)}) have a factor in each layer; merge "
            "them instead."
        )
    chosen = [configs[name] for name in request.adapters]
    weights = [weight * uniform_scale(layers.values(), name) for name, weight in request.terms()]
    banks = [
        next(layer for layer in layers.values() if name in layer.scaling).bank(name).detach()
        for name in request.adapters
    ]
    incomplete = any(
        name not in layer.scaling for layer in layers.values() for name in request.adapters
    )
    bank = JoinedBank(banks, weights, incomplete)
    n, topk = len(bank.vectors), max(config.topk for config in chosen)
    own_bank: dict[str, Any] = {"bank": None, "bank_sha256": None, "output_gate": False}
    result = Combined(
        replace(
            chosen[0], r=sum(config.r for config in chosen), num_vectors=n, topk=topk, **own_bank
        )
    )
    result.tensors["vblora_vector_bank"] = bank.vectors
    for path, layer in layers.items():
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for i, (name, config) in enumerate(zip(request.adapters, chosen, strict=True)):
            tiles = (
                config.tiles(layer.geometry.in_features),
                config.tiles(layer.geometry.out_features),
            )
            if name in layer.scaling:
                own = *layer.logits(name), config.topk, bank.for_A[i], bank.for_B[i]
            else:
                like = banks[i]
                own = (
                    like.new_zeros(config.r, tiles[0], 1),
                    like.new_zeros(tiles[1], config.r, 1),
                    1,
                    bank.zero,
                    bank.zero,
                )
            logits_A, logits_B, k, *begins = own
            for holder, logits, begin in zip(parts, (logits_A, logits_B), begins, strict=True):
                holder.append(placed(logits, k, begin, n, topk))
        result.tensors[f"{path}.vblora_logits_A"] = torch.cat(parts[0], dim=0)
        result.tensors[f"{path}.vblora_logits_B"] = torch.cat(parts[1], dim=1)
        result.errors[path] = 0.0
    return result
