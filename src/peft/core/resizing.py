# SPDX-License-Identifier: Apache-2.0
"""Resizing of a language model's vocabulary, which adapters of its embeddings do not follow."""

from __future__ import annotations

from torch import nn

from ..base.containers import walk
from ..base.errors import PeftNotSupportedError
from .auxiliary import AuxiliaryTrainingWrapper
from .layer import BaseTunerLayer


def check_resizable(
    model: nn.Module,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *others: object,
    **options: object,
) -> None:
    """Check the arguments of transformers' `resize_token_embeddings`, which would raise when it has
    resized the embeddings and meets an adapted head.

    Raises:
        PeftNotSupportedError: The size changes, and an adapter trains the embeddings or the head.
    """
    for end in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, end)() if hasattr(model, end) else None
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        rows = module.weight.shape[0]
        wanted = rows if new_num_tokens is None else new_num_tokens
        wanted += -wanted % (pad_to_multiple_of or 1)
        if wanted != rows:
            path = next((path for path, own in walk(model) if own is module), "")
            raise PeftNotSupportedError(
                f"`resize_token_embeddings` would change `{path}` from {rows} to {wanted} rows, "
                "and adapters of it would not follow. Resize the base model before it gets "
                "adapters of its embeddings or head; `unload` or `merge_and_unload` removes these."
            )
