# SPDX-License-Identifier: Apache-2.0
"""`LoKrConfig`: configuration of LoKr, and the options that it gives each layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, NamedTuple

from ...base.geometry import Geometry
from ...base.plain_values import JsonObject, is_empty
from ...base.registry import PeftType
from ...base.validation import LayerIndices, TokenIndices
from ...config import (
    LycorisConfig,
    at_least,
    boolean,
    choice,
    is_int,
    number,
    pattern_dict,
    probability,
)
from ...core.targets import pattern_value
from .shapes import FACTOR_NAMES, Shapes, factor_shapes, shape_problems

_SWITCHES = (
    "use_effective_conv2d", "decompose_both", "rank_dropout_scale", "full_matrix",
    "unbalanced_factorization", "use_scalar", "use_rslora", "weight_decompose", "wd_on_output",
)  # fmt: skip


@dataclass
class LoKrConfig(LycorisConfig):
    """Configuration of LoKr, `ΔW = (alpha / r) · (W1 ⊗ W2)` with `W1 [a, b]`, `W2 [c, d, *kernel]`,
    `out = a·c`, `in = b·d`.

    Args:
        r: Rank of the low-rank factors. `W2` is low-rank if `r < max(c, d) / 2`.
        alpha: The delta is scaled by `alpha / r`.
        rank_dropout: Probability that an output row of ΔW is dropped in training.
        module_dropout: Probability that a training forward leaves the adapter out.
        use_effective_conv2d: Decompose kernels of more than one element by Tucker's form (FedPara,
            proposition 3).
        decompose_both: Decompose `W1` too, if `r < max(a, b) / 2`.
        decompose_factor: Wanted size of `a` and `b`; -1 for the pair nearest to the square root.
        rank_dropout_scale: Divide by the share of rows that rank dropout keeps.
        target_modules: Names (or ends of paths), a regular expression for whole paths,
            "all-linear", or None for the model type's defaults.
        exclude_modules: Names or a regular expression; takes precedence over `target_modules`.
        init_weights: True: `W1` (or `w1_a`) starts at zero. "lycoris": `W2` (or `w2_b`) does.
            False: all factors are random.
        layers_to_transform: Index or indices of the layers to adapt; needs `layers_pattern`.
        layers_pattern: Name of the list that the indices count in ("layers", "h").
        modules_to_save: Modules to train in full and save with the adapter.
        kronecker_layout: "channels": `W1 ⊗ W2` over channels in every layer. "flat": for the full
            three-dimensional `W2` of an `nn.Conv1d`, the order of elements that Hugging Face PEFT
            uses. None means "flat" with `peft_version`, as in files without this field, else
            "channels".
        target_parameters: Parameters to adapt, by the ends of their paths: matrices, and stacks
            `[experts, …]`, where each expert gets the tensors of a linear layer.
        trainable_token_indices: Tokens whose rows of the embedding are trained with the adapter
            (and rows of the output head, if it shares the weight). A dictionary names other
            modules: name → tokens.
        full_matrix: Keep `W1` and `W2` full in every layer. The delta is then not scaled.
        unbalanced_factorization: Give `W1` the larger factor of `out`, in place of the smaller.
        use_scalar: Multiply the delta by a trained number, which starts at zero in place of a
            factor.
        use_rslora: Scale by `alpha / √r`.
        weight_decompose: Train the norms of the weight's rows apart from their direction (DoRA).
        wd_on_output: True: the norms belong to rows. False: to columns, and the base layer runs
            once more in each forward.
        conv_r, conv_alpha, conv_factor: `r`, `alpha` and `decompose_factor` of convolutions with
            kernels of more than one element; None for the values of other layers.
        factor_pattern: `decompose_factor` for modules by name or regular expression, as in
            `rank_pattern`; a pair `[a, b]` is the size of `W1`.
        tensor_shapes: Shapes of all tensors, `{"w1": [a, b], "w2_a": [c, r], …}`, for modules by
            name or regular expression. Adapters from files have them if their shapes follow no
            rule.
        row_offsets: First row of the product that is the layer's, for modules by name or regular
            expression. Adapters from files have them if the product is that of a fused layer.

    Raises:
        PeftValueError: A value is not allowed.

    Example:
        >>> LoKrConfig(r=8, alpha=16, target_modules=["q_proj", "v_proj"]).peft_type.value
        'LOKR'

    Source: arXiv:2309.14859, section 3.2; `use_effective_conv2d`: arXiv:2108.06098, proposition 3;
    `use_rslora`: arXiv:2312.03732; `weight_decompose`: arXiv:2402.09353
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    target_modules: list[str] | str | set[str] | None = None
    exclude_modules: list[str] | str | set[str] | None = None
    init_weights: Literal[True, False, "lycoris"] = True
    layers_to_transform: LayerIndices | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    kronecker_layout: Literal["channels", "flat"] | None = None
    trainable_token_indices: TokenIndices | None = None
    target_parameters: list[str] | None = None
    full_matrix: bool = False
    unbalanced_factorization: bool = False
    use_scalar: bool = False
    use_rslora: bool = False
    weight_decompose: bool = False
    wd_on_output: bool = True
    conv_r: int | None = None
    conv_alpha: float | None = None
    conv_factor: int | None = None
    factor_pattern: dict[str, int | list[int]] = field(default_factory=dict)
    tensor_shapes: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    row_offsets: dict[str, int] = field(default_factory=dict)

    largest_rank: ClassVar[int | None] = None  # such factors are full
    patterns: ClassVar[tuple[str, ...]] = (
        *LycorisConfig.patterns, "factor_pattern", "tensor_shapes", "row_offsets",
    )  # fmt: skip
    absent_values: ClassVar[JsonObject] = {
        "kronecker_layout": "flat",
        "trainable_token_indices": None,
        "target_parameters": None,
        "full_matrix": False,
        "unbalanced_factorization": False,
        "use_scalar": False,
        "use_rslora": False,
        "weight_decompose": False,
        "wd_on_output": True,
        "conv_r": None,
        "conv_alpha": None,
        "conv_factor": None,
        "factor_pattern": {},
        "tensor_shapes": {},
        "row_offsets": {},
    }

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LOKR
        if self.kronecker_layout is None:
            self.kronecker_layout = "channels" if self.peft_version is None else "flat"
        super().__post_init__()

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        yield from at_least("r", self.r, most=self.largest_rank)
        yield from number("alpha", self.alpha)
        yield from probability("rank_dropout", self.rank_dropout)
        yield from probability("module_dropout", self.module_dropout)
        for name in _SWITCHES:
            yield from boolean(name, getattr(self, name))
        yield from _factor("decompose_factor", self.decompose_factor)
        yield from () if self.conv_r is None else at_least("conv_r", self.conv_r)
        yield from () if self.conv_alpha is None else number("conv_alpha", self.conv_alpha)
        yield from () if self.conv_factor is None else _factor("conv_factor", self.conv_factor)
        yield from pattern_dict("factor_pattern", self.factor_pattern, _factor_or_pair)
        yield from pattern_dict("tensor_shapes", self.tensor_shapes, _shapes)
        yield from pattern_dict("row_offsets", self.row_offsets, partial(at_least, least=0))
        yield from choice("init_weights", self.init_weights, (True, False, "lycoris"))
        yield from choice("kronecker_layout", self.kronecker_layout, ("channels", "flat"))

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if self.full_matrix and (self.decompose_both or self.use_effective_conv2d):
            yield (
                "`full_matrix` leaves nothing to decompose; it can't go with `decompose_both` or "
                "`use_effective_conv2d`."
            )
        if not is_empty(self.layers_to_transform) and is_empty(self.layers_pattern):
            yield (
                "When `layers_to_transform` is specified, `layers_pattern` must also be specified, "
                "such as 'layers' or 'h'."
            )

    @classmethod
    def _upgrade(cls, content: JsonObject) -> JsonObject:
        """Return a file's fields. Other writers allow `layers_to_transform` alone, for any list."""
        is_alone = is_empty(content.get("layers_pattern"))
        if is_alone and not is_empty(content.get("layers_to_transform")):
            return {**content, "layers_pattern": r"[^.]+"}
        return content


