# SPDX-License-Identifier: Apache-2.0
"""The tokens on which an activated LoRA acts: those from the last invocation on.

Pure functions of token ids `[rows, tokens]`, without waiting for the device.

Source: arXiv:2504.12397, section 3
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...base.errors import PeftTypeError, PeftValueError

NEVER = 2**62
"""The start of a row without an invocation."""


def invocation_starts(ids: Tensor, invocation: Tensor) -> Tensor:
    """Return where the last invocation begins in each row; `NEVER` where there is none.

    Args:
        ids: `[rows, tokens]`.
        invocation: `[k]`, the ids that stand one after the other in an invocation.

    Returns:
        `[rows]`.

    Example:
        >>> ids = torch.tensor([[5, 1, 2, 5, 1, 2, 7], [1, 5, 2, 0, 0, 0, 0]])
        >>> invocation_starts(ids, torch.tensor([1, 2])).tolist()[0]
        4
    """
    begins = _begins(ids, invocation)
    starts = torch.where(begins, torch.arange(ids.shape[1], device=ids.device), -1).amax(1)
    return torch.where(starts < 0, NEVER, starts)


def active_tokens(starts: Tensor, tokens: int, seen: int | Tensor = 0) -> Tensor:
    """Return which tokens lie at or after their row's start, `[rows, tokens]`.

    Args:
        starts: `[rows]`, counted from the beginning of the text.
        tokens: Number of tokens of the forward.
        seen: Number of tokens before them, which are in the cache.
    """
    places = torch.arange(tokens, device=starts.device) + seen
    return places >= starts[:, None]


def active_tokens_of_texts(ids: Tensor, invocation: Tensor, positions: Tensor) -> Tensor:
    """Return the active tokens of texts that are packed into rows, `[rows, tokens]`.

    Each text is active from its own last invocation on.

    Args:
        ids: `[rows, tokens]`.
        invocation: `[k]`.
        positions: `[rows, tokens]`, zero at the first token of each text.

    Example:
        >>> ids, positions = torch.tensor([[3, 1, 4, 3, 4]]), torch.tensor([[0, 1, 2, 0, 1]])
        >>> active_tokens_of_texts(ids, torch.tensor([1]), positions).tolist()
        [[False, True, True, False, False]]
    """
    texts = (positions == 0).cumsum(1).expand_as(ids)  # 0 before the first beginning
    k, tokens = invocation.shape[0], ids.shape[1]
    begins = _begins(ids, invocation)
    begins[:, : tokens - k + 1] &= texts[:, : tokens - k + 1] == texts[:, k - 1 :]
    places = torch.arange(tokens, device=ids.device).expand_as(ids)
    last = places.new_full((ids.shape[0], tokens + 1), NEVER)
    last = last.scatter_reduce(
        1, texts, torch.where(begins, places, -1), "amax", include_self=False
    ).gather(1, texts)
    return (last >= 0) & (places >= last)


def starts_of_offsets(offsets: object, rows: int, tokens: int, device: torch.device) -> Tensor:
    """Return the starts that `alora_offsets` tells, `[rows]`, counted from the first of `tokens`.

    Args:
        offsets: For each row the number of active tokens at its end, None or 0 for none.

    Raises:
        PeftTypeError: They are not integers.
        PeftValueError: There is not one for each row, or one is negative.
    """
    entries = offsets.tolist() if isinstance(offsets, Tensor) else offsets
    if not isinstance(entries, (list, tuple)) or not all(
        entry is None or (isinstance(entry, int) and not isinstance(entry, bool))
        for entry in entries
    ):
        raise PeftTypeError(
            f"`alora_offsets`={offsets!r} must be a list with the number of active tokens at the "
            "end of each sample, None for none."
        )
    if len(entries) != rows or any(entry is not None and entry < 0 for entry in entries):
        raise PeftValueError(
            f"`alora_offsets`={entries!r} must have {rows} entries, one for each sample, none of "
            "them negative."
        )
    return torch.tensor([tokens - n if n else NEVER for n in entries], device=device)


def offsets_of(starts: Tensor, tokens: int) -> list[int | None]:
    """Return starts as `alora_offsets`; this waits for the device."""
    return [tokens - start if start < NEVER else None for start in starts.tolist()]


def _begins(ids: Tensor, invocation: Tensor) -> Tensor:
    """Return where an invocation begins, `[rows, tokens]`."""
    k, tokens = invocation.shape[0], ids.shape[1]
    begins = torch.zeros_like(ids, dtype=torch.bool)
    if tokens >= k:
        begins[:, : tokens - k + 1] = (ids.unfold(1, k, 1) == invocation).all(-1)
    return begins
