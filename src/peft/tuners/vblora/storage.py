# SPDX-License-Identifier: Apache-2.0
"""Storage formats of a VB-LoRA adapter in a model and in a file, and the conversions.

Tensors of each factor in the model, by `StorageFormat`; `B` has the same as `A`:

| format | tensors | use |
|---|---|---|
| `LOGITS` | `vblora_logits_A [..., num_vectors]` | training, inference |
| `TOPK_LOGITS` | `vblora_logits_A [..., topk]`, `…_topk_indices [..., topk]` | training weights |
| `TOPK_WEIGHTS` | `…_topk_indices [..., topk]`, `…_topk_weights [..., topk - 1]` | inference |

Tensors of each factor in a file:

| format | tensors | option |
|---|---|---|
| full | `vblora_logits_A [..., num_vectors]` | default |
| compact | `…_topk_indices [..., topk]`, uint8 to int64 | `save_only_topk_weights` |
| | `…_topk_weights [..., topk - 1]`, float32 or half | `topk_weights_dtype` |

The bank in a file, `vblora_vector_bank`:

| bank | shape | option |
|---|---|---|
| own | `[num_vectors, vector_length]` | default |
| shared | `[0, vector_length]`; its vectors have a file of their own | `bank` |
| own, gated | `[1, num_vectors, vector_length]`, with a `vblora_gate [1]` a layer | `output_gate` |

The shapes of the last two make other readers refuse the file; they know neither shared banks nor
gates and would compute something else.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ...base.errors import CheckpointError
from ...checkpoint.format import CheckpointFormat, ModuleShape, Shapes
from .bank import Selection, compress, expand, select_topk, selected_logits
from .config import VBLoRAConfig

BANK, GATE = "vblora_vector_bank", "vblora_gate"
LOGITS = ("vblora_logits_A", "vblora_logits_B")
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"
# Integers that torch stores and does not compute with.
_WITHOUT_KERNELS = (torch.uint16, torch.uint32, torch.uint64)


class StorageFormat(enum.Enum):
    """Storage format of an adapter in the model, see the table above."""

    LOGITS = "logits"
    TOPK_LOGITS = "topk_logits"
    TOPK_WEIGHTS = "topk_weights"


class VBLoRAFormat(CheckpointFormat[VBLoRAConfig]):
    """Conversion of VB-LoRA's tensors between the storage formats of model and checkpoint."""

    parts: ClassVar[Mapping[str, Mapping[str, torch.dtype]]] = {
        name: {name + INDICES: torch.int64, name + WEIGHTS: torch.float32} for name in LOGITS
    }
    masked: ClassVar[tuple[str, ...]] = LOGITS

    def module_shape(self, shapes: Shapes) -> ModuleShape | None:
        """Return the size from the logits, full or compact, and the bank's vectors."""
        A, B = (
            shapes.get(name) or shapes.get(name + INDICES) or shapes.get(name + WEIGHTS)
            for name in LOGITS
        )
        bank = shapes.get(BANK)
        if not (A and B and bank):
            return None
        return ModuleShape(B[0] * bank[-1], A[1] * bank[-1], A[0])

    def export_state(self, state: dict[str, Tensor], config: VBLoRAConfig) -> dict[str, Tensor]:
        """Convert the tensors of an adapter in a model, in any format, to those of a checkpoint."""
        result: dict[str, Tensor] = {}
        for key, tensor in state.items():
            name = key.rpartition(".")[2]
            if name == BANK and config.output_gate:
                result[key] = tensor.unsqueeze(0)
            elif name in LOGITS or name.endswith(WEIGHTS):
                result.update(_exported_factor(key.removesuffix(WEIGHTS), state, config))
            elif not name.endswith(INDICES):
                result[key] = tensor
        if config.shares_bank and state:
            root = "base_model." if any(key.startswith("base_model.") for key in state) else ""
            result[root + BANK] = torch.empty(0, config.vector_length)
        return result

    def import_state(
        self, state: dict[str, Tensor], config: VBLoRAConfig, names: Collection[str]
    ) -> dict[str, Tensor]:
        """Convert a checkpoint's tensors, in any format, to those of an adapter; check the bank."""
        storage_format = format_of(names)
        result: dict[str, Tensor] = {}
        for key, tensor in state.items():
            name = key.rpartition(".")[2]
            if name == BANK:
                bank = _imported_bank(key, tensor, config)
                result.update({} if bank is None else {key: bank})
            elif name in LOGITS:
                result.update(_imported_logits(key, tensor, config, storage_format))
            elif name.endswith(INDICES):
                tensor = tensor.long() if tensor.dtype in _WITHOUT_KERNELS else tensor
                selection = Selection(tensor, _checked_weights(key, tensor, state, config))
                key = key.removesuffix(INDICES)
                result.update(_imported_compact(key, selection, config, storage_format))
            elif not name.endswith(WEIGHTS):
                result[key] = tensor
        return result