class LayerOptions(NamedTuple):
    """Options of one LoKr layer.

    Attributes:
        factor: `decompose_factor`, or the size `(a, b)` of `W1`.
        shapes: Shapes of all factors, None if they follow from the other options.
        row_offset: First row of the product that is the layer's, None if all rows are.
    """

    r: int
    alpha: float
    factor: int | Sequence[int]
    shapes: Shapes | None
    row_offset: int | None

    def problems(self, size: Geometry) -> Iterator[str]:
        """Yield a sentence for each option that does not fit a layer of a size."""
        rows, columns, kernel = size.out_features, size.in_features, size.kernel_size
        if self.shapes is not None:
            problem = shape_problems(self.shapes, rows, columns, kernel, self.row_offset)
            if problem:
                yield f"`tensor_shapes`: {problem}."
        elif not isinstance(self.factor, int):
            a, b = self.factor
            if rows % a or columns % b:
                yield f"`factor_pattern`={[a, b]} does not divide its sizes, {rows} and {columns}."
        if self.row_offset is not None and (self.shapes is None or size.groups > 1):
            yield "`row_offsets` needs `tensor_shapes`, and a layer without groups."


def layer_options(config: LoKrConfig, path: str, size: Geometry | None) -> LayerOptions:
    """Return the options of a layer: from the config's patterns, else from its fields for
    convolutions with a kernel, else from its fields for all layers.

    Example:
        >>> config = LoKrConfig(r=8, conv_r=4, rank_pattern={"mid.conv": 2})
        >>> conv = Geometry(64, 64, (3, 3))
        >>> [layer_options(config, path, conv).r for path in ("up.conv", "mid.conv")]
        [4, 2]
    """
    r, alpha, factor = config.r, config.alpha, config.decompose_factor
    if size is not None and math.prod(size.kernel_size) > 1:
        r = config.conv_r or r
        alpha = alpha if config.conv_alpha is None else config.conv_alpha
        factor = factor if config.conv_factor is None else config.conv_factor
    shapes: Mapping[str, Sequence[int]] | None = pattern_value(config.tensor_shapes, path, None)
    return LayerOptions(
        r=pattern_value(config.rank_pattern, path, r),
        alpha=pattern_value(config.alpha_pattern, path, alpha),
        factor=pattern_value(config.factor_pattern, path, factor),
        shapes=None if shapes is None else {name: tuple(shapes[name]) for name in shapes},
        row_offset=pattern_value(config.row_offsets, path, None),
    )


