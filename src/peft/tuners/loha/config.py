# SPDX-License-Identifier: Apache-2.0
"""Configuration of LoHa."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...base.plain_values import JsonObject
from ...base.registry import PeftType
from ...base.validation import LayerIndices, TokenIndices
from ...config import LycorisConfig, at_least, boolean, number, probability


@dataclass
class LoHaConfig(LycorisConfig):
    """Configuration of LoHa, `ΔW = (alpha / r) · (w1_a·w1_b) ∘ (w2_a·w2_b)`: of rank up to `r²` for
    the parameters of rank `2r`.

    Args:
        r: Rank of both matrices.
        alpha: The delta is scaled by `alpha / r`.
        rank_dropout: Probability of dropping an output row of ΔW in training; the others are
            divided by the share that is kept.
        module_dropout: Probability of leaving the adapter out of a training forward.
        use_effective_conv2d: Decompose kernels larger than one by Tucker's form (FedPara,
            proposition 3).
        target_modules: Names (or ends of paths), a regular expression for whole paths,
            "all-linear", or None for the model type's defaults.
        exclude_modules: Names or a regular expression; takes precedence over `target_modules`.
        init_weights: True: `w2_b` starts at zero, so that the adapter has no effect. False: nothing
            does.
        layers_to_transform: Index or indices of the layers to adapt.
        layers_pattern: Name of the list those indices count in, such as "layers" or "h"; by default
            the outermost.
        modules_to_save: Modules to train in full and save with the adapter.
        target_parameters: Parameters to adapt, by the ends of their paths: matrices, and stacks
            `[experts, …]`, where each expert gets the tensors of a linear layer.
        trainable_token_indices: Tokens whose rows of the embedding are trained beside the adapter
            (and those of the output head, where it shares the weight); a dictionary names other
            modules: name → tokens.

    Raises:
        PeftValueError: A value is not allowed.

    Example:
        >>> LoHaConfig(r=8, alpha=16, target_modules=["q_proj", "v_proj"]).peft_type.value
        'LOHA'

    Source: arXiv:2108.06098, section 2.2; arXiv:2309.14859, section 3.1
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: list[str] | str | set[str] | None = None
    exclude_modules: list[str] | str | set[str] | None = None
    init_weights: bool = True
    layers_to_transform: LayerIndices | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: TokenIndices | None = None
    target_parameters: list[str] | None = None

    sizes: ClassVar[tuple[str, ...]] = ("r", "rank_pattern")
    absent_values: ClassVar[JsonObject] = {
        "trainable_token_indices": None,
        "target_parameters": None,
    }
    # The interface has no such field for LoHa: rows that are kept always make up for those that are
    # dropped.
    rank_dropout_scale: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LOHA
        super().__post_init__()

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        yield from at_least("r", self.r)
        yield from number("alpha", self.alpha)
        for name in ("rank_dropout", "module_dropout"):
            yield from probability(name, getattr(self, name))
        for name in ("use_effective_conv2d", "init_weights"):
            yield from boolean(name, getattr(self, name))
