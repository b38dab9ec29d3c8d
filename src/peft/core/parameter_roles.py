# SPDX-License-Identifier: Apache-2.0
"""What a method's parameters are for: by their roles an optimiser gives them rates of their own
(`peft.optimizers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Role(NamedTuple):
    """A role that some of a method's parameters play, and how the method's papers train them.

    Args:
        parameters: Containers by adapter name whose parameters play it, `"vblora_logits_A"`; a
            single parameter of the modules in a container is named behind it,
            `"poly_router.module_logits"`.
        lr: The papers' learning rate, None where they have none of its own for this role.
        decays: Whether weight decay suits them.
    """

    parameters: tuple[str, ...]
    lr: float | None = None
    decays: bool = True


def role_of(roles: Mapping[str, Role], holder: str, inner: str = "") -> str | None:
    """The name of the role that a parameter plays, None if the method does not say.

    Args:
        roles: A method's roles.
        holder: The container the parameter is in.
        inner: Its name inside the container's entry, where that is a module.

    Example:
        >>> roles = {"router": Role(("poly_router.module_logits",), lr=0.1), "skills": Role(("poly_lora_A", "poly_lora_B"))}
        >>> role_of(roles, "poly_router", "module_logits"), role_of(roles, "poly_lora_B")
        ('router', 'skills')
    """
    for wanted in (f"{holder}.{inner}", holder):
        for name, role in roles.items():
            if wanted in role.parameters:
                return name
    return None
