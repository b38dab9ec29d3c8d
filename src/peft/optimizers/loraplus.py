# SPDX-License-Identifier: Apache-2.0
"""LoRA+: a higher learning rate for the output side of a low-rank product."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..base.errors import PeftValueError
from .groups import ParameterGroup, keep_embedding_state_in_32_bits, trained_parameters


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Make an optimizer in which `B` has `loraplus_lr_ratio` times the rate of `A`.

    `parameter_groups(model, lr, ratios={"B": ratio})` does the same with a group for each role.
    This function is the PEFT interface's form, with its four groups.

    Args:
        model: A model with adapters that have a factor "B": LoRA, or LoKr (the output sides of its
            low-rank factors).
        optimizer_cls: The class of a torch optimizer.
        lr: Rate of everything but `B` and embeddings.
        loraplus_lr_ratio: Ratio of the rates, at least 1; 16 in the paper's recommendation. Its
            authors advise a somewhat smaller `lr` than without it for hard tasks.
        **kwargs: `loraplus_weight_decay` (0 by default) for parameters that it suits,
            `loraplus_lr_embedding` (1e-6 by default) for adapters of embeddings, and options of
            the optimizer.

    Returns:
        The optimizer. Its groups are, in this order: "A" and everything else; "embedding"; "B";
        and, with the rate of "B" and without decay, biases, normalization and DoRA's norms. A group
        may be empty.

    Raises:
        PeftValueError: No trainable parameter has the role "B", or a number is not allowed.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = create_loraplus_optimizer(
        ...     model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16
        ... )
        >>> [(group["name"], len(group["params"]), group["lr"]) for group in optimizer.param_groups]
        [('A', 1, 0.0001), ('embedding', 0, 1e-06), ('B', 1, 0.0016), ('no decay', 0, 0.0016)]

    Source: arXiv:2402.12354
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    lr_embedding = kwargs.pop("loraplus_lr_embedding", 1e-6)
    if loraplus_lr_ratio <= 0:
        raise PeftValueError(
            f"`loraplus_lr_ratio`={loraplus_lr_ratio!r} must be positive, and should be at least 1."
        )
    lr_b = lr * loraplus_lr_ratio
    groups: dict[str, ParameterGroup] = {
        name: {"params": [], "name": name, "lr": rate, "weight_decay": own_decay}
        for name, rate, own_decay in (
            ("A", lr, decay),
            ("embedding", lr_embedding, decay),
            ("B", lr_b, decay),
            ("no decay", lr_b, 0.0),
        )
    }
    roles = set()
    for trained in trained_parameters(model):
        roles.add(trained.role)
        name = trained.role
        if not trained.decays and name != "embedding":
            name = "no decay"
        groups[name if name in groups else "A"]["params"].append(trained.parameter)
    if "B" not in roles:
        raise PeftValueError(
            "No trainable parameter has the role 'B' that LoRA+ is about; there are "
            f"{', '.join(sorted(roles))}."
        )
    optimizer = optimizer_cls(list(groups.values()), **{"lr": lr, **kwargs})
    keep_embedding_state_in_32_bits(model, optimizer_cls)
    return optimizer
