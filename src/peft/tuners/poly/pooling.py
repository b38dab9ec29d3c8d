# SPDX-License-Identifier: Apache-2.0
"""What routing by input looks at: which tokens, and their mean.

Source: arXiv:2211.03831
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...base.errors import PeftValueError
from ...ops.dispatch import shapes
from .mixing import _working_dtype


def pool(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean input of each row over its real tokens, for routing by input.

    Args:
        x: `[rows, ..., in]`; of `[rows, in]` there is nothing to pool.
        mask: `[rows, tokens]`, true (or not 0) at real tokens; all are if `None`. What padded
            positions hold, NaN included, has no effect.

    Returns:
        `[rows, in]` in the dtype of `x`, summed in float32 at least. Zero for a row without a real
        token.

    Raises:
        PeftValueError: `mask` has another size than the tokens of `x`.

    Example:
        >>> pool(torch.tensor([[[1.0], [3.0], [torch.nan]]]), torch.tensor([[1, 1, 0]]))
        tensor([[2.]])

    Source: arXiv:2211.03831
    """
    if x.dim() == 2:
        return x
    tokens = x.flatten(1, -2)
    if mask is None:
        total = tokens.sum(dim=1, dtype=_working_dtype(x))
        return (total / tokens.shape[1] if shapes(tokens)[0][1] else total).to(x.dtype)
    if mask.shape != tokens.shape[:2]:
        raise PeftValueError(
            f"The mask of shape {tuple(mask.shape)} does not fit an input of shape "
            f"{tuple(x.shape)}: "
            f"give one of shape {tuple(tokens.shape[:2])}, or none."
        )
    real = mask.bool().unsqueeze(-1)
    # Not a product with the mask: 0 * NaN is NaN.
    total = torch.where(real, tokens, 0).sum(dim=1, dtype=_working_dtype(x))
    return (total / real.sum(dim=1).clamp(min=1)).to(x.dtype)


def prompt_mask(attention_mask: Tensor | None, labels: Tensor) -> Tensor:
    """Tokens a causal LM may route by in training: what it will have before it generates.

    The real tokens before the first supervised one (label other than -100); the first real token
    where there are none, since generation starts from at least one.

    Args:
        attention_mask: `[batch, n]`, not 0 at real tokens; all are if `None`.
        labels: `[batch, n]`, aligned with the input tokens (not shifted).

    Returns:
        Boolean `[batch, n]`.

    Example:
        >>> prompt_mask(None, torch.tensor([[-100, -100, 7], [5, 6, 7]]))
        tensor([[ True,  True, False],
                [ True, False, False]])

    Source: arXiv:2211.03831
    """
    real = (
        torch.ones_like(labels, dtype=torch.bool)
        if attention_mask is None
        else attention_mask.bool()
    )
    supervised = real & (labels != -100)
    prompt = real & (supervised.cumsum(dim=-1) == 0)
    first = real & (real.cumsum(dim=-1) == 1)
    return prompt | first
