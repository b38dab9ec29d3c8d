# SPDX-License-Identifier: Apache-2.0
"""Minimization of a function by its values alone, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Found(NamedTuple):
    """The least value that a search found.

    Attributes:
        x: Where.
        value: The function's value there.
        values: The value of each evaluation, in their order.
    """

    x: Tensor
    value: float
    values: list[float]


def evolve(
    function: Callable[[Tensor], float],
    start: Tensor,
    *,
    evaluations: int,
    step: float,
    bound: float,
    seed: int = 0,
) -> Found:
    """Minimize a function of a few dozen numbers by a (1+1) evolution strategy: a normal step from
    the best point so far is kept if it is no worse.

    The step grows by half after a success and shrinks by the fourth root of that after a failure,
    so that it stands where one step in five succeeds.

    Args:
        function: Called with a vector of the shape of `start`, `evaluations` times.
        start: The first point.
        evaluations: At least 1.
        step: Standard deviation of the first step.
        bound: Largest absolute value of each number; points beyond are moved to the bound.
        seed: Of the steps.

    Example:
        >>> wanted = torch.tensor([0.5, -0.25])
        >>> found = evolve(
        ...     lambda x: float((x - wanted).square().sum()), torch.zeros(2),
        ...     evaluations=200, step=0.3, bound=1.5,
        ... )
        >>> found.value < 1e-4
        True

    Source: Rechenberg (1973), the rule of one fifth; Kern and others (2004), its factors
    """
    generator = torch.Generator().manual_seed(seed)
    best = start.double().cpu()
    values = [function(best.to(start))]
    least = values[0]
    while len(values) < evaluations:
        draw = torch.randn(best.shape, generator=generator, dtype=best.dtype)
        x = (best + step * draw).clamp(-bound, bound)
        values.append(function(x.to(start)))
        if values[-1] <= least:
            best, least, step = x, values[-1], step * 1.5
        else:
            step *= 1.5**-0.25
    return Found(best.to(start), least, values)
