# SPDX-License-Identifier: Apache-2.0
"""Terms on the routing that a user adds to the loss, and the weights that a forward used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ....base.containers import walk
from ....base.errors import PeftValueError
from ....core.adapter_choice import adapter_of
from ..layer import PolyLayer
from ..router import Router, TaskRouter
from . import metrics


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[dict[Router, list[Tensor]]]:
    """A context that keeps the mixing weights which routers give, with their gradients: for routing
    by input, whose weights are known in a forward only.

    Args:
        model: A model with Poly adapters.

    Yields:
        Weights `[..., n_splits, n_skills]` by router, one tensor for each time it was asked.
    """
    record: dict[Router, list[Tensor]] = {}

    def keep(router: Any, args: Any, weights: Tensor) -> None:
        record.setdefault(router, []).append(weights)

    hooks = [
        module.register_forward_hook(keep)
        for module in model.modules()
        if isinstance(module, Router)
    ]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def routing_loss(
    model: nn.Module,
    *,
    entropy: float = 0.0,
    balance: float = 0.0,
    ibp: float = 0.0,
    ibp_alpha: float = 3.0,
    record: dict[Router, list[Tensor]] | None = None,
    adapter_name: str | None = None,
) -> Tensor:
    """A sum of terms on the routing of an adapter, the mean over its routers, to be added to the
    loss.

    Routing by task is judged by its table, as it is in evaluation. Routing by input is judged by
    what it chose for a batch.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        entropy: Factor on the entropy of each row of weights (0 to 1). Positive: rows of few
            skills.
        balance: Factor on the unevenness of skills' use over tasks or samples. Positive: no skill
            falls out of use.
        ibp: Factor on the negative logarithm of the Indian buffet process prior; for routing by
            task.
        ibp_alpha: That prior's expected number of skills of a task.
        record: What `recorded_routing` kept of the forward; routers in it are judged by that.
        adapter_name: The adapter; by default the one called "default", else the only one that is
            active.

    Returns:
        A number with gradients.

    Raises:
        PeftValueError: There is no such adapter, several could be meant, or routing by input was
            not recorded or is asked for its prior.

    Example:
        >>> from peft import PolyConfig, get_peft_model
        >>> config = PolyConfig(n_skills=2, poly_type="mope", target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), config)
        >>> with recorded_routing(model) as record:
        ...     loss = model(torch.randn(3, 4)).square().mean()
        >>> (loss + routing_loss(model, balance=0.01, record=record)).backward()

    Source: arXiv:2202.13914, section 3 (the prior); arXiv:1701.06538, section 4 (balance)
    """
    name = adapter_of(model, adapter_name, PolyLayer, " of Poly")
    layers = (layer for _, layer in walk(model) if isinstance(layer, PolyLayer))
    routers = dict.fromkeys(layer.router(name) for layer in layers if name in layer.scaling)
    return torch.stack(
        [
            _terms(router, entropy, balance, ibp, ibp_alpha, (record or {}).get(router))
            for router in routers
        ]
    ).mean()


def _terms(
    router: Any,
    entropy: float,
    balance: float,
    ibp: float,
    ibp_alpha: float,
    seen: list[Tensor] | None,
) -> Tensor:
    """The terms of one router."""
    by_task = isinstance(router, TaskRouter)
    if not by_task and (ibp or not seen):
        raise PeftValueError(
            "The prior is for routing by task."
            if ibp
            else "Routing by input is known in a forward: pass what `recorded_routing` kept."
        )
    weights = torch.cat([w.flatten(0, -3) for w in seen]) if seen else router.task_weights()
    total = weights.new_zeros(())
    if entropy:
        total = total + entropy * metrics.entropy(weights).mean()
    if balance:
        total = total + balance * metrics.balance(weights)
    if ibp:
        total = (
            total + ibp * metrics.ibp_energy(router.task_gates().transpose(0, 1), ibp_alpha).mean()
        )
    return total
