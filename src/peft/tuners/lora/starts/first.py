# SPDX-License-Identifier: Apache-2.0
"""The first factors of an adapter that starts from the base weight, by `init_lora_weights`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..config import LoraConfig
from ..factors import Factors
from .configs import LoftQConfig
from .corda import CordaEigens
from .gradient import GRADIENT, gradient_factors
from .loftq import QuantizedWeight, loftq
from .weight import olora, pissa

# Attributes that `preprocess_corda` and `preprocess_loraga` leave on base layers.
EIGENS = "eigens"
LEFT_ON_LAYERS = (EIGENS, GRADIENT)


class First(NamedTuple):
    """First factors, and the weight that takes the base weight's place.

    Without such a weight, `s·B·A` of the first factors is subtracted from the base weight.
    """

    factors: Factors
    weight: QuantizedWeight | None = None


def first_factors(
    base: nn.Module, W: Tensor, r: int, scale: float, config: LoraConfig
) -> First | None:
    """Return the first factors of a linear layer, None if its start needs data that it lacks.

    Args:
        base: The layer, which holds what was collected from data.
        W: Its weight `[out, in]`.
        r: Rank.
        scale: `s`.
        config: The adapter's config.
    """
    how = str(config.init_lora_weights)
    if how == "olora":
        return First(olora(W, r))
    if how == "loftq":
        options = LoftQConfig.of(config.loftq_config, "loftq_config")
        Q, factors = loftq(W, r, scale, options.loftq_bits, options.loftq_iter)
        return First(factors, Q)
    if how == "corda":
        eigens = getattr(base, EIGENS, None)
        return First(eigens.factors(scale)) if isinstance(eigens, CordaEigens) else None
    if how == "lora_ga":
        gradient, ga = getattr(base, GRADIENT, None), config.lora_ga_config
        if not isinstance(gradient, Tensor) or ga is None:
            return None
        gradient = gradient.mT if gradient.shape != W.shape else gradient
        return First(
            gradient_factors(
                gradient.to(W.device), W, r, scale, ga.direction, ga.scale, ga.stable_gamma
            )
        )
    rounds = how.removeprefix("pissa_niter_")
    return First(pissa(W, r, scale, int(rounds) if rounds.isdigit() else None))
