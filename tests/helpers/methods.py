# SPDX-License-Identifier: Apache-2.0
"""The table that signs a method up for the contract suite."""

from dataclasses import dataclass, field
from typing import Any

import peft


@dataclass
class Method:
    """How to make and call a method in tests.

    Args:
        config_cls: Its config class.
        fields: A config on layers of sizes that are multiples of 8, random from the start.
        call: Arguments of forward and generate that only this method takes.
        merge: Arguments that merging needs besides.
        no_op: Fields with which a fresh adapter changes nothing, None where there are none.
    """

    config_cls: type
    fields: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict)
    merge: dict[str, Any] = field(default_factory=dict)
    no_op: dict[str, Any] | None = None

    def config(self, **more):
        return self.config_cls(**{**self.fields, **more})


METHODS = {
    "LOHA": Method(
        peft.LoHaConfig, {"r": 2, "alpha": 3, "init_weights": False}, no_op={"init_weights": True}
    ),
    "LOKR": Method(
        peft.LoKrConfig, {"r": 2, "alpha": 3, "init_weights": False}, no_op={"init_weights": True}
    ),
    "LORA": Method(
        peft.LoraConfig,
        {"r": 2, "lora_alpha": 3, "init_lora_weights": False},
        no_op={"init_lora_weights": True},
    ),
    "VBLORA": Method(
        peft.VBLoRAConfig,
        {
            "r": 2,
            "num_vectors": 12,
            "vector_length": 4,
            "init_vector_bank_bound": 1.0,
            "init_logits_std": 1.0,
        },
    ),
    "POLY": Method(
        peft.PolyConfig,
        {"r": 2, "n_tasks": 3, "n_skills": 2, "n_splits": 2, "init_weights": False},
        call={"task_ids": 1},
        merge={"task_id": 1},
        no_op={"init_weights": True},
    ),
}

# Methods whose adapters are made of other adapters; their tests are in `tests/tuners/`.
MADE_OF_OTHERS = ("ROUTED",)
