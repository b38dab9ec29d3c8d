# SPDX-License-Identifier: Apache-2.0
"""Configuration of VB-LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...config import LayeredConfig, at_least, boolean, choice, is_int, number, probability
from ...utils.peft_types import PeftType


@dataclass
class VBLoRAConfig(LayeredConfig):
    """Configuration of VB-LoRA, `Δ(x) = x·Aᵀ·Bᵀ` with the tiles of `A [r, in]` and `B [out, r]` composed from a shared bank.

    Args:
        r: Rank.
        num_vectors: Vectors in the bank; more for larger models.
        vector_length: Length of each; must divide both sizes of every adapted layer.
        topk: Vectors composed into each tile, at most `num_vectors`; 2 is the paper's choice.
        target_modules: Names (or ends of paths), a regular expression for whole paths, "all-linear", or None for the model type's
            defaults.
        exclude_modules: Names or a regular expression; takes precedence over `target_modules`.
        save_only_topk_weights: Save indices and weights of the chosen vectors in place of all logits. Much smaller; what is loaded
            from it infers and merges, and can't be trained on.
        vblora_dropout: Dropout on the input, in training.
        fan_in_fan_out: Whether the adapted layers store their weight `[in, out]` (Conv1D). The layer itself decides; this only
            states what is expected.
        bias: Which biases are trained: "none", "all" of the model's, or "vblora_only", those of adapted layers.
        modules_to_save: Modules to train whole and save beside the adapter.  # type: ignore[misc]
        init_vector_bank_bound: The bank starts uniform between minus and plus this. Zero would leave nothing to learn from.
        init_logits_std: The logits start normal with this standard deviation.
        layers_to_transform: Index or indices of the layers to adapt.
        layers_pattern: Name of the list those indices count in, such as "layers" or "h"; by default the outermost.
        trainable_token_indices: Tokens whose rows of the embedding are trained beside the adapter (and those of the output head,
            where it shares the weight); a dictionary names other modules: name → tokens.

    Raises:
        PeftValueError: A value is not allowed.

    Example:
        >>> VBLoRAConfig(r=4, num_vectors=60, vector_length=256, topk=2, target_modules=["q_proj"]).bias
        'none'

    Source: arXiv:2405.15179, section 3
    """

    r: int = field(default=4, metadata={"help": "Rank."})
    num_vectors: int = field(default=256, metadata={"help": "Vectors in the bank."})
    vector_length: int = field(default=256, metadata={"help": "Length of each vector."})
    topk: int = field(default=2, metadata={"help": "Vectors composed into each tile."})
    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    save_only_topk_weights: bool = field(default=False, metadata={"help": "Save only the chosen vectors' indices and weights."})
    vblora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Whether weights are stored [in, out]."})
    bias: str = field(default="none", metadata={"help": "Which biases are trained."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train whole."})  # type: ignore[misc]
    init_vector_bank_bound: float = field(default=0.02, metadata={"help": "Bound of the bank's uniform start."})
    init_logits_std: float = field(default=0.1, metadata={"help": "Standard deviation of the logits' start."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(  # type: ignore[misc]
        default=None, metadata={"help": "Tokens whose embedding is trained."}
    )

    absent_values: ClassVar[dict[str, Any]] = {"trainable_token_indices": None}

    def __post_init__(self) -> None:
        self.peft_type = PeftType.VBLORA
        super().__post_init__()

    @property
    def trained_biases(self) -> str:  # noqa: D102
        return self.bias

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        for name in ("r", "num_vectors", "vector_length", "topk"):
            yield from at_least(name, getattr(self, name))
        if is_int(self.topk) and is_int(self.num_vectors) and self.topk > self.num_vectors >= 1:
            yield f"`topk`={self.topk} must not be larger than `num_vectors`={self.num_vectors}."
        yield from probability("vblora_dropout", self.vblora_dropout)
        for name in ("save_only_topk_weights", "fan_in_fan_out"):
            yield from boolean(name, getattr(self, name))
        yield from choice("bias", self.bias, ("none", "all", "vblora_only"))
        yield from number("init_vector_bank_bound", self.init_vector_bank_bound, positive=True)
        yield from number("init_logits_std", self.init_logits_std)
        if isinstance(self.init_logits_std, (int, float)) and self.init_logits_std < 0:
            yield f"`init_logits_std`={self.init_logits_std!r} must not be negative."
