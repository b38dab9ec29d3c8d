# SPDX-License-Identifier: Apache-2.0
"""The tokens that route a sample, for adapters that route by input: those of its prompt.

The attention mask tells the real tokens. The labels of a causal model tell the beginning of its
answer. Inside `generate` the prompt is the input of that call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base.calls.rows import IN_ORDER, CallRows, LayerWithLayout, RowOwners
from ...base.errors import PeftNotSupportedError, PeftTypeError, PeftValueError
from ...base.tracing import is_one_of, shapes
from .pooling import pool, prompt_mask

# Largest value of an additive attention mask at a masked token.
_MASKED = -1000.0
# End of the name of a stream's mask of all real tokens, those of the answer too.
ANSWERED = "+answer"


@dataclass
class PromptTokens:
    """The prompt tokens of a call.

    Args:
        is_causal: The model continues its input, so its labels mark the answer in the input.
        is_encoder_decoder: The model has a decoder beside its encoder.
        masks: `[rows, tokens]`, true at prompt tokens, for the streams "main" and "decoder"; a
            stream without a mask has prompt tokens only. "main+answer" and "decoder+answer" are
            true at all real tokens.
        is_given: The caller passed `routing_mask`.
        length: Number of tokens passed to `generate`; None outside it.
    """

    is_causal: bool = False
    is_encoder_decoder: bool = False
    masks: dict[str, Tensor] = field(default_factory=dict)
    is_given: bool = False
    length: int | None = None

    def copy(self) -> PromptTokens:
        """Return a copy whose masks can be replaced."""
        return replace(self, masks=dict(self.masks))

    def update(self, arguments: Mapping[str, object], rows: CallRows, is_nested: bool) -> None:
        """Read the masks from a forward's arguments; `is_nested` if it lies in another call."""
        _refuse_packed(arguments, rows)
        labels, attention = arguments.get("labels"), arguments.get("attention_mask")
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            labels = None  # labels of classes, not of tokens
        given = arguments.get("routing_mask")
        if given is not None:
            chosen, self.is_given = _given_mask(given), True
            self._set("main", chosen, chosen)
        elif is_nested and self.length is not None:
            self._update_step(attention, rows, self.length)
        elif not self.is_given and (not is_nested or attention is not None):
            mask = token_mask(attention, arguments)
            cut = labels if self.is_causal else None
            self._set("main", mask if cut is None else prompt_mask(mask, cut), mask)
        if self.is_encoder_decoder:
            self._update_decoder(arguments, labels)

    def _set(self, stream: str, prompt: Tensor | None, every: Tensor | None) -> None:
        """Replace a stream's masks: of its prompt, and of all of its real tokens."""
        for name, mask in ((stream, prompt), (stream + ANSWERED, every)):
            self.masks.pop(name, None)
            if mask is not None:
                self.masks[name] = mask

    def _update_decoder(self, arguments: Mapping[str, object], labels: Tensor | None) -> None:
        """Read the decoder's mask: tokens before the first label, by default the first token."""
        mask = token_mask(arguments.get("decoder_attention_mask"), {})
        for tokens in (labels, arguments.get("decoder_input_ids"), mask):
            if isinstance(tokens, Tensor):
                every = mask if labels is None else labels != -100
                labels = torch.zeros_like(tokens) if labels is None else labels
                self._set("decoder", prompt_mask(mask, labels), every)
                return

    def _update_step(self, attention: object, rows: CallRows, length: int) -> None:
        """Read the mask of a step of `generate`. In assisted generation, candidate tokens follow
        the prompt.
        """
        mask, tokens = self.masks.get("main"), rows.tokens("main")
        if not self.is_given and isinstance(attention, Tensor) and attention.dim() == 2:
            mask = attention.bool()
        elif mask is None:
            mask = token_mask(attention, {})
            if mask is not None and tokens is not None:
                mask = mask[:, :tokens]  # a static cache has a mask for all of its places
        if tokens is not None and tokens > length and rows.rows is not None:
            if mask is None:
                device = attention.device if isinstance(attention, Tensor) else None
                mask = torch.ones(rows.rows, tokens, dtype=torch.bool, device=device)
            guesses = tokens - length
            mask = F.pad(mask[:, : max(mask.shape[1] - guesses, length)], (0, guesses))
        if mask is not None:
            self._set("main", mask, mask)

    def pool(self, x: Tensor, stream: str, rows: CallRows, owners: RowOwners) -> Tensor:
        """Return the mean over the prompt tokens, `[samples, in]`, of a layer's input
        `[rows, *leading, in]` or `[tokens, rows, *leading, in]`.
        """
        if owners.sequence_first:
            x = x.transpose(0, 1)
        sizes = shapes(x)[0]
        if len(sizes) == 2 and rows.samples and sizes[0] != rows.samples:
            x = x.view(rows.samples, -1, sizes[1])  # the model flattened its tokens
        if x.dim() == 2:
            return x
        x = x.flatten(1, -2)
        return pool(x, self._mask_for(x, stream, rows))

    def _mask_for(self, x: Tensor, stream: str, rows: CallRows) -> Tensor | None:
        """Return the mask for an input `[rows, tokens, in]`, None if all of its tokens count."""
        mask, seen = self.masks.get(stream), x.shape[1]
        tokens = rows.tokens(stream.removesuffix(ANSWERED))
        if mask is None:
            return None
        length = mask.shape[1]
        if length != seen:
            if tokens == seen < length:
                mask = mask[:, -seen:]  # with a cache, a layer sees the last tokens only
            elif tokens is not None and rows.has_more_than_tokens():
                return None  # the layer sees other inputs, patches of an image for example
            else:
                mask = _resampled(mask, seen, rows) if tokens is None else None
        if mask is None:
            raise PeftValueError(
                f"The mask has {length} tokens where a layer sees {seen}; pass `routing_mask` of "
                "that length, or use `routing_level='token'`."
            )
        if mask.shape[0] != x.shape[0]:
            mask = mask.repeat_interleave(x.shape[0] // mask.shape[0], dim=0)
        return mask.to(x.device)


def token_mask(mask: object, arguments: Mapping[str, object]) -> Tensor | None:
    """Return an attention mask as `[rows, tokens]`, true at tokens that any token may attend to.

    Args:
        mask: One of

            - `[rows, tokens]`, or `[rows, choices, tokens]` if `input_ids` has that shape;
            - a mask of pairs `[rows, from, to]` or `[rows, heads, from, to]`: nonzero where
              attention is allowed, or floating-point numbers to add to the scores;
            - a mapping of such masks, each for some of the layers;
            - None.
    """
    if isinstance(mask, Mapping):
        masks = [token_mask(entry, arguments) for entry in mask.values()]
        known = [entry for entry in masks if entry is not None]
        return torch.stack(known).any(0) if len(known) == len(masks) and known else None
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4):
        form = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise PeftTypeError(
            f"An `attention_mask` {form} does not tell which tokens are real; pass them as "
            "`routing_mask`, or use `routing_level='token'`."
        )
    if mask.dim() == 2:
        return mask.bool()
    ids = arguments.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 3 and ids.shape == mask.shape:
        return mask.bool().flatten(0, 1)
    allowed = mask > _MASKED if mask.is_floating_point() else mask != 0
    return allowed.flatten(1, -2).any(1)


