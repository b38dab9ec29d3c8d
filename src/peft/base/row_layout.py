# SPDX-License-Identifier: Apache-2.0
"""How the rows of a layer lie, as far as its place in a model tells.

Most layers see the samples of a call one after the other along their first dimension. This file
knows which do not: layers that take the sequence first, layers that see a sample in windows, the
experts of a mixture of experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import nn

# Modules that take `[sequence, batch, …]`, by the full name of their class, and which of the layers
# in them do.
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
# Modules that see a sample as several rows (windows, frames, channels), which follow one another.
_GROUPED = re.compile(
    r"(diffusers|timm|torchvision)\.models\..*"
    r"|transformers\.models\.(swin|swinv2|swin2sr|timesformer|vitdet|mobilevit|mobilevitv2|patchtst|patchtsmixer|lw_detr)\..*"
    r"|transformers\.models\.(donut|maskformer|clap|rf_detr)\..*\.\w*(Swin|ClapAudio|RfDetrDinov2)\w*"
    r"|transformers\.models\.(sam|sam_hq|sam2|sam3|got_ocr2|deepseek_ocr2|slanext|pp_formulanet|edgetam)\..*\.\w*(Vision|ViT|Hiera)\w*"
    r"|transformers\.models\.granite_speech\w*\..*\.\w+(Projector|Conformer)\w*"
)
# Projections in a decoder that read the encoder's output.
_CROSS_ATTENTION = re.compile(
    r".*(EncDecAttention|encoder_attn|cross_?attn|crossattention)\b.*\.(k|v|k_proj|v_proj|key|value)"
)


@dataclass(frozen=True)
class RowLayout:
    """How a layer's rows lie.

    Attributes:
        features: How many of its input's dimensions, the last ones, are not rows.
        sequence_first: Its input is `[sequence, batch, …]`.
        is_declared: A module that it lies in says so of itself, which need not hold for all layers
            in it.
        is_grouped: All rows of a sample follow one another, however many there are.
        expert: The name, among its like, of the expert that it belongs to.
        stream: Which of the model's tokens it sees, those of the encoder or single model ("main")
            or of the decoder.
    """

    features: int = 1
    sequence_first: bool = False
    is_declared: bool = False
    is_grouped: bool = False
    expert: str | None = None
    stream: str = "main"

    @property
    def samples_first(self) -> bool:
        """Whether as many rows as samples are one for each sample."""
        return not (self.sequence_first or self.is_declared or self.expert)


ORDINARY = RowLayout()
_KNOWN: dict[RowLayout, RowLayout] = {ORDINARY: ORDINARY}


def row_layout(root: nn.Module, path: str, features: int = 1) -> RowLayout:
    """What a layer's place in a model tells of its rows.

    Args:
        root: The model.
        path: The layer's path in it.
        features: How many dimensions of the layer's input are not rows: 1 for a linear layer, 0 for
            an embedding.
    """
    layout = RowLayout(features, stream=stream_of(root, path))
    for module, name, inner in _ancestors(root, path):
        kind: Any = type(module)
        if isinstance(vars(module).get("batch_first"), bool):
            layout = replace(layout, is_declared=not module.batch_first)
        if is_sequence_first(module):
            layout = replace(layout, sequence_first=True)
        for is_inside in _sequence_first(kind):
            if is_inside.fullmatch(inner):
                layout = replace(layout, sequence_first=True)
        if _is_grouped(kind):
            layout = replace(layout, is_grouped=True)
        if (
            isinstance(module, (nn.ModuleList, nn.ModuleDict))
            and "expert" in f"{name} {kind.__name__}".lower()
        ):
            layout = replace(layout, expert=inner.partition(".")[0])
    return _KNOWN.setdefault(layout, layout)  # so that layers alike have one and the same


def stream_of(root: nn.Module, path: str) -> str:
    """Which of a model's tokens the layer at a path sees."""
    if not getattr(
        getattr(root, "config", None), "is_encoder_decoder", False
    ) or "decoder" not in path.split("."):
        return "main"
    return "main" if _CROSS_ATTENTION.fullmatch(path) else "decoder"


def is_sequence_first(module: Any) -> bool:
    """Whether a module is one of torch's that take their inputs as `[sequence, batch, …]`."""
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)) and len(module.layers):
        module = module.layers[0]
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return not module.self_attn.batch_first
    return isinstance(module, nn.Transformer) and not module.batch_first


def _ancestors(root: nn.Module, path: str) -> Iterator[tuple[nn.Module, str, str]]:
    """The modules that a layer lies in from the outermost, each with its name and the layer's path
    in it.
    """
    module, name, inner = root, "", path
    while inner:
        yield module, name, inner
        name, _, inner = inner.partition(".")
        module = module._modules[name]  # type: ignore[assignment]


def _full_names(kind: type) -> list[str]:
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in kind.__mro__]


@lru_cache(maxsize=4096)
def _sequence_first(kind: Any) -> tuple[re.Pattern[str], ...]:
    names = _full_names(kind)
    return tuple(
        re.compile(inside)
        for pattern, inside in _SEQUENCE_FIRST
        if any(re.fullmatch(pattern, name) for name in names)
    )


@lru_cache(maxsize=4096)
def _is_grouped(kind: Any) -> bool:
    return any(_GROUPED.fullmatch(name) for name in _full_names(kind))
