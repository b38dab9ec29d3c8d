# SPDX-License-Identifier: Apache-2.0
"""The methods compared, with equal numbers of parameters over all tasks, and their ways to adapt to
a new task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import LoraConfig, PeftConfig, PolyConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
# Ways to adapt to a new task: fit its routing; train its routing and the skills; average the skills
# into one and train it; train the whole adapter further; train a new one; nothing.
Way = Literal["Z", "full", "mu", "further", "new", "none"]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        key: Short name.
        label: Name in tables and figures.
        mode: "base", "shared" (never told the task), "routed" (told the task) or "per task" (an
            adapter a task).
        config: Its adapter's configuration, None for the frozen base.
        rates: Learning rates by role; "all" for parameters of any role.
        ways: How it adapts to a new task, with the learning rates there.
    """

    key: str
    label: str
    mode: Literal["base", "shared", "routed", "per task"]
    config: PeftConfig | None = None
    rates: dict[str, float] = field(default_factory=dict)
    ways: dict[Way, dict[str, float]] = field(default_factory=dict)


def all_methods(n_tasks: int) -> list[Method]:
    """The methods for so many tasks. A LoRA a task has rank 1; the others have nearly as many
    parameters as all of these together.

    Learning rates were chosen for each method by itself from grids of factors 2 to 3 on seed 100,
    which is not among the study's.
    """

    def poly(**fields: Any) -> PolyConfig:
        return PolyConfig(target_modules=TARGETS, **fields)

    def lora(rank: int) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)

    skills = max(2, round(n_tasks * 0.32))
    several = {"r": 3, "n_skills": skills, "n_tasks": n_tasks}
    heads = {**several, "n_splits": 4, "relaxed_bernoulli": False, "router_granularity": "block"}
    return [
        Method("base", "frozen base", "base", ways={"none": {}}),
        Method(
            "shared",
            f"one shared LoRA, rank {n_tasks}",
            "shared",
            lora(n_tasks),
            {"all": 4e-3},
            {"further": {"all": 1e-3}},
        ),
        Method(
            "own",
            "a LoRA a task, rank 1",
            "per task",
            lora(1),
            {"all": 2.5e-2},
            {"new": {"all": 1e-2}},
        ),
        Method(
            "poly",
            f"Poly, {skills} skills",
            "routed",
            poly(**several),
            {"router": 0.1, "skills": 1e-2},
            {"Z": {"router": 0.1}, "full": {"router": 0.1, "skills": 3e-3}, "mu": {"skills": 3e-3}},
        ),
        Method(
            "mhr",
            f"multi-head routing, {skills} skills, 4 heads",
            "routed",
            poly(**heads),
            {"router": 0.1, "skills": 1e-2},
            {"Z": {"router": 0.3}, "full": {"router": 0.1, "skills": 3e-3}, "mu": {"skills": 3e-3}},
        ),
        Method(
            "mope",
            f"routing by input, {max(2, skills - 1)} skills",
            "shared",
            poly(r=3, n_skills=max(2, skills - 1), poly_type="mope"),
            {"input_router": 1e-2, "skills": 1e-2},
            {"further": {"input_router": 3e-3, "skills": 3e-3}},
        ),
    ]
