# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a call decide, where the input routes.

The attention mask says which tokens are real, the labels of a causal model where its answer begins;
in `generate` the prompt decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base.calls.rows import CallRows
from ...base.errors import PeftNotSupportedError, PeftTypeError, PeftValueError
from .pooling import prompt_mask

# Additive masks hold this or less where a token may not be attended to.
_NEVER = -1000.0


@dataclass
class Deciding:
    """The tokens that decide in a call.

    Args:
        is_causal: The model writes on from its input, so that labels follow what it is asked.
        masks: `[rows, tokens]` by stream ("main", "decoder"), true where a token may decide; all
            may where there is none.
        is_given: The caller has named them.
        prompt: How many tokens `generate` was given, in a call of it.
    """

    is_causal: bool = False
    masks: dict[str, Tensor] = field(default_factory=dict)
    is_given: bool = False
    prompt: int | None = None

    def inside(self) -> Deciding:
        """What a forward inside the call begins with."""
        return Deciding(self.is_causal, dict(self.masks), self.is_given, self.prompt)

    def note(
        self, arguments: Mapping[str, Any], rows: CallRows, is_inner: bool, is_encoder_decoder: bool
    ) -> None:
        """Note what the arguments of a forward say.

        Args:
            arguments: Them.
            rows: What the forward knows of its rows.
            is_inner: It lies in another call.
            is_encoder_decoder: The model has a decoder that reads an encoder's output.

        Raises:
            PeftTypeError: A mask from which tokens can't be read.
            PeftNotSupportedError: Several samples are packed into one row.
        """
        _refuse_packed(arguments, rows)
        labels = arguments.get("labels")
        labels = (
            labels if isinstance(labels, Tensor) and labels.dim() == 2 else None
        )  # of other tasks, they name no tokens
        given = arguments.get("routing_mask")
        if given is not None:
            self.masks["main"], self.is_given = _as_mask(given), True
        elif is_inner and self.prompt is not None:
            self._note_step(arguments.get("attention_mask"), rows)
        elif not self.is_given and (not is_inner or arguments.get("attention_mask") is not None):
            mask = token_mask(arguments.get("attention_mask"), arguments)
            mask = prompt_mask(mask, labels) if self.is_causal and labels is not None else mask
            self.masks.pop("main", None)
            if mask is not None:
                self.masks["main"] = mask
        if is_encoder_decoder:
            # All that is known of the answer when it is begun: the labels say where that is, by
            # default after the first token.
            mask = token_mask(arguments.get("decoder_attention_mask"), {})
            tokens = [
                t
                for t in (labels, arguments.get("decoder_input_ids"), mask)
                if isinstance(t, Tensor)
            ]
            if tokens:
                self.masks["decoder"] = prompt_mask(
                    mask, tokens[0] if labels is not None else torch.zeros_like(tokens[0])
                )

    def _note_step(self, attention: Any, rows: CallRows) -> None:
        """Note a step of `generate`, which may be given more than the prompt: guesses of what
        follows it.
        """
        mask, given = self.masks.get("main"), rows.tokens("main")
        if not self.is_given and isinstance(attention, Tensor) and attention.dim() == 2:
            mask = attention.bool()
        elif mask is None:
            mask = token_mask(attention, {})
            mask = (
                mask if mask is None or given is None else mask[:, :given]
            )  # a cache of fixed length has room behind
        further = 0 if given is None or self.prompt is None else given - self.prompt
        if further > 0 and rows.rows is not None and given is not None:
            if mask is None:
                device = attention.device if isinstance(attention, Tensor) else None
                mask = torch.ones(rows.rows, given, dtype=torch.bool, device=device)
            mask = F.pad(mask[:, : max(mask.shape[1] - further, self.prompt or 0)], (0, further))
        if mask is not None:
            self.masks["main"] = mask

    def mask_for(self, x: Tensor, stream: str, rows: CallRows) -> Tensor | None:
        """Which tokens of a layer's input `[rows, tokens, in]` decide, `[rows, tokens]`; None for
        all.

        Raises:
            PeftValueError: The mask is for another number of tokens than the layer sees.
        """
        mask, seen, given = self.masks.get(stream), x.shape[1], rows.tokens(stream)
        if mask is None:
            return None
        if mask.shape[1] != seen:
            if given == seen < mask.shape[1]:
                mask = mask[:, -seen:]  # with a cache, a layer sees the last tokens only
            elif given is not None and rows.has_more_than_tokens():
                # The layer sees something else than the tokens that the mask is for, patches of an
                # image, say.
                return None
            else:
                mask = _resampled(mask, seen, rows) if given is None else None
        if mask is None:
            length = self.masks[stream].shape[1]
            raise PeftValueError(
                f"The mask has {length} tokens where a layer sees {seen}; pass `routing_mask` of "
                "that length, or use "
                "`routing_level='token'`."
            )
        if mask.shape[0] != x.shape[0]:
            mask = mask.repeat_interleave(x.shape[0] // mask.shape[0], dim=0)
        return mask.to(x.device)


def token_mask(mask: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """An attention mask as `[rows, tokens]`, true where any token may attend to a token.

    Args:
        mask: `[rows, tokens]`; `[rows, choices, tokens]` if the ids are that; of each pair of
            tokens `[rows, from, to]` or `[rows, heads, from, to]`: true or not 0 where one may
            attend to the other, or floating numbers that are added to the scores. Or several in a
            mapping, each for some of the layers.
        arguments: The call's arguments.

    Raises:
        PeftTypeError: It is none of this.
    """
    if isinstance(mask, Mapping):
        masks = [token_mask(one, arguments) for one in mask.values()]
        known = [one for one in masks if one is not None]
        return torch.stack(known).any(0) if len(known) == len(masks) and known else None
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return None if mask is None else mask.bool()
    if not isinstance(mask, Tensor) or mask.dim() not in (3, 4):
        form = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise PeftTypeError(
            f"An `attention_mask` {form} does not tell which tokens are real; pass them as "
            "`routing_mask`, or use "
            "`routing_level='token'`."
        )
    allowed = mask > _NEVER if mask.is_floating_point() else mask != 0
    ids = arguments.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 3 and ids.shape == mask.shape:
        return mask.bool().flatten(0, 1)
    return allowed.flatten(1, -2).any(1)


def _as_mask(mask: Any) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise PeftTypeError(
            "`routing_mask` must be a tensor [batch, tokens] that is nonzero where the prompt is."
        )
    return mask.bool()


def _resampled(mask: Tensor, tokens: int, rows: CallRows) -> Tensor | None:
    """A mask of a sound's samples as one of the frames that a model makes of them, if the model has
    a way to say so.
    """
    modules: Any = () if rows.root is None else rows.root.modules()
    convert = next(
        (
            m._get_feature_vector_attention_mask
            for m in modules
            if hasattr(m, "_get_feature_vector_attention_mask")
        ),
        None,
    )
    return None if convert is None else convert(tokens, mask.long()).bool()


def _refuse_packed(arguments: Mapping[str, Any], rows: CallRows) -> None:
    ends = arguments.get("cu_seq_lens_q")
    if isinstance(ends, Tensor) and rows.rows is not None and ends.shape[0] > rows.rows + 1:
        raise PeftNotSupportedError(
            f"{ends.shape[0] - 1} texts are packed into {rows.rows} row(s), which routing by input "
            "would take for one; pad "
            "them, or use `routing_level='token'`."
        )
