# SPDX-License-Identifier: Apache-2.0
"""The regimes in which the multi-head routing paper adapts to new tasks, by name."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from ...base.errors import PeftValueError
from ...base.validation import choice
from .adapter import PolyAdapter, Tasks
from .config import single_skill
from .extraction import average_skills
from .fewshot import train_only


class Regime(NamedTuple):
    """A regime.

    Attributes:
        name: Its name in the paper's code.
        description: The parameters that train, and their initial values.
        needs_tasks: True if `begin_regime` takes the new tasks.
        rates: The paper's learning rates by role; `peft.optimizers.create_optimizer` uses them too.

    Source: arXiv:2211.03831, sections 3.3 and 4
    """

    name: str
    description: str
    needs_tasks: bool
    rates: dict[str, float]

    @property
    def routing(self) -> bool:
        """True if the new tasks' routing trains."""
        return "router" in self.rates

    @property
    def skills(self) -> bool:
        """True if skills train."""
        return "skills" in self.rates


_ROUTER, _SKILLS = {"router": 0.1}, {"skills": 1e-3}
_ALL = (
    Regime("Z", "The new tasks' routing trains; all tasks share the old skills.", True, _ROUTER),
    Regime("full", "The new tasks' routing and all skills train.", True, _ROUTER | _SKILLS),
    Regime("mu-Z", "The new tasks mix all skills equally; the skills train.", True, _SKILLS),
    Regime("mu", "The skills are averaged into one, which trains, as in LoRA.", False, _SKILLS),
    Regime("random", "As full, but from new random skills.", True, _ROUTER | _SKILLS),
    Regime("shared", "One new adapter of one skill for all, equally large.", False, _SKILLS),
)
REGIMES = {regime.name: regime for regime in _ALL}


def begin_regime(
    adapter: PolyAdapter, regime: str, tasks: Tasks | None = None, new_adapter: str | None = None
) -> Regime:
    """Prepare an adapter for a regime; `PolyModel.begin_regime` documents the arguments."""
    chosen = _regime_named(regime)
    if chosen.needs_tasks and tasks is None:
        raise PeftValueError(
            f"Regime {chosen.name!r} takes the new tasks: pass `tasks=`, by id or name, of the "
            f"adapter's {adapter.config.n_tasks}; `add_tasks` adds new ones."
        )
    if tasks is not None and not chosen.needs_tasks:
        raise PeftValueError(
            f"Regime {chosen.name!r} takes no tasks: it makes an adapter with one task. Leave out "
            f"`tasks`={tasks!r}."
        )
    if chosen.needs_tasks and chosen.name != "random" and new_adapter is not None:
        raise PeftValueError(
            f"Regime {chosen.name!r} makes no adapter: leave out `new_adapter`={new_adapter!r}."
        )
    numbers = None if tasks is None else adapter.task_numbers(tasks)
    if chosen.name in ("mu", "shared", "random"):
        new_name = new_adapter or f"{adapter.name}_{chosen.name}"
        _add_adapter(adapter, chosen.name, new_name)
        adapter.tuner.set_adapter(new_name)
        adapter = PolyAdapter.of(adapter.tuner, new_name)
    elif chosen.name == "mu-Z":
        adapter.check_unsharded("begin a regime")
        with torch.no_grad():
            for router in adapter.task_routers().values():
                router.module_logits[numbers or []] = 0  # equal weights
    train_only(adapter, skills=chosen.skills, tasks=numbers if chosen.routing else None)
    if chosen.name == "mu-Z":
        _fix_routing(adapter)
    return chosen


def _regime_named(name: str) -> Regime:
    """Return the regime of a name; "μ" may stand for "mu"."""
    spelled = name.replace("μ", "mu").replace("µ", "mu") if isinstance(name, str) else name
    if not isinstance(spelled, str) or spelled not in REGIMES:
        raise PeftValueError(" ".join(choice("regime", name, REGIMES)))
    return REGIMES[spelled]


def _add_adapter(adapter: PolyAdapter, regime: str, new_name: str) -> None:
    """Add the new adapter of regime "mu", "shared" or "random"."""
    if regime == "mu":
        average_skills(adapter, new_name)
        return
    config, n_skills = adapter.config, adapter.config.n_skills
    if regime == "shared":
        config = single_skill(config, lambda r: r * n_skills)
    adapter.tuner.add_adapter(new_name, replace(config, inference_mode=False))


def _fix_routing(adapter: PolyAdapter) -> None:
    """Use the present weights in training too: no sampling, no dropout, no gradient."""
    for router in adapter.task_routers().values():
        router.fixed, router.gating = True, router.gating._replace(relaxed=False, dropout=0.0)
    adapter.config.routing = "fixed"