def _given_mask(mask: object) -> Tensor:
    """Return `routing_mask` as booleans, checked."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise PeftTypeError(
            "`routing_mask` must be a tensor [batch, tokens] that is nonzero where the prompt is."
        )
    return mask.bool()


def _resampled(mask: Tensor, tokens: int, rows: CallRows) -> Tensor | None:
    """Return a mask of audio samples as a mask of the `tokens` frames that the model computes from
    them; None if the model has no method for it.
    """
    name = "_get_feature_vector_attention_mask"  # of speech models in transformers
    modules = () if rows.root is None else rows.root.modules()
    convert: Callable[[int, Tensor], Tensor] | None
    convert = next((getattr(m, name) for m in modules if hasattr(m, name)), None)
    return None if convert is None else convert(tokens, mask.long()).bool()


def _refuse_packed(arguments: Mapping[str, object], rows: CallRows) -> None:
    """Raise if several samples are packed into one row."""
    ends = arguments.get("cu_seq_lens_q")
    if isinstance(ends, Tensor) and rows.rows is not None and ends.shape[0] > rows.rows + 1:
        raise PeftNotSupportedError(
            f"{ends.shape[0] - 1} texts are packed into {rows.rows} row(s), which routing by input "
            "would treat as one; pad them, or use `routing_level='token'`."
        )


def owners_by_input(
    x: Tensor, layer: LayerWithLayout, rows: CallRows, samples: int | None
) -> RowOwners:
    """Return the owners of the rows of a layer's input, where each row of the forward is routed."""
    owners = rows.owners(x, layer.layout)
    mixes = x.dim() == 2 or is_one_of(shapes(x)[0][1], (rows.samples, samples))
    if (owners is None and mixes and rows.samples != 1) or (
        owners is not None and owners.owner is not None
    ):
        raise rows.error(x, layer, "Use `routing_level='token'`")
    return IN_ORDER if owners is None else owners
