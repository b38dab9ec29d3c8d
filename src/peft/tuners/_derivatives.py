# SPDX-License-Identifier: Apache-2.0
"""Gradients that can be differentiated again, for functions whose own backward can't be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def gradients_again(
    function: Callable[..., Any], arguments: Sequence[Tensor], wanted: Sequence[bool], of_results: Sequence[Tensor]
) -> Iterator[Tensor | None]:
    """Return gradients for a function's arguments as part of a graph, for second derivatives.

    Args:
        function: Of plain operations; it returns one tensor or several.
        arguments: Its arguments, as they were saved for backward.
        wanted: Which of their gradients are.
        of_results: The gradients for its results.

    Returns:
        For each argument its gradient, None where none is wanted or the function does not need it.
    """
    # Where one argument was computed from another (by a layer that a model runs twice), that way is
    # not this function's.
    own = [argument.view_as(argument) if want else argument for argument, want in zip(arguments, wanted, strict=True)]
    with torch.enable_grad():
        results = function(*own)
    sources = [argument for argument, want in zip(own, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(results, sources, of_results, create_graph=True, allow_unused=True))
    return iter([next(found) if want else None for want in wanted])
