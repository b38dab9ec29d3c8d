# SPDX-License-Identifier: Apache-2.0
"""Configuration of VB-LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...base.registry import PeftType
from ...base.validation import LayerIndices, TokenIndices, text
from ...config import TargetedConfig, at_least, boolean, choice, number, probability

_SWITCHES = (
    "save_only_topk_weights", "fan_in_fan_out", "train_topk_weights", "pad_last_tile",
    "output_gate",
)  # fmt: skip


@dataclass
class VBLoRAConfig(TargetedConfig):
    """Configuration of VB-LoRA, `Δ(x) = x·Aᵀ·Bᵀ`, where each tile of `A [r, in]` and `B [out, r]`
    is a weighted sum of `topk` vectors of a shared bank.

    Args:
        r: Rank.
        num_vectors: Number of vectors in the bank; more for larger models.
        vector_length: Length of each vector. Must divide both sizes of every adapted layer, unless
            `pad_last_tile`.
        topk: Vectors summed into each tile, at most `num_vectors`; the paper recommends 2.
        target_modules: Names (or ends of paths), a regular expression for whole paths,
            "all-linear", or None for the model type's defaults.
        exclude_modules: Names or a regular expression; takes precedence over `target_modules`.
        save_only_topk_weights: Save indices and weights of the selected vectors in place of all
            logits. Such a compact file is much smaller; an adapter loaded from it infers and
            merges, and can't be trained further, unless `train_topk_weights`.
        vblora_dropout: Dropout on the input, in training.
        fan_in_fan_out: True where the adapted layers store their weight `[in, out]` (Conv1D). Each
            layer decides for itself; a value that differs from the layers gives a warning.
        bias: Biases to train: "none", "all" of the model, or "vblora_only", those of adapted
            layers.
        modules_to_save: Modules to train in full and save with the adapter.
        init_vector_bank_bound: The bank starts as `U(-bound, bound)`. Must be positive: a bank of
            zeros has no gradient.
        init_logits_std: The logits start as `N(0, std)`.
        layers_to_transform: Index or indices of the layers to adapt.
        layers_pattern: Name of the list that these indices count in, for example "layers" or "h";
            by default the outermost.
        target_parameters: Parameters to adapt, by the ends of their paths: matrices, and stacks
            `[experts, …]`, where each expert gets the tensors of a linear layer over the same bank.
        trainable_token_indices: Tokens whose embedding rows are trained with the adapter, also in
            an output head that shares the weight. A dictionary, name → tokens, names other modules.
        bank: Use the bank in this folder (or Hub id), written by `VectorBank.save_pretrained`. It
            is frozen, shared with other adapters, and not saved with them. Its sizes replace
            `num_vectors` and `vector_length`. When the adapter is loaded, a relative path is looked
            up from the adapter's folder (or repository), then from the working directory, then from
            the folders above the adapter's.
        bank_sha256: Digest of that bank, set when the adapter is made. The adapter loads only with
            this bank or with one that grew from it.
        train_topk_weights: Allow training after loading from a compact file: the selected vectors
            stay the same, their weights are trained.
        topk_weights_dtype: Dtype of the weights in a compact file: "float32", which all readers
            support, "float16" or "bfloat16".
        pad_last_tile: Where `vector_length` does not divide a size, compose one more tile and cut
            it to the size.
        output_gate: Multiply each layer's delta by a learned number that starts at zero, so a new
            adapter changes nothing.

    Raises:
        PeftValueError: A value is not allowed.

    Example:
        >>> config = VBLoRAConfig(r=4, num_vectors=60, vector_length=256, target_modules=["q_proj"])
        >>> config.topk, config.bias
        (2, 'none')

    Source: arXiv:2405.15179, section 3
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    target_modules: list[str] | str | set[str] | None = None
    exclude_modules: list[str] | str | set[str] | None = None
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    layers_to_transform: LayerIndices | None = None
    layers_pattern: list[str] | str | None = None
    trainable_token_indices: TokenIndices | None = None
    target_parameters: list[str] | None = None
    bank: str | None = None
    bank_sha256: str | None = None
    train_topk_weights: bool = False
    topk_weights_dtype: str = "float32"
    pad_last_tile: bool = False
    output_gate: bool = False

    no_effect: ClassVar[frozenset[str]] = TargetedConfig.no_effect | {
        "save_only_topk_weights", "vblora_dropout", "fan_in_fan_out", "bias", "bank",
        "init_vector_bank_bound", "init_logits_std", "train_topk_weights", "topk_weights_dtype",
    }  # fmt: skip
    sizes: ClassVar[tuple[str, ...]] = ("r",)
    absent_values: ClassVar[dict[str, object]] = {
        "trainable_token_indices": None,
        "target_parameters": None,
        "bank": None,
        "bank_sha256": None,
        "train_topk_weights": False,
        "topk_weights_dtype": "float32",
        "pad_last_tile": False,
        "output_gate": False,
    }

    def __post_init__(self) -> None:
        self.peft_type = PeftType.VBLORA
        super().__post_init__()

    @property
    def trained_biases(self) -> str:  # noqa: D102
        return self.bias

    @property
    def shares_bank(self) -> bool:
        """True if the adapter uses a bank that other adapters use too."""
        return self.bank is not None or self.bank_sha256 is not None

    @property
    def weights_dtype(self) -> torch.dtype:
        """`topk_weights_dtype` as a `torch.dtype`."""
        return getattr(torch, self.topk_weights_dtype)

    def tiles(self, features: int) -> int:
        """Return the number of tiles for a layer's input or output size."""
        return -(-features // self.vector_length)

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        for name in ("r", "num_vectors", "vector_length", "topk"):
            yield from at_least(name, getattr(self, name))
        yield from probability("vblora_dropout", self.vblora_dropout)
        for name in _SWITCHES:
            yield from boolean(name, getattr(self, name))
        dtypes = ("float32", "float16", "bfloat16")
        yield from choice("topk_weights_dtype", self.topk_weights_dtype, dtypes)
        for name in ("bank", "bank_sha256"):
            yield from text(name, getattr(self, name))
        yield from choice("bias", self.bias, ("none", "all", "vblora_only"))
        yield from number("init_vector_bank_bound", self.init_vector_bank_bound, positive=True)
        yield from number("init_logits_std", self.init_logits_std)
        if isinstance(self.init_logits_std, (int, float)) and self.init_logits_std < 0:
            yield f"`init_logits_std`={self.init_logits_std!r} must not be negative."

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if self.topk > self.num_vectors:
            yield f"`topk`={self.topk} must not be larger than `num_vectors`={self.num_vectors}."
