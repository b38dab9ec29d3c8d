# SPDX-License-Identifier: Apache-2.0
"""Between the forms a VB-LoRA adapter has in a model and those it has in a file.

| | in the file | in the model |
|---|---|---|
| full | `vblora_logits_A [..., num_vectors]` | the same, or what follows from it |
| compact | `…_topk_indices [..., topk]`, `…_topk_weights [..., topk - 1]` | the same, or logits `[..., topk]`, or full logits |
| shared bank | `vblora_vector_bank [0, vector_length]`: elsewhere | no bank of its own |
| gate | `vblora_vector_bank [1, num_vectors, vector_length]`, `vblora_gate` | a gate |

The last two say by the bank's shape that there is more to the adapter than other readers know, so
that they refuse the file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...base.errors import CheckpointError
from .bank import compress, expand, select_topk, selected_logits
from .config import Form
from .layer import INDICES, LOGITS, WEIGHTS

_BANK = "vblora_vector_bank"


def export_state(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The tensors that a checkpoint has, of those that the model has."""
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key.rpartition(".")[2]
        if name == _BANK and config.output_gate:
            result[key] = tensor.unsqueeze(0)
        elif name in LOGITS:
            result.update(_exported_logits(key, tensor, state.get(key + INDICES), config))
        elif name.endswith(WEIGHTS):
            result.update(_exported_weights(key.removesuffix(WEIGHTS), tensor, state, config))
        elif not name.endswith(INDICES):
            result[key] = tensor
    if config.shares_bank and state:
        root = "base_model." if any(key.startswith("base_model.") for key in state) else ""
        result[root + _BANK] = torch.empty(0, config.vector_length)
    return result


def _exported_weights(
    key: str, weights: Tensor, state: dict[str, Tensor], config: Any
) -> dict[str, Tensor]:
    """A checkpoint's tensors for indices and weights; logits, minus infinity for the rest, if it is
    to have such.
    """
    indices = state[key + INDICES]
    if not config.save_only_topk_weights:
        return {key: expand(indices, weights, config.num_vectors)}
    return {key + INDICES: indices, key + WEIGHTS: weights.to(config.weights_dtype)}


def _exported_logits(
    key: str, logits: Tensor, indices: Tensor | None, config: Any
) -> dict[str, Tensor]:
    """A checkpoint's tensors for logits, for all vectors or for those that `indices` names."""
    if indices is not None:
        order = logits.argsort(dim=-1, descending=True)
        weights = logits.gather(-1, order).softmax(-1, dtype=torch.float32)[..., :-1]
        indices = indices.gather(-1, order)
        if not config.save_only_topk_weights:
            return {key: expand(indices, weights, config.num_vectors)}
        return {
            key + INDICES: indices,
            key + WEIGHTS: weights.to(config.weights_dtype).contiguous(),
        }
    if not config.save_only_topk_weights:
        return {key: logits}
    indices, weights = compress(logits, config.topk, config.weights_dtype)
    return {key + INDICES: indices, key + WEIGHTS: weights}


def import_state(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The tensors that the model has, of those that a checkpoint has.

    Raises:
        CheckpointError: Indices without weights, or beyond the bank; or a bank where there should
            be none, or none.
    """
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key.rpartition(".")[2]
        if name == _BANK:
            bank = _imported_bank(key, tensor, config)
            result.update({} if bank is None else {key: bank})
        elif name in LOGITS:
            result.update(_imported_logits(key, tensor, config))
        elif name.endswith(INDICES):
            weights = _checked(key, tensor, state, config)
            result.update(_imported_choice(key.removesuffix(INDICES), tensor, weights, config))
        elif not name.endswith(WEIGHTS):
            result[key] = tensor
    return result


def _imported_bank(key: str, bank: Tensor, config: Any) -> Tensor | None:
    """An adapter's own bank, None where it has none."""
    if config.shares_bank != (bank.shape[0] == 0):
        says, remedy = (
            (
                "a bank, but the config names a shared one",
                "Load it with the config that was saved with it, without `bank`.",
            )
            if config.shares_bank
            else (
                "no bank, but the config names none, by `bank` or `bank_sha256`",
                "Say where its shared bank is: `config=VBLoRAConfig.from_pretrained(adapter, "
                "bank=folder)`.",
            )
        )
        raise CheckpointError(f"`{key}` has {says}; nothing was loaded. {remedy}")
    if bank.shape[0] == 0:
        return None
    return bank.squeeze(0) if config.output_gate and bank.dim() == 3 else bank


def _checked(key: str, indices: Tensor, state: dict[str, Tensor], config: Any) -> Tensor:
    """The weights that go with indices."""
    name = key.removesuffix(INDICES) + WEIGHTS
    weights = state.get(name)
    if weights is None or (*weights.shape[:-1], weights.shape[-1] + 1) != tuple(indices.shape):
        raise CheckpointError(f"`{key}` has no `{name}` that goes with it; nothing was loaded.")
    if indices.is_floating_point() or not all(
        0 <= int(i) < config.num_vectors for i in indices.aminmax()
    ):
        raise CheckpointError(
            f"`{key}` points beyond the bank's {config.num_vectors} vectors; nothing was loaded. "
            "Load it with the config that "
            "was saved with it."
        )
    return weights


def _imported_choice(key: str, indices: Tensor, weights: Tensor, config: Any) -> dict[str, Tensor]:
    """The model's tensors for indices and weights."""
    if config.form is Form.LOGITS:
        return {key: expand(indices, weights, config.num_vectors)}
    if config.form is Form.WEIGHTS:
        return {key + INDICES: indices, key + WEIGHTS: weights}
    return {key + INDICES: indices, key: selected_logits(weights)}


def _imported_logits(key: str, logits: Tensor, config: Any) -> dict[str, Tensor]:
    """The model's tensors for logits of all vectors."""
    if config.form is Form.LOGITS:
        return {key: logits}
    if config.form is Form.WEIGHTS:
        indices, weights = compress(logits, config.topk, config.weights_dtype)
        return {key + INDICES: indices, key + WEIGHTS: weights}
    indices, chosen = select_topk(logits, config.topk)
    return {key + INDICES: indices, key: chosen}
