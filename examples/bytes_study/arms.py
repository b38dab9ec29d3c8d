# SPDX-License-Identifier: Apache-2.0
"""The methods, sizes and training settings that the study compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoKrConfig, LoraConfig, PeftConfig, VBLoRAConfig

TARGETS = ["up", "down"]
LENGTH = 16  # of VB-LoRA's vectors; the base model is 128 wide
BANK_SIZES = [64, 128, 256, 512, 1024]

# VB-LoRA's learning rates. The paper's two are meant for thousands of steps of a large model; here
# are 150 of a small one.
SCHEDULES = {
    "paper": {"bank": 1e-3, "logits": 1e-2},
    "one rate": {"bank": 2e-2, "logits": 2e-2},
    "two rates": {"bank": 2e-2, "logits": 2e-1},
}


@dataclass(frozen=True)
class Arm:
    """One point of the figure.

    Args:
        family: Which of the curves it belongs to.
        size: Where on it: bank size or rank.
        config: Makes the adapter's configuration, given the folder of a shared bank.
        lr: The learning rate.
        rates: Rates by role, in place of those that the papers publish.
        bank: The bank that users share: "trained" on other tasks, "random", or None for one of each
            user's own.
    """

    family: str
    size: int
    config: Callable[[Path | None], PeftConfig]
    lr: float | None = None
    rates: dict[str, float] = field(default_factory=dict)
    bank: str | None = None

    @property
    def label(self) -> str:
        return f"{self.family}, {self.size}"


def vblora(size: int, bank: Path | None = None) -> VBLoRAConfig:
    """Return a VB-LoRA config. Its bank starts larger than by default: the vectors are short."""
    own = (
        {"num_vectors": size, "vector_length": LENGTH, "init_vector_bank_bound": 0.1}
        if bank is None
        else {"bank": str(bank)}
    )
    return VBLoRAConfig(r=4, topk=2, target_modules=TARGETS, save_only_topk_weights=True, **own)


def all_arms() -> list[Arm]:
    """Return arms of LoRA and LoKr by rank, and of VB-LoRA by the bank's size.

    The rates of LoRA, LoKr and "two rates" were chosen on seed 100, which splits the pictures
    differently from the study's seeds.
    """
    arms = [
        Arm("LoRA", r, lambda _, r=r: LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS), 2e-2)
        for r in (1, 2, 4, 8)
    ]
    arms += [
        Arm("LoKr", r, lambda _, r=r: LoKrConfig(r=r, alpha=r, target_modules=TARGETS), 2e-2)
        for r in (1, 2, 4, 8)
    ]
    for name, rates in SCHEDULES.items():
        sizes = BANK_SIZES if name == "two rates" else BANK_SIZES[::2]
        arms += [
            Arm(f"VB-LoRA, own bank, {name}", h, lambda _, h=h: vblora(h), rates=rates)
            for h in sizes
        ]
    logits = {"logits": SCHEDULES["two rates"]["logits"]}
    for bank in ("trained", "random"):
        sizes = BANK_SIZES if bank == "trained" else BANK_SIZES[::2]
        arms += [
            Arm(
                f"VB-LoRA, shared {bank} bank",
                h,
                lambda b, h=h: vblora(h, b),
                rates=logits,
                bank=bank,
            )
            for h in sizes
        ]
    return arms
