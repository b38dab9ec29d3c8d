# SPDX-License-Identifier: Apache-2.0
"""Configuration of VB-LoRA."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...base.registry import PeftType
from ...config import LayeredConfig, at_least, boolean, choice, is_int, number, probability

if TYPE_CHECKING:
    from .methods import VBLoRAPeftModel


class Form(enum.Enum):
    """How the model holds what the positions of an adapter choose.

    `LOGITS` for all vectors, to be trained. `WEIGHTS`: indices and weights of the chosen ones, as a
    compact file has them, to be run. `CHOSEN`: indices, and logits for the chosen ones only, to
    train their weights.
    """

    LOGITS = "logits"
    WEIGHTS = "weights"
    CHOSEN = "chosen"


@dataclass
class VBLoRAConfig(LayeredConfig):
    """Configuration of VB-LoRA, `Δ(x) = x·Aᵀ·Bᵀ` with the tiles of `A [r, in]` and `B [out, r]`
    composed from a shared bank.

    Args:
        r: Rank.
        num_vectors: Vectors in the bank; more for larger models.
        vector_length: Length of each; must divide both sizes of every adapted layer, unless
            `pad_last_tile`.
        topk: Vectors composed into each tile, at most `num_vectors`; 2 is the paper's choice.
        target_modules: Names (or ends of paths), a regular expression for whole paths,
            "all-linear", or None for the model type's defaults.
        exclude_modules: Names or a regular expression; takes precedence over `target_modules`.
        save_only_topk_weights: Save indices and weights of the chosen vectors in place of all
            logits. Much smaller; what is loaded from it infers and merges, and can't be trained on,
            unless `train_topk_weights`.
        vblora_dropout: Dropout on the input, in training.
        fan_in_fan_out: Whether the adapted layers store their weight `[in, out]` (Conv1D). The
            layer itself decides; this only states what is expected.
        bias: Which biases are trained: "none", "all" of the model's, or "vblora_only", those of
            adapted layers.
        modules_to_save: Modules to train whole and save beside the adapter.
        init_vector_bank_bound: The bank starts uniform between minus and plus this. Zero would
            leave nothing to learn from.
        init_logits_std: The logits start normal with this standard deviation.
        layers_to_transform: Index or indices of the layers to adapt.
        layers_pattern: Name of the list those indices count in, such as "layers" or "h"; by default
            the outermost.
        trainable_token_indices: Tokens whose rows of the embedding are trained beside the adapter
            (and those of the output head, where it shares the weight); a dictionary names other
            modules: name → tokens.
        bank: Use the bank of this folder (or Hub id), which `VectorBank.save_pretrained` wrote. It
            is frozen and shared with other adapters that use it, and not saved with them.
            `num_vectors` and `vector_length` are the bank's. When the adapter is loaded, a relative
            path is looked up from its folder (or in its repository), then from the working
            directory, then from the folders above the adapter's.
        bank_sha256: The digest of that bank, filled in when the adapter is made: an adapter is
            loaded with this bank, or one that grew from it, or not at all.
        train_topk_weights: Let what is loaded from a compact file as trainable be trained: it keeps
            the vectors that each tile has chosen and trains their weights.
        topk_weights_dtype: Of the weights in a compact file: "float32", which all readers want,
            "float16" or "bfloat16".
        pad_last_tile: Where `vector_length` does not divide a size, compose one tile more and cut
            it to size.
        output_gate: Multiply each layer's part of the output by a number that is learned and starts
            at zero, so that a new adapter changes nothing.

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
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone."}
    )
    save_only_topk_weights: bool = field(
        default=False, metadata={"help": "Save only the chosen vectors' indices and weights."}
    )
    vblora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input."})
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Whether weights are stored [in, out]."}
    )
    bias: str = field(default="none", metadata={"help": "Which biases are trained."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train whole."}
    )
    init_vector_bank_bound: float = field(
        default=0.02, metadata={"help": "Bound of the bank's uniform start."}
    )
    init_logits_std: float = field(
        default=0.1, metadata={"help": "Standard deviation of the logits' start."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embedding is trained."}
    )
    bank: str | None = field(
        default=None, metadata={"help": "Where the shared bank is.", "besides": True}
    )
    bank_sha256: str | None = field(default=None, metadata={"help": "The shared bank's digest."})
    train_topk_weights: bool = field(
        default=False, metadata={"help": "Train on from a compact file.", "besides": True}
    )
    topk_weights_dtype: str = field(
        default="float32", metadata={"help": "Dtype of a compact file's weights.", "besides": True}
    )
    pad_last_tile: bool = field(
        default=False, metadata={"help": "Cut a last tile to size where lengths do not divide."}
    )
    output_gate: bool = field(
        default=False, metadata={"help": "Learn a factor on the output that starts at zero."}
    )

    absent_values: ClassVar[dict[str, Any]] = {
        "trainable_token_indices": None,
        "bank": None,
        "bank_sha256": None,
        "train_topk_weights": False,
        "topk_weights_dtype": "float32",
        "pad_last_tile": False,
        "output_gate": False,
    }

    if TYPE_CHECKING:

        def adapts_as(self) -> VBLoRAPeftModel:
            """Tell type checkers the class that `get_peft_model` returns."""
            raise NotImplementedError

    def __post_init__(self) -> None:
        self.peft_type = PeftType.VBLORA
        super().__post_init__()

    @property
    def trained_biases(self) -> str:  # noqa: D102
        return self.bias

    @property
    def form(self) -> Form:
        """The form in which the model holds the adapter; it is no field, as it says nothing of what
        the adapter is.
        """
        return vars(self).get("_form", Form.LOGITS)

    @form.setter
    def form(self, form: Form) -> None:
        vars(self)["_form"] = form

    def for_copy(self, reference: bool = False) -> Any:
        """Return the config of a copy, which the model holds in the same form."""
        result = super().for_copy(reference)
        result.form = self.form
        return result

    @property
    def shares_bank(self) -> bool:
        """Whether the adapter's bank is one that others use too."""
        return self.bank is not None or self.bank_sha256 is not None

    @property
    def weights_dtype(self) -> torch.dtype:
        """`topk_weights_dtype` as torch has it."""
        return getattr(torch, self.topk_weights_dtype)

    def tiles(self, features: int) -> int:
        """How many tiles make up a size."""
        return -(-features // self.vector_length)

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        for name in ("r", "num_vectors", "vector_length", "topk"):
            yield from at_least(name, getattr(self, name))
        if is_int(self.topk) and is_int(self.num_vectors) and self.topk > self.num_vectors >= 1:
            yield f"`topk`={self.topk} must not be larger than `num_vectors`={self.num_vectors}."
        yield from probability("vblora_dropout", self.vblora_dropout)
        for name in (
            "save_only_topk_weights",
            "fan_in_fan_out",
            "train_topk_weights",
            "pad_last_tile",
            "output_gate",
        ):
            yield from boolean(name, getattr(self, name))
        yield from choice(
            "topk_weights_dtype", self.topk_weights_dtype, ("float32", "float16", "bfloat16")
        )
        for name in ("bank", "bank_sha256"):
            if not isinstance(getattr(self, name), (str, type(None))):
                yield f"`{name}`={getattr(self, name)!r} must be a string or None."
        yield from choice("bias", self.bias, ("none", "all", "vblora_only"))
        yield from number("init_vector_bank_bound", self.init_vector_bank_bound, positive=True)
        yield from number("init_logits_std", self.init_logits_std)
        if isinstance(self.init_logits_std, (int, float)) and self.init_logits_std < 0:
            yield f"`init_logits_std`={self.init_logits_std!r} must not be negative."
