# SPDX-License-Identifier: Apache-2.0
"""Arms of studies 2 and 3: adapters from a hundred bytes to a megabyte for one task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PolyConfig, VBLoRAConfig

LENGTH = 96
"""Numbers in a vector of VB-LoRA."""

SOURCE_SKILLS, SOURCE_RANK = 6, 4
"""The Poly adapter that is trained on the source tasks and shared by all users."""

EVERY = r"layers\.\d+\.(attention\.self\.(query|key|value)|.*dense)"
ATTENTION = r"layers\.\d+\.attention\.self\.(query|value)"
ONE = r"layers\.1\.attention\.self\.value"

PLACES = {"every": EVERY, "attention": ATTENTION, "one": ONE}
"""The adapted layers: all twelve linear layers, four, or one."""


@dataclass(frozen=True)
class Arm:
    """A point of the figure.

    Args:
        family: The curve that it belongs to.
        label: Its settings, in words.
        rates: Rates of the search. The first and last are tried where their neighbor is the best.
        config: Makes the config, given the folder of the shared parts; None where no adapter of one
            config is trained.
    """

    family: str
    label: str
    rates: tuple[Mapping[str, float], ...]
    config: Callable[[Path], PeftConfig] | None = None

    @property
    def name(self) -> str:
        """Family and settings."""
        return f"{self.family}, {self.label}" if self.label else self.family


def _rates(*values: float, **factors: float) -> tuple[dict[str, float], ...]:
    """Return rates for all parameters, or for each role a multiple of each value: the values, and
    one before and one after them in the same ratio.
    """
    roles = factors or {"all": 1.0}
    series = (values[0] ** 2 / values[1], *values, values[-1] ** 2 / values[-2])
    return tuple({role: value * factor for role, factor in roles.items()} for value in series)


def _vblora(place: str, rank: int, bank: str | int, folder: Path) -> VBLoRAConfig:
    own: dict[str, Any] = (
        {"num_vectors": bank, "vector_length": LENGTH, "init_vector_bank_bound": 0.1}
        if isinstance(bank, int)
        else {"bank": str(folder / bank)}
    )
    return VBLoRAConfig(
        r=rank, topk=2, target_modules=PLACES[place], save_only_topk_weights=True,
        topk_weights_dtype="float16", **own,
    )  # fmt: skip


def own_bank(size: int) -> VBLoRAConfig:
    """Return the config of an adapter that trains a bank for others."""
    config = _vblora("every", 4, size, Path())
    config.save_only_topk_weights = False
    return config


def source_poly(n_tasks: int) -> PolyConfig:
    """Return the config of the Poly adapter of the source tasks."""
    return PolyConfig(r=SOURCE_RANK, n_skills=SOURCE_SKILLS, n_tasks=n_tasks, target_modules=EVERY)


def arms() -> dict[str, Arm]:
    """Return all arms by name."""
    found = [
        Arm("frozen model", "", ()),
        Arm("full training of the layers", "", _rates(5e-5, 2e-4, 6e-4)),
        Arm("biases", "", _rates(1e-3, 5e-3, 2e-2)),
        Arm("classifier", "", _rates(3e-3, 3e-2, 3e-1)),
        Arm("row of a shared Poly adapter", "", _rates(3e-2, 1e-1, 3e-1)),
        Arm("weights of shared LoRA adapters", "", _rates(3e-2, 1e-1, 3e-1)),
    ]
    for place, ranks in (("one", (1,)), ("attention", (1, 4)), ("every", (1, 4, 16, 32))):
        for r in ranks:
            found.append(
                Arm("LoRA", f"rank {r}, {place}", _rates(1e-3, 4e-3, 1.6e-2),
                    lambda _, r=r, p=place: LoraConfig(r=r, lora_alpha=r, target_modules=PLACES[p]))
            )  # fmt: skip
    for factor in (4, 8, 16):
        found.append(
            Arm("LoKr, full matrix", f"factor {factor}", _rates(1e-3, 4e-3, 1.6e-2),
                lambda _, f=factor: LoKrConfig(
                    full_matrix=True, decompose_factor=f, target_modules=EVERY))
        )  # fmt: skip
    for place, r in (("one", 1), ("attention", 1), ("every", 1), ("every", 8)):
        found.append(
            Arm("LoKr, low rank", f"rank {r}, {place}", _rates(1e-3, 4e-3, 1.6e-2),
                lambda _, r=r, p=place: LoKrConfig(r=r, alpha=r, target_modules=PLACES[p]))
        )  # fmt: skip
    found.append(
        Arm("LoHa", "rank 2, every", _rates(1e-3, 4e-3, 1.6e-2),
            lambda _: LoHaConfig(r=2, alpha=2, target_modules=PLACES["every"]))
    )  # fmt: skip
    both = _rates(2e-3, 1e-2, 5e-2, bank=1.0, logits=10.0)
    for r, size in ((1, 32), (4, 64), (4, 256)):
        found.append(
            Arm("VB-LoRA, own bank", f"rank {r}, {size} vectors", both,
                lambda f, r=r, h=size: _vblora("every", r, h, f))
        )  # fmt: skip
    for bank, place, r in (
        ("trained", "one", 1), ("trained", "attention", 1), ("trained", "every", 1),
        ("trained", "every", 4), ("random", "every", 1), ("random", "every", 4),
    ):  # fmt: skip
        found.append(
            Arm(f"VB-LoRA, shared {bank} bank", f"rank {r}, {place}",
                _rates(2e-2, 1e-1, 5e-1, logits=1.0),
                lambda f, r=r, p=place, b=bank: _vblora(p, r, b, f))
        )  # fmt: skip
    return {arm.name: arm for arm in found}
