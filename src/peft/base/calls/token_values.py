# SPDX-License-Identifier: Apache-2.0
"""Values of a call's tokens, as values of the rows that a layer sees.

A value for each token (where an adapter is active, how much it counts) multiplies the rows of a
layer's input. Most inputs are `[rows, tokens, …]`; others have the tokens first, or flattened, or
only the last ones, or those that a mixture routes to an expert.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import PeftValueError
from ..tracing import shapes
from .layout import RowLayout
from .rows import MOE_TOKENS, CallRows, LayerWithLayout


def values_of_rows(values: Tensor, x: Tensor, layer: LayerWithLayout, rows: CallRows) -> Tensor:
    """Return values of tokens as values of the rows of a layer's input.

    Args:
        values: `[rows, tokens]`, by the call's inputs.
        x: The layer's input, `[*leading, in]`, or `[*leading]` for an embedding.
        layer: The layer.
        rows: The counts of the call.

    Returns:
        `[*leading]`, on the device of `x`.

    Raises:
        PeftValueError: The input's rows are not the tokens.
    """
    sizes = shapes(x)[0]
    leading = tuple(sizes[: len(sizes) - layer.layout.features])
    by_row = _by_row(values, leading, layer.layout, rows)
    if by_row is None:
        raise _error(values, x, layer, rows)
    by_row = by_row.to(x.device)
    return by_row.reshape(*by_row.shape, *[1] * (len(leading) - by_row.dim())).expand(leading)


def _by_row(
    values: Tensor, leading: tuple[int, ...], layout: RowLayout, rows: CallRows
) -> Tensor | None:
    """Return the values in the order of an input's rows; None if these are not the tokens."""
    of_expert = _of_expert(values, leading, layout)
    if of_expert is not None:
        return of_expert
    if len(leading) != 1:
        return _in_two_dimensions(values, leading, layout, rows) if leading else None
    samples, tokens = shapes(values)[0]
    if leading[0] == samples * tokens:
        return values.reshape(-1)
    if leading[0] == samples and layout.expert is None:
        return values[:, -1]  # pooled: the last token has seen all others
    return None


def _in_two_dimensions(
    values: Tensor, leading: tuple[int, ...], layout: RowLayout, rows: CallRows
) -> Tensor | None:
    """Return the values for an input `[rows, tokens, …]` or `[tokens, rows, …]`."""
    (samples, tokens), (first, second, *_) = shapes(values)[0], leading
    turned = (first, second) == (tokens, samples)
    if turned and (layout.sequence_first or layout.is_declared or samples != first):
        return values.mT
    if (first, second) == (samples, tokens):
        return values
    if first == samples * tokens:
        return values.reshape(-1)
    if first == samples and second < tokens and not rows.has_more_than_tokens():
        return values[:, -second:]  # a head that is asked for the last tokens
    return None


def _of_expert(values: Tensor, leading: tuple[int, ...], layout: RowLayout) -> Tensor | None:
    """Return the values of the tokens that are routed to an expert; None for other layers."""
    chosen = MOE_TOKENS.current
    tokens = None if chosen is None or layout.expert is None else chosen.tokens(layout.expert)
    if tokens is None or leading != tuple(tokens.shape):
        return None
    return values.reshape(-1)[tokens]


def _error(values: Tensor, x: Tensor, layer: LayerWithLayout, rows: CallRows) -> PeftValueError:
    samples, tokens = values.shape
    return PeftValueError(
        f"{rows.name_of(layer)} sees an input of shape {list(x.shape)} in a call of {samples} x "
        f"{tokens} tokens, and nothing tells which tokens its rows are, which an adapter that acts "
        "on some tokens only must know. Leave this layer out of `target_modules`."
    )
