# SPDX-License-Identifier: Apache-2.0
"""The tokens and the cache of a call, and the starts of its rows that a cache carries.

A forward leaves the starts of its rows with the cache, as an attribute, for the forward that goes
on with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol, TypeGuard, cast

import torch
from torch import Tensor

from ...base.calls.arguments import NO_TOKENS
from ...base.errors import PeftValueError

# Attributes of a cache: the starts of its rows, by adapter, and the number of tokens seen.
_STARTS, _SEEN = "_peft_starts", "_peft_seen"
# Arguments with the cache that a forward continues, and arguments that are no token ids.
_CACHES = ("past_key_values", "cache_params")
_NO_IDS = re.compile(f"{NO_TOKENS.pattern}|label|type|offsets")


class _Cache(Protocol):
    """The cache of a model of transformers."""

    def get_seq_length(self) -> int | Tensor:
        """Return the number of tokens in it."""


def token_ids(arguments: Mapping[str, object]) -> Tensor | None:
    """Return the token ids `[rows, tokens]` of a call: `input_ids`, or the first likely tensor."""
    if arguments.get("inputs_embeds") is not None:
        return None
    likely = [name for name in arguments if not _NO_IDS.search(name)]
    for name in ("input_ids", "inputs", *likely):
        ids = arguments.get(name)
        if not isinstance(ids, Tensor) or ids.is_nested:
            continue
        if ids.dim() == 2 and ids.dtype in (torch.int64, torch.int32):
            return ids
    return None


def rows_and_tokens(arguments: Mapping[str, object]) -> tuple[int, int] | None:
    """Return the numbers of rows and tokens of a forward; None without tokens."""
    tokens = arguments.get("inputs_embeds")
    tokens = token_ids(arguments) if tokens is None else tokens
    return (tokens.shape[0], tokens.shape[1]) if isinstance(tokens, Tensor) else None


def are_places(positions: object, tokens: int) -> TypeGuard[Tensor]:
    """Return whether `position_ids` give the place of each token in its text."""
    return isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == tokens


def cache_of(arguments: Mapping[str, object]) -> _Cache | None:
    """Return the cache that a forward continues, or None."""
    caches = (arguments.get(name) for name in _CACHES)
    cache = next((cache for cache in caches if hasattr(cache, "__dict__")), None)
    return cast("_Cache | None", cache)


def _cache_in(output: object) -> _Cache | None:
    """Return the cache in a forward's output, or None."""
    if isinstance(output, (tuple, list)):
        return next((item for item in output if hasattr(item, "get_seq_length")), None)
    return cache_of(vars(output)) if hasattr(output, "__dict__") else None


def leave_starts(
    arguments: Mapping[str, object], output: object, starts: dict[str, Tensor]
) -> None:
    """Leave the starts of the rows with the cache that a forward has continued or made."""
    cache = cache_of(arguments)
    if cache is None:
        cache, sizes = _cache_in(output), rows_and_tokens(arguments)
        if cache is not None and sizes is not None:
            setattr(cache, _SEEN, sizes[1])
    if cache is not None and starts:
        setattr(cache, _STARTS, {**getattr(cache, _STARTS, {}), **starts})


def tokens_seen(arguments: Mapping[str, object], tokens: int) -> int | Tensor:
    """Return the number of tokens that lie in the cache before those of a forward."""
    cache = cache_of(arguments)
    if cache is None:
        return 0
    try:
        return cache.get_seq_length()
    except (AttributeError, ValueError):  # a state of a fixed size, which has no length
        seen = getattr(cache, _SEEN, 0)
        setattr(cache, _SEEN, seen + tokens)
        return seen


def for_rows(values: Tensor, rows: int) -> Tensor:
    """Return values of samples for the rows of a forward, in which each may have several."""
    samples = values.shape[0]
    if samples == rows:
        return values
    if rows % samples:
        raise PeftValueError(
            f"The cache has {samples} rows and the call {rows}; pass `alora_offsets`, the number "
            "of active tokens at the end of each."
        )
    return values.repeat_interleave(rows // samples)


def carried_starts(arguments: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the starts that the cache of a forward carries, by adapter."""
    return getattr(cache_of(arguments), _STARTS, {})
