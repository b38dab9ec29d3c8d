# SPDX-License-Identifier: Apache-2.0
"""The adapters of the library: one a view, each trained by itself, with methods by turns."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from examples.multitask_digits.base import Base
from examples.multitask_digits.data import Data, Images
from examples.multitask_digits.methods import target_names, tile_length
from examples.multitask_digits.training import accuracy, fit, predict, progress, task_inputs

from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VBLoRAConfig,
    get_peft_model,
)

from .views import View

METHODS = ("LoRA", "LoKr", "VB-LoRA", "LoHa")


def config_of(method: str, base: Base) -> tuple[PeftConfig, dict[str, float]]:
    """Return an adapter's config, and its learning rates by a fragment of a parameter's name."""
    targets = target_names(base.model)
    if method == "LoRA":
        return LoraConfig(r=4, lora_alpha=4, target_modules=targets), {"lora_": 1e-2}
    if method == "LoKr":
        return LoKrConfig(r=8, alpha=8, target_modules=targets), {"lokr": 2e-2}
    if method == "LoHa":
        return LoHaConfig(r=4, alpha=4, target_modules=targets), {"hada": 2e-2}
    bank = VBLoRAConfig(
        r=4,
        num_vectors=90,
        vector_length=tile_length(base.model, targets),
        topk=2,
        init_vector_bank_bound=0.1,
        target_modules=targets,
    )
    return bank, {"vblora_logits": 2e-1, "vblora_vector_bank": 2e-2}


def train_members(
    base: Base, views: Sequence[View], data: Data, epochs: int, seed: int, folder: Path
) -> dict[str, tuple[str, float]]:
    """Train an adapter for each view on a copy of the base, and save each in a folder of its own.

    Returns:
        The method and the accuracy on held-out pictures, by the view's name.
    """
    result = {}
    rows = 32
    steps = epochs * -(-len(data.adapt) // rows)
    with progress("training adapters", steps * len(views)) as bar:
        for number, view in enumerate(views):
            torch.manual_seed(seed + number)
            method = METHODS[number % len(METHODS)]
            config, rates = config_of(method, base)
            model = get_peft_model(copy.deepcopy(base.model), config)
            generator = torch.Generator().manual_seed(seed + number)
            fit(model, rates, steps, task_inputs(base, view, data.adapt, rows, generator), bar)
            model.save_pretrained(folder / view.key)
            result[view.key] = method, accuracy(predict(base, model, view, data.test), data.test)
    return result


def train_lora(base: Base, view: View, images: Images, steps: int, seed: int) -> PeftModel:
    """Train a LoRA adapter on a few pictures of a view, for comparison."""
    torch.manual_seed(seed)
    config, rates = config_of("LoRA", base)
    model = get_peft_model(copy.deepcopy(base.model), config)
    generator = torch.Generator().manual_seed(seed)
    with progress(f"a new LoRA for {view.key}", steps) as bar:
        fit(model, rates, steps, task_inputs(base, view, images, len(images), generator), bar)
    return model
