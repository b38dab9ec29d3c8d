# SPDX-License-Identifier: Apache-2.0
"""Terms on the routing that a user adds to the loss, and the weights that a forward used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ....base.errors import PeftTypeError, PeftValueError
from ....base.modules import check_model
from ....base.plain_values import plain
from ....base.validation import number
from ..router import Router, TaskRouter
from . import metrics
from .report import adapter_routers, poly_adapter


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[dict[Router, list[Tensor]]]:
    """Context that records the mixing weights of all routers, with their gradients.

    The weights of routing by input exist only in a forward, so `routing_loss` needs this record.

    Yields:
        Weights `[..., n_splits, n_skills]` by router, a tensor for each call of the router.

    Raises:
        PeftTypeError: `model` is not a torch module.
    """
    check_model(model)
    record: dict[Router, list[Tensor]] = {}

    def keep(router: Router, args: tuple[object, ...], weights: Tensor) -> None:
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
    record: Mapping[Router, list[Tensor]] | None = None,
    adapter_name: str | None = None,
    **removed: object,
) -> Tensor:
    """Return a sum of terms on an adapter's routing, to be added to the loss:

        `mean over routers of (entropy · H(w) + balance · B(w))`

    with `H` the mean entropy of the rows of mixing weights (`metrics.entropy`, 0 to 1) and `B` the
    unevenness of the skills' use (`metrics.balance`). Routing by task has the weights of its table
    in evaluation, routing by input those that it chose for a batch.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        entropy: Factor on the entropy. A positive one favors rows with few skills.
        balance: Factor on the unevenness. A positive one keeps all skills in use.
        record: The record of `recorded_routing`; its routers are judged by their recorded weights.
        adapter_name: The adapter; by default "default", else the only active one.
        **removed: Arguments of earlier versions, refused with a reason.

    Returns:
        A scalar with gradients.

    Raises:
        PeftTypeError: There is no such argument, or `record` is another object.
        PeftValueError: There is no such adapter, the choice is ambiguous, a factor is not a finite
            number, or routing by input was not recorded.

    Example:
        >>> from peft import PolyConfig, get_peft_model
        >>> config = PolyConfig(n_skills=2, poly_type="mope", target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), config)
        >>> with recorded_routing(model) as record:
        ...     loss = model(torch.randn(3, 4)).square().mean()
        >>> (loss + routing_loss(model, balance=0.01, record=record)).backward()

    Source: arXiv:1701.06538, section 4 (balance)
    """
    if removed:
        prior = (
            " The prior of the Indian buffet process was removed: it made no significant difference"
            " in its paper (arXiv:2202.13914, Table 3)."
        )
        raise PeftTypeError(
            f"`routing_loss` has no argument `{next(iter(removed))}`; its terms are `entropy` (few "
            f"skills for each task) and `balance` (all skills in use)."
            f"{prior if removed.keys() & {'ibp', 'ibp_alpha'} else ''}"
        )
    for name, factor in (("entropy", entropy), ("balance", balance)):
        for problem in () if isinstance(factor, Tensor) else number(name, plain(factor)):
            raise PeftValueError(problem)
    if not isinstance(record, (Mapping, type(None))):
        raise PeftTypeError("`record` must be that of `recorded_routing`, weights by router.")
    terms = []
    for router in adapter_routers(model, poly_adapter(model, adapter_name)):
        weights = _weights(router, (record or {}).get(router))
        total = weights.new_zeros(())
        if entropy:
            total = total + entropy * metrics.entropy(weights).mean()
        if balance:
            total = total + balance * metrics.balance(weights)
        terms.append(total)
    return torch.stack(terms).mean()


def _weights(router: Router, recorded: list[Tensor] | None) -> Tensor:
    """Return the weights that the terms are computed from, `[rows, n_splits, n_skills]`."""
    if recorded:
        return torch.cat([weights.flatten(0, -3) for weights in recorded])
    if isinstance(router, TaskRouter):
        return router.task_weights()
    raise PeftValueError(
        "Routing by input exists only in a forward: pass the weights of `recorded_routing`."
    )
