# SPDX-License-Identifier: Apache-2.0
"""Facts that a method states about itself: the cost of an adapter on a layer, from shapes alone,
and the roles of its parameters. `peft.optimizers` gives each role a learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..base.geometry import Geometry


class AdapterCost(NamedTuple):
    """An adapter's cost on a layer.

    Attributes:
        multiplications: For each row of the layer's input, or position of its output, in addition
            to the layer's own.
        rank: The largest rank its delta can have.
        remarks: Sentences on settings that may be mistakes.
    """

    multiplications: int
    rank: int
    remarks: tuple[str, ...] = ()


def low_rank_cost(size: Geometry, r: int) -> AdapterCost:
    """Return the cost of factors `[out, r]` and `[r, in · taps]`.

    Example:
        >>> low_rank_cost(Geometry(8, 4), 2)
        AdapterCost(multiplications=24, rank=2, remarks=())
    """
    most = min(size.out_features, size.columns)
    remark = f"`r`={r} is above the weight's own rank, {most}." if r > most else None
    return AdapterCost(
        r * (size.out_features + size.columns), min(r, most), (remark,) if remark else ()
    )


class Role(NamedTuple):
    """A role of some of a method's parameters, with its settings.

    Args:
        parameters: Containers of these parameters, `"vblora_logits_A"`; a single parameter of the
            modules in a container is named behind it, `"poly_router.module_logits"`.
        lr: Learning rate of the papers, or of this package where they have none; None for that of
            the other parameters.
        decays: False for parameters without weight decay.
    """

    parameters: tuple[str, ...]
    lr: float | None = None
    decays: bool = True


def role_of(roles: Mapping[str, Role], container: str, inner: str = "") -> str | None:
    """Return the name of a parameter's role, None if the method does not declare it.

    Args:
        roles: A method's roles.
        container: The container that the parameter is in.
        inner: Its name inside the container's entry, if that is a module.

    Example:
        >>> roles = {
        ...     "router": Role(("poly_router.module_logits",), lr=0.1),
        ...     "skills": Role(("poly_lora_A", "poly_lora_B")),
        ... }
        >>> role_of(roles, "poly_router", "module_logits"), role_of(roles, "poly_lora_B")
        ('router', 'skills')
    """
    for wanted in (f"{container}.{inner}", container):
        for name, role in roles.items():
            if wanted in role.parameters:
                return name
    return None
