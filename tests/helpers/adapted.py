# SPDX-License-Identifier: Apache-2.0
"""A small model with an adapter of random values."""

import torch

from peft import LoraConfig, get_peft_model

from .models import TARGETS, mlp


def base():
    torch.manual_seed(0)
    return mlp()


def adapted(config=None, name="default", seed=1):
    """A model with an adapter of random values."""
    model = get_peft_model(base(), config or LoraConfig(r=2, target_modules=TARGETS), name)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model.eval()
