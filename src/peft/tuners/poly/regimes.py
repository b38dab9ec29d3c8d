# SPDX-License-Identifier: Apache-2.0
"""The ways to adapt to new tasks that the multi-head routing paper compares, by name, with its
hyper-parameters.
"""

from __future__ import annotations

from typing import NamedTuple

from ...base.errors import PeftValueError
from ...config import choice


class Regime(NamedTuple):
    """A way to adapt.

    Attributes:
        name: As the papers' code has it.
        description: What it does.
        routing: Whether the new tasks' routing trains.
        skills: Whether skills train.
        needs_tasks: Whether the adapter keeps its tasks, so that the new ones have to be named.
        rates: The paper's learning rates by role, as `peft.optimizers.create_optimizer` uses them
            too.

    Source: arXiv:2211.03831, sections 3.3 and 4
    """

    name: str
    description: str
    routing: bool
    skills: bool
    needs_tasks: bool
    rates: dict[str, float]


_ROUTER, _SKILLS = {"router": 0.1}, {"skills": 1e-3}

REGIMES = {
    regime.name: regime
    for regime in (
        Regime(
            "Z",
            "Only the new tasks' routing trains; skills are shared with the others as they are.",
            True,
            False,
            True,
            _ROUTER,
        ),
        Regime(
            "full",
            "The new tasks' routing and all skills train.",
            True,
            True,
            True,
            {**_ROUTER, **_SKILLS},
        ),
        Regime(
            "mu-Z",
            "The new tasks mix all skills equally, and the skills train.",
            False,
            True,
            True,
            _SKILLS,
        ),
        Regime(
            "mu",
            "The skills are averaged into one, which trains: an adapter like LoRA.",
            False,
            True,
            False,
            _SKILLS,
        ),
        Regime(
            "random",
            "As full, from new random skills: what training on many tasks was worth.",
            True,
            True,
            True,
            {**_ROUTER, **_SKILLS},
        ),
        Regime(
            "shared",
            "One new adapter of one skill for all, with as many parameters.",
            False,
            True,
            False,
            _SKILLS,
        ),
    )
}


def regime_named(name: str) -> Regime:
    """The regime of a name, in which "μ" may stand for "mu".

    Raises:
        PeftValueError: There is none.
    """
    plain = name.replace("μ", "mu").replace("µ", "mu") if isinstance(name, str) else name
    if not isinstance(plain, str) or plain not in REGIMES:
        raise PeftValueError(" ".join(choice("regime", name, REGIMES)))
    return REGIMES[plain]