def shapes_by_rule(
    config: LoKrConfig, size: Geometry, r: int, factor: int | Sequence[int] | None = None
) -> Shapes:
    """Return the shapes of a layer's factors by the config's rules, without its `tensor_shapes`."""
    return factor_shapes(
        size.out_features,
        size.in_features,
        size.kernel_size,
        r=r,
        decompose_both=config.decompose_both,
        decompose_factor=config.decompose_factor if factor is None else factor,
        use_effective_conv2d=config.use_effective_conv2d,
        full_matrix=config.full_matrix,
        unbalanced_factorization=config.unbalanced_factorization,
    )


def _are_sizes(value: object) -> bool:
    """Return True for a list of positive integers."""
    return isinstance(value, (list, tuple)) and all(is_int(size) and size >= 1 for size in value)


def _factor(name: str, value: object) -> Iterator[str]:
    if not is_int(value) or (value != -1 and value < 1):
        yield f"`{name}`={value!r} must be -1 or a positive integer."


def _factor_or_pair(name: str, value: object) -> Iterator[str]:
    if not isinstance(value, (list, tuple)):
        yield from _factor(name, value)
    elif len(value) != 2 or not _are_sizes(value):
        yield (
            f"`{name}`={value!r} must be a factor or a pair of positive integers, the size of `W1`."
        )


def _shapes(name: str, value: object) -> Iterator[str]:
    if (
        not isinstance(value, dict)
        or not set(value) <= set(FACTOR_NAMES)
        or not all(map(_are_sizes, value.values()))
    ):
        yield (
            f"`{name}`={value!r} must be a dictionary of shapes, with keys among "
            f"{', '.join(FACTOR_NAMES)}."
        )
