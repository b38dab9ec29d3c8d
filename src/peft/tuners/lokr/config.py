# SPDX-License-Identifier: Apache-2.0
"""Configuration of LoKr."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ...config import at_least, boolean, choice, is_int, number, probability
from ...utils.peft_types import PeftType
from ..lycoris_utils import LycorisConfig


@dataclass
class LoKrConfig(LycorisConfig):
    """Configuration of LoKr, `ΔW = (alpha / r) · (W1 ⊗ W2)` with `W1 [a, b]`, `W2 [c, d, *kernel]`, `out = a·c`, `in = b·d`.

    Args:
        r: Rank of the factors that are decomposed. `W2` is decomposed where `r < max(c, d) / 2`.
        alpha: The delta is scaled by `alpha / r`.
        rank_dropout: Probability of dropping an output row of ΔW in training.
        module_dropout: Probability of leaving the adapter out of a training forward.
        use_effective_conv2d: Decompose kernels larger than one by Tucker's form (FedPara, proposition 3).
        decompose_both: Decompose `W1` too, where `r < max(a, b) / 2`.
        decompose_factor: Wanted size of `a` and `b`; -1 for the pair nearest to the square root.
        rank_dropout_scale: Divide by the share of rows kept by rank dropout.
        target_modules: Names (or ends of paths), a regular expression for whole paths, "all-linear", or None for the model type's
            defaults.
        exclude_modules: Names or a regular expression; takes precedence over `target_modules`.
        init_weights: True: `W1` (or `w1_a`) starts at zero. "lycoris": `W2` (or `w2_b`) does. False: nothing does.
        layers_to_transform: Index or indices of the layers to adapt; needs `layers_pattern`.
        layers_pattern: Name of the list those indices count in, such as "layers" or "h".
        modules_to_save: Modules to train whole and save beside the adapter.  # type: ignore[misc]
        kronecker_layout: "channels": `W1 ⊗ W2` over channels for every layer. "flat": for the full three-dimensional `W2` of an
            `nn.Conv1d`, the order of elements that Hugging Face PEFT uses. None is "flat" if `peft_version` is given, as for the
            fields of a file that lacks this one, else "channels".
        trainable_token_indices: Tokens whose rows of the embedding are trained beside the adapter (and those of the output head,
            where it shares the weight); a dictionary names other modules: name → tokens.

    Raises:
        PeftValueError: A value is not allowed.

    Example:
        >>> LoKrConfig(r=8, alpha=16, target_modules=["q_proj", "v_proj"]).peft_type.value
        'LOKR'

    Source: arXiv:2309.14859, section 3.2; `use_effective_conv2d`: arXiv:2108.06098, proposition 3
    """

    r: int = field(default=8, metadata={"help": "Rank of the decomposed factors."})
    alpha: float = field(default=8, metadata={"help": "The delta is scaled by alpha / r."})
    rank_dropout: float = field(default=0.0, metadata={"help": "Probability of dropping an output row of the delta."})
    module_dropout: float = field(default=0.0, metadata={"help": "Probability of leaving the adapter out of a forward."})
    use_effective_conv2d: bool = field(default=False, metadata={"help": "Tucker form for kernels larger than one."})
    decompose_both: bool = field(default=False, metadata={"help": "Decompose W1 too."})
    decompose_factor: int = field(default=-1, metadata={"help": "Wanted size of W1; -1 for the square root."})
    rank_dropout_scale: bool = field(default=False, metadata={"help": "Divide by the share rank dropout keeps."})
    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    init_weights: bool | Literal["lycoris"] = field(default=True, metadata={"help": "How the factors start."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train whole."})  # type: ignore[misc]
    kronecker_layout: Literal["channels", "flat"] | None = field(default=None, metadata={"help": "Order of elements."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(  # type: ignore[misc]
        default=None, metadata={"help": "Tokens whose embedding is trained."}
    )

    absent_values: ClassVar[dict[str, Any]] = {"kronecker_layout": "flat", "trainable_token_indices": None}

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LOKR
        if self.kronecker_layout is None:
            self.kronecker_layout = "channels" if self.peft_version is None else "flat"
        super().__post_init__()

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        yield from at_least("r", self.r)
        yield from number("alpha", self.alpha)
        for name in ("rank_dropout", "module_dropout"):
            yield from probability(name, getattr(self, name))
        for name in ("use_effective_conv2d", "decompose_both", "rank_dropout_scale"):
            yield from boolean(name, getattr(self, name))
        if not is_int(self.decompose_factor) or not (self.decompose_factor == -1 or self.decompose_factor >= 1):
            yield f"`decompose_factor`={self.decompose_factor!r} must be -1 or a positive integer."
        yield from choice("init_weights", self.init_weights, (True, False, "lycoris"))
        yield from choice("kronecker_layout", self.kronecker_layout, ("channels", "flat"))
        if self.layers_to_transform is not None and not self.layers_pattern:
            yield "When `layers_to_transform` is specified, `layers_pattern` must also be specified, such as 'layers' or 'h'."

    @classmethod
    def _upgrade(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Other writers allow `layers_to_transform` alone, which counts in whatever list there is."""
        if content.get("layers_to_transform") is not None and not content.get("layers_pattern"):
            return {**content, "layers_pattern": r"[^.]+"}
        return content
