# SPDX-License-Identifier: Apache-2.0
"""What is compared: for each method its adapter's configuration and its learning rates.

Three ways of serving many tasks appear:

- ``shared``: one adapter for all tasks, which is never told the task (the yardstick);
- ``routed``: one adapter that holds skills, mixed for each sample by its task (Poly, multi-head
  Poly);
- ``per task``: one small adapter a task, switched with ``set_adapter`` (LoRA, VB-LoRA, LoKr know no
  tasks).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from peft import LoKrConfig, LoraConfig, PeftConfig, PolyConfig, VBLoRAConfig

RANK = 4
SKILLS = 4
SPLITS = 4

Mode = Literal["shared", "routed", "per task"]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        key: Name of its folder.
        label: Name in the table and the figures.
        mode: How it serves many tasks; see the module's docstring.
        config: Makes the adapter's configuration.
        rates: Learning rate by a fragment of the parameter's name.
    """

    key: str
    label: str
    mode: Mode
    config: Callable[[], PeftConfig]
    rates: dict[str, float]


def target_names(model: nn.Module) -> list[str]:
    """Return the last names of all linear layers except the head: for a ViT ``q_proj, k_proj,
    v_proj, o_proj, fc1, fc2``.

    Raises:
        ValueError: There are none.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "classifier" not in name
    ]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no linear layers besides its head; Poly and VB-LoRA need "
            "some to adapt."
        )
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def tile_length(model: nn.Module, targets: list[str]) -> int:
    """Return the ``vector_length``: a quarter of the largest divisor of all targets' sides."""
    layers = [
        module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in targets
    ]
    whole = math.gcd(
        *(side for layer in layers for side in (layer.in_features, layer.out_features))
    )
    return whole // math.gcd(4, whole)


def all_methods(model: nn.Module, n_tasks: int) -> list[Method]:
    """Return the six trained methods, for the linear layers of ``model``; the head stays as it is.

    The shared adapter is a LoRA (Poly with one task and one skill) of rank ``RANK * SKILLS``: as
    many parameters as Poly's inventory, so that a difference between the two is not one of size. A
    LoRA a task is the baseline that needs no sharing: each has the rank of one skill, so the eight
    together have twice as many parameters as Poly's four skills. As their authors do, Poly's router
    learns faster than its skills (arXiv:2202.13914) and VB-LoRA's logits ten times as fast as its
    bank (arXiv:2405.15179). The rates suit the small default model; they were chosen on seeds 1 and
    2, which split the pictures differently from the default seed 0.
    """
    targets = target_names(model)
    length = tile_length(model, targets)

    def poly(tasks: int, skills: int, splits: int, rank: int) -> Callable[[], PeftConfig]:
        return lambda: PolyConfig(
            r=rank, n_tasks=tasks, n_skills=skills, n_splits=splits, target_modules=targets
        )

    def lora() -> PeftConfig:
        return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)

    def vblora() -> PeftConfig:
        # The bank starts larger than by default: with vectors this short, tasks far from upright
        # are learned late otherwise.
        return VBLoRAConfig(
            r=RANK,
            num_vectors=90,
            vector_length=length,
            topk=2,
            init_vector_bank_bound=0.1,
            target_modules=targets,
        )

    def lokr() -> PeftConfig:
        return LoKrConfig(r=8, alpha=8, target_modules=targets)

    skills = {"poly_router": 2e-1, "poly_lora": 2e-2}
    return [
        Method(
            "shared",
            f"one shared LoRA, r={RANK * SKILLS}",
            "shared",
            poly(1, 1, 1, RANK * SKILLS),
            skills,
        ),
        Method("poly", "Poly", "routed", poly(n_tasks, SKILLS, 1, RANK), skills),
        Method("mhr", "multi-head Poly", "routed", poly(n_tasks, SKILLS, SPLITS, RANK), skills),
        Method("lora", f"a LoRA a task, r={RANK}", "per task", lora, {"lora_": 1e-2}),
        Method(
            "vblora",
            "VB-LoRA",
            "per task",
            vblora,
            {"vblora_logits": 2e-1, "vblora_vector_bank": 2e-2},
        ),
        Method("lokr", "LoKr", "per task", lokr, {"lokr": 2e-2}),
    ]
