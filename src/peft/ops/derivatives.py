# SPDX-License-Identifier: Apache-2.0
"""Gradients by way of plain operations, for functions whose own backward does not know all that
autograd does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients_again(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    arguments: Sequence[Tensor | None],
    wanted: Sequence[bool],
    of_results: Sequence[Tensor],
) -> list[Tensor | None]:
    """Return gradients for a function's arguments, in a backward.

    They are part of a graph if gradients are on there, so that they can be differentiated again.

    Args:
        function: Of plain operations; it returns one tensor or several.
        arguments: Its arguments, as they were saved for backward.
        wanted: Which of their gradients are.
        of_results: The gradients for its results.

    Returns:
        For each argument its gradient, None where none is wanted or the function does not need it.
    """
    # Where one argument was computed from another (by a layer that a model runs twice), that way is
    # not this function's: each is taken by an alias.
    with torch.enable_grad():
        aliases = {i: arguments[i].view_as(arguments[i]) for i, want in enumerate(wanted) if want}  # type: ignore
        results = function(*[aliases.get(i, argument) for i, argument in enumerate(arguments)])
    sources, again = tuple(aliases.values()), torch.is_grad_enabled()
    found = (
        torch.autograd.grad(results, sources, of_results, create_graph=again, allow_unused=True)
        if sources
        else ()
    )
    gradients = dict(zip(aliases, found, strict=True))
    return [gradients.get(i) for i in range(len(wanted))]
