# SPDX-License-Identifier: Apache-2.0
"""Gradients by autograd of plain operations, for functions whose own backward supports neither
double backward nor batched gradients.
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
    """Return the gradients for a function's arguments, computed by running the function again.

    If gradients are enabled there, the result can be differentiated again. The gradient is None
    where it is not `wanted`, or where the function does not need the argument.
    """
    # If one argument was computed from another (a model runs a layer twice), the gradient must not
    # flow from one to the other here; aliases cut that path.
    with torch.enable_grad():
        sought = [(i, argument) for i, argument in enumerate(arguments) if wanted[i]]
        aliases = {i: argument.view_as(argument) for i, argument in sought if argument is not None}
        results = function(*[aliases.get(i, argument) for i, argument in enumerate(arguments)])
    sources, again = tuple(aliases.values()), torch.is_grad_enabled()
    computed = (
        torch.autograd.grad(results, sources, of_results, create_graph=again, allow_unused=True)
        if sources
        else ()
    )
    gradients = dict(zip(aliases, computed, strict=True))
    return [gradients.get(i) for i in range(len(wanted))]
