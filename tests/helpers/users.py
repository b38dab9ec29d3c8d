# SPDX-License-Identifier: Apache-2.0
"""Users' compact adapters over a shared vector bank."""

import torch
from helpers.models import TARGETS, mlp

from peft import VBLoRAConfig, get_peft_model

USERS = ("ada", "ben", "cai", "dora")


def save_user(folder, bank, root, seed=100):
    """Save a compact adapter over the bank of `root`, named by a path relative to it."""
    torch.manual_seed(seed)
    config = VBLoRAConfig(
        bank=str(root / bank),
        r=2,
        topk=2,
        init_logits_std=1.0,
        target_modules=TARGETS,
        save_only_topk_weights=True,
    )
    model = get_peft_model(mlp(), config)
    model.peft_config["default"].bank = bank
    model.save_pretrained(folder)
