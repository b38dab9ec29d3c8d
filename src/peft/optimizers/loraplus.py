# SPDX-License-Identifier: Apache-2.0
"""LoRA+: the output side of a low-rank product learns faster than its input side."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..base.errors import PeftValueError
from .groups import keep_embeddings_wide, trained_parameters


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimiser in which `B` has `loraplus_lr_ratio` times the rate of `A`.

    `parameter_groups(model, lr, ratios={"B": ratio})` does the same with a group for each role;
    this is the interface's own form of it, with its four groups.

    Args:
        model: A model with adapters that have a factor "B": LoRA, or LoKr (the output sides of its
            low-rank halves).
        optimizer_cls: Any torch optimiser.
        lr: The rate of everything else.
        loraplus_lr_ratio: At least 1; the paper finds 16 to suit many tasks, with a somewhat
            smaller `lr` than is usual.
        **kwargs: `loraplus_weight_decay` (0 by default) for parameters that it suits,
            `loraplus_lr_embedding` (1e-6 by default) for adapters of embeddings, and options for
            the optimiser.

    Returns:
        The optimiser. Its groups are, in this order, "A" and everything else, "embedding", "B", and
        (with the rate of "B") biases, normalisation and lengths of DoRA, which do not decay. A
        group may be empty.

    Raises:
        PeftValueError: No trainable parameter has the role "B", or a number is not allowed.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimiser = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
        >>> [(group["name"], len(group["params"]), group["lr"]) for group in optimiser.param_groups]
        [('A', 1, 0.0001), ('embedding', 0, 1e-06), ('B', 1, 0.0016), ('no decay', 0, 0.0016)]

    Source: arXiv:2402.12354
    """
    decay, lr_embedding = (
        kwargs.pop("loraplus_weight_decay", 0.0),
        kwargs.pop("loraplus_lr_embedding", 1e-6),
    )
    if loraplus_lr_ratio <= 0:
        raise PeftValueError(
            f"`loraplus_lr_ratio`={loraplus_lr_ratio!r} must be positive, and should be at least 1."
        )
    groups: dict[str, dict[str, Any]] = {
        "A": {"params": [], "name": "A", "lr": lr, "weight_decay": decay},
        "embedding": {"params": [], "name": "embedding", "lr": lr_embedding, "weight_decay": decay},
        "B": {"params": [], "name": "B", "lr": lr * loraplus_lr_ratio, "weight_decay": decay},
        "no decay": {
            "params": [],
            "name": "no decay",
            "lr": lr * loraplus_lr_ratio,
            "weight_decay": 0.0,
        },
    }
    roles = set()
    for trained in trained_parameters(model):
        roles.add(trained.role)
        name = (
            trained.role
            if trained.role == "embedding"
            else "no decay"
            if not trained.decays
            else trained.role
        )
        groups[name if name in groups else "A"]["params"].append(trained.parameter)
    if "B" not in roles:
        raise PeftValueError(
            "No trainable parameter has the role 'B' that LoRA+ is about; there are "
            f"{', '.join(sorted(roles))}."
        )
    given: dict[str, Any] = {"lr": lr, **kwargs}
    optimiser = optimizer_cls(list(groups.values()), **given)
    keep_embeddings_wide(model, optimizer_cls)
    return optimiser
