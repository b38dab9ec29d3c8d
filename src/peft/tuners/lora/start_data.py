# SPDX-License-Identifier: Apache-2.0
"""The layers that a start from data is for, and files of what was collected from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...base.errors import PeftTypeError, PeftValueError
from ...checkpoint.files import read_weights, write_file
from ...core import plan as _plan
from ...core.base_layer import innermost, is_linear
from ...core.tuner import BaseTuner
from .config import LoraConfig
from .model import LoraModel


def linear_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Return the linear layers that `get_peft_model` would adapt, by path; raise as it does."""
    plain = replace(
        config, init_lora_weights=True, corda_config=None, lora_ga_config=None
    ).for_adapter()
    tuner: BaseTuner[LoraConfig] = LoraModel(model, None)
    plan = _plan.make(tuner, "default", plain, is_new=False)
    layers = {path: innermost(module) for path, module in plan.targets.items() if is_linear(module)}
    if not layers:
        raise PeftValueError(
            "No supported layers: `init_lora_weights`="
            f"{config.init_lora_weights!r} is for linear layers, and the targets are none."
        )
    return layers


def check_config(config: object) -> None:
    """Check that a config is one of LoRA."""
    if not isinstance(config, LoraConfig):
        raise PeftTypeError(f"`lora_config` must be a LoraConfig, got {type(config).__name__}.")


def read_cache(file: str | os.PathLike[str] | None) -> dict[str, Tensor] | None:
    """Return the tensors of a file that exists and is not empty, else None."""
    if file is None or not Path(file).exists() or not Path(file).stat().st_size:
        return None
    return read_weights(Path(file))


def write_cache(file: str | os.PathLike[str], state: Mapping[str, Tensor]) -> None:
    """Write tensors to a file as `torch.save` does, in one step; its folder is made if missing."""
    write_file(Path(file), lambda temporary: torch.save(dict(state), temporary))