def format_of(names: Collection[str]) -> StorageFormat:
    """Return the storage format of an adapter whose tensors in the model have these keys."""
    if any(LOGITS[0] + WEIGHTS in name for name in names):
        return StorageFormat.TOPK_WEIGHTS
    if any(LOGITS[0] + INDICES in name for name in names):
        return StorageFormat.TOPK_LOGITS
    return StorageFormat.LOGITS


def _exported_factor(
    key: str, state: Mapping[str, Tensor], config: VBLoRAConfig
) -> dict[str, Tensor]:
    """Return the file's tensors of one factor."""
    indices, weights = state.get(key + INDICES), state.get(key + WEIGHTS)
    if indices is None:
        if not config.save_only_topk_weights:
            return {key: state[key]}
        return _compact(key, *compress(state[key], config.topk, config.weights_dtype))
    if weights is None:
        order = state[key].argsort(dim=-1, descending=True)
        weights = state[key].gather(-1, order).softmax(-1, dtype=torch.float32)[..., :-1]
        indices = indices.gather(-1, order)
    if not config.save_only_topk_weights:
        return {key: expand(indices, weights, config.num_vectors)}
    return _compact(key, indices, weights.to(config.weights_dtype).contiguous())


def _imported_bank(key: str, bank: Tensor, config: VBLoRAConfig) -> Tensor | None:
    """Return an adapter's own bank, None if its bank is shared."""
    is_absent = bank.shape[0] == 0
    if config.shares_bank and not is_absent:
        raise CheckpointError(
            f"`{key}` has a bank, but the config names a shared one; nothing was loaded. Load it "
            "with the config that was saved with it, without `bank`."
        )
    if is_absent and not config.shares_bank:
        raise CheckpointError(
            f"`{key}` has no bank, but the config names none, by `bank` or `bank_sha256`; nothing "
            "was loaded. Say where its shared bank is: "
            "`config=VBLoRAConfig.from_pretrained(adapter, bank=folder)`."
        )
    if is_absent:
        return None
    return bank.squeeze(0) if config.output_gate and bank.dim() == 3 else bank


def _checked_weights(
    key: str, indices: Tensor, state: Mapping[str, Tensor], config: VBLoRAConfig
) -> Tensor:
    """Return the weights of a compact file's indices, after checking both."""
    name = key.removesuffix(INDICES) + WEIGHTS
    weights = state.get(name)
    if weights is None or (*weights.shape[:-1], weights.shape[-1] + 1) != tuple(indices.shape):
        raise CheckpointError(f"`{key}` has no `{name}` that goes with it; nothing was loaded.")
    if indices.is_floating_point():
        raise CheckpointError(f"`{key}` must hold integers; nothing was loaded.")
    if indices.numel() and not all(0 <= int(i) < config.num_vectors for i in indices.aminmax()):
        raise CheckpointError(
            f"`{key}` points beyond the bank's {config.num_vectors} vectors; nothing was loaded. "
            "Load it with the config that was saved with it."
        )
    return weights


def _imported_compact(
    key: str, selection: Selection, config: VBLoRAConfig, storage_format: StorageFormat
) -> dict[str, Tensor]:
    """Return the model's tensors of one factor in a compact file, whose weights lack the last."""
    indices, weights = selection
    if storage_format is StorageFormat.LOGITS:
        return {key: expand(indices, weights, config.num_vectors)}
    if storage_format is StorageFormat.TOPK_WEIGHTS:
        return _compact(key, indices, weights)
    return {key + INDICES: indices, key: selected_logits(weights)}


def _imported_logits(
    key: str, logits: Tensor, config: VBLoRAConfig, storage_format: StorageFormat
) -> dict[str, Tensor]:
    """Return the model's tensors of one factor in a full file."""
    if storage_format is StorageFormat.LOGITS:
        return {key: logits}
    if logits.dim() == 0 or logits.shape[-1] != config.num_vectors:
        raise CheckpointError(
            f"`{key}` has the shape {list(logits.shape)}, and the bank {config.num_vectors} "
            "vectors; nothing was loaded."
        )
    if storage_format is StorageFormat.TOPK_WEIGHTS:
        return _compact(key, *compress(logits, config.topk, config.weights_dtype))
    indices, selected = select_topk(logits, config.topk)
    return {key + INDICES: indices, key: selected}


def _compact(key: str, indices: Tensor, weights: Tensor) -> dict[str, Tensor]:
    return {key + INDICES: indices, key + WEIGHTS: weights}
