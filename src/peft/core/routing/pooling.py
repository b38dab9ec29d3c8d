# SPDX-License-Identifier: Apache-2.0
"""The input of routing by input: its tokens, and their mean. Pure functions of tensors.

Source: arXiv:2211.03831
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...base.errors import PeftValueError
from ...base.tracing import shapes


def pool(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of each row over its real tokens.

    Args:
        x: `[rows, ..., in]`; `[rows, in]` is returned as it is.
        mask: `[rows, tokens]`, nonzero at real tokens; None if all are. The values of other tokens,
            NaN included, have no effect.

    Returns:
        `[rows, in]` in the dtype of `x`, summed in float32 at least. Zero for a row without real
        tokens.

    Raises:
        PeftValueError: `mask` has another shape than the tokens of `x`.

    Example:
        >>> pool(torch.tensor([[[1.0], [3.0], [torch.nan]]]), torch.tensor([[1, 1, 0]]))
        tensor([[2.]])

    Source: arXiv:2306.03745, section 3 (the pooled input)
    """
    if x.dim() == 2:
        return x
    tokens, dtype = x.flatten(1, -2), torch.promote_types(x.dtype, torch.float32)
    if mask is None:
        total = tokens.sum(dim=1, dtype=dtype)
        return (total / tokens.shape[1] if shapes(tokens)[0][1] else total).to(x.dtype)
    if mask.shape != tokens.shape[:2]:
        raise PeftValueError(
            f"The mask of shape {tuple(mask.shape)} does not fit an input of shape "
            f"{tuple(x.shape)}: give one of shape {tuple(tokens.shape[:2])}, or none."
        )
    real = mask.bool().unsqueeze(-1)
    # Not a product with the mask: 0 * NaN is NaN.
    total = torch.where(real, tokens, 0).sum(dim=1, dtype=dtype)
    return (total / real.sum(dim=1).clamp(min=1)).to(x.dtype)


def prompt_mask(attention_mask: Tensor | None, labels: Tensor) -> Tensor:
    """Return the tokens by which a causal LM may route in training: those it has before it
    generates.

    They are the real tokens before the first label other than -100; at least the first real token,
    since generation starts from one.

    Args:
        attention_mask: `[batch, n]`, nonzero at real tokens; None if all are.
        labels: `[batch, n]`, aligned with the input tokens (not shifted).

    Returns:
        Booleans `[batch, n]`.

    Example:
        >>> prompt_mask(None, torch.tensor([[-100, -100, 7], [5, 6, 7]]))
        tensor([[ True,  True, False],
                [ True, False, False]])

    Source: follows from the inputs of `generate`
    """
    if attention_mask is None:
        real = torch.ones_like(labels, dtype=torch.bool)
    else:
        real = attention_mask.bool()
    supervised = real & (labels != -100)
    prompt = real & (supervised.cumsum(dim=-1) == 0)
    first = real & (real.cumsum(dim=-1) == 1)
    return prompt | first
