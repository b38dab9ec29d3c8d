# SPDX-License-Identifier: Apache-2.0
"""The dimension of a layer's input along which the samples lie, by the layer's place in its model.

Most inputs are `[samples, …]`. The others: layers that take the sequence first, layers that see a
sample in windows, and experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

from torch import nn

# Classes of modules that take `[sequence, batch, …]`, by full name, with the paths of the layers in
# them that do.
_SEQUENCE_FIRST = (
    (r"transformers\.models\.xlnet\..*\.XLNetLayer", r".*"),
    (r"transformers\.models\.xlnet\..*\.XLNetModel", r"word_embedding"),
    (
        r"transformers\.models\.(longformer|led)\..*\.\w+SelfAttention",
        r"(query|key|value)(_global)?",
    ),
    (r"transformers\.models\.bridgetower\..*\.BridgeTowerResidualAttention", r"mlp\..*"),
    (r"transformers\.models\.mask2former\..*\.Mask2FormerMaskedAttentionDecoderLayer", r"fc[12]"),
    (r"transformers\.models\.oneformer\..*\.OneFormerTransformerDecoderFFNLayer", r"linear[12]"),
    (r"transformers\.models\.oneformer\..*\.\w+QueryTransformerDecoderLayer", r"linear[12]"),
    (r"transformers\.models\.oneformer\..*\.OneFormerTextTransformerLayer", r"mlp\..*"),
    (r"transformers\.models\.fsmt\..*\.(En|De)coderLayer", r".*"),
    (r"transformers\.models\.bros\..*\.BrosRelationExtractor", r".*"),
    (
        r"transformers\.models\.bros\..*\.BrosSpadeEEForTokenClassification",
        r"initial_token_classifier\..*",
    ),
)
# Modules that split a sample into several consecutive rows (windows, frames, channels).
_GROUPED = re.compile(
    r"(diffusers|timm|torchvision)\.models\..*"
    r"|transformers\.models\.(swin|swinv2|swin2sr|timesformer|vitdet|mobilevit|mobilevitv2)\..*"
    r"|transformers\.models\.(patchtst|patchtsmixer|lw_detr)\..*"
    r"|transformers\.models\.(donut|maskformer|clap|rf_detr)\..*"
    r"\.\w*(Swin|ClapAudio|RfDetrDinov2)\w*"
    r"|transformers\.models\.(sam|sam_hq|sam2|sam3|got_ocr2|deepseek_ocr2|slanext|pp_formulanet"
    r"|edgetam)\..*\.\w*(Vision|ViT|Hiera)\w*"
    r"|transformers\.models\.granite_speech\w*\..*\.\w+(Projector|Conformer)\w*"
)
# Projections in a decoder that read the encoder's output.
_CROSS_ATTENTION = re.compile(
    r".*(EncDecAttention|encoder_attn|cross_?attn|crossattention)\b.*"
    r"\.(k|v|k_proj|v_proj|key|value)"
)


@dataclass(frozen=True)
class RowLayout:
    """The arrangement of samples in a layer's input.

    Attributes:
        features: Number of trailing dimensions of the input that are not rows: 1 for a linear
            layer, 0 for an embedding.
        sequence_first: The input is `[sequence, batch, …]`.
        is_declared: A module around the layer has `batch_first=False`, which need not hold for all
            layers in it.
        is_grouped: All rows of a sample are consecutive, however many there are.
        expert: Name of the expert that the layer belongs to, in a mixture of experts.
        stream: The tokens that the layer sees: "decoder" for those of a decoder beside an encoder,
            else "main".
        samples_first: An input with as many rows as samples has one row for each sample.
    """

    features: int = 1
    sequence_first: bool = False
    is_declared: bool = False
    is_grouped: bool = False
    expert: str | None = None
    stream: str = "main"

    samples_first: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Computed once, and not by `cached_property`, whose lock the compiler cannot trace.
        is_first = not (self.sequence_first or self.is_declared or self.expert)
        object.__setattr__(self, "samples_first", is_first)


SAMPLES_FIRST = RowLayout()
_KNOWN: dict[RowLayout, RowLayout] = {SAMPLES_FIRST: SAMPLES_FIRST}


def row_layout(root: nn.Module, path: str, features: int = 1) -> RowLayout:
    """Return the layout of the layer at a path of a model; equal layouts are the same object."""
    layout = RowLayout(features, stream=_stream(root, path))
    for module, name, inner in _ancestors(root, path):
        kind: type = type(module)
        if isinstance(vars(module).get("batch_first"), bool):
            layout = replace(layout, is_declared=not module.batch_first)
        if is_sequence_first(module):
            layout = replace(layout, sequence_first=True)
        for layers in _sequence_first_layers(kind):
            if layers.fullmatch(inner):
                layout = replace(layout, sequence_first=True)
        if _is_grouped(kind):
            layout = replace(layout, is_grouped=True)
        if (
            isinstance(module, (nn.ModuleList, nn.ModuleDict))
            and "expert" in f"{name} {kind.__name__}".lower()
        ):
            layout = replace(layout, expert=inner.partition(".")[0])
    return _KNOWN.setdefault(layout, layout)


def is_sequence_first(module: nn.Module | None) -> bool:
    """Return True for transformers of `torch.nn` with inputs `[sequence, batch, …]`."""
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)) and len(module.layers):
        module = module.layers[0]
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return not module.self_attn.batch_first
    return isinstance(module, nn.Transformer) and not module.batch_first


def _stream(root: nn.Module, path: str) -> str:
    config = getattr(root, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or "decoder" not in path.split("."):
        return "main"
    return "main" if _CROSS_ATTENTION.fullmatch(path) else "decoder"


def _ancestors(root: nn.Module, path: str) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield module, its name and the layer's path in it, from the outermost module inwards."""
    module, name, inner = root, "", path
    while inner:
        yield module, name, inner
        name, _, inner = inner.partition(".")
        module = module.get_submodule(name)


def _full_names(kind: type) -> list[str]:
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in kind.__mro__]


@lru_cache(maxsize=4096)
def _sequence_first_layers(kind: type) -> tuple[re.Pattern[str], ...]:
    names = _full_names(kind)
    return tuple(
        re.compile(layers)
        for pattern, layers in _SEQUENCE_FIRST
        if any(re.fullmatch(pattern, name) for name in names)
    )


@lru_cache(maxsize=4096)
def _is_grouped(kind: type) -> bool:
    return any(_GROUPED.fullmatch(name) for name in _full_names(kind))
