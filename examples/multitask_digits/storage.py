# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk: save them, weigh them, and read them back in a fresh process."""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft import PeftModel

from .base import Base, input_shape, load_folder_model
from .data import load_data
from .methods import Method, all_methods
from .tasks import Task, eight_tasks
from .training import Adapted, predict_tasks


def save(adapted: Adapted, folder: Path) -> int:
    """Write an adapted model's adapters and the logits they gave.

    Returns:
        Bytes of the adapters' weights and configs.
    """
    for config in adapted.model.peft_config.values():
        if adapted.method.key == "vblora":
            config.save_only_topk_weights = True  # the compact form; training is over
    adapted.model.save_pretrained(folder)
    save_file({task: logits.contiguous() for task, logits in adapted.logits.items()}, folder / "logits.safetensors")
    return sum(file.stat().st_size for file in folder.rglob("adapter_*") if file.is_file())


def load(method: Method, base_model: nn.Module, folder: Path, tasks: Sequence[Task]) -> PeftModel:
    """Put the saved adapters of a method into a base model."""
    if method.mode != "per task":
        return PeftModel.from_pretrained(base_model, folder)
    first, *others = [task.key for task in tasks]
    model = PeftModel.from_pretrained(base_model, folder / first, adapter_name=first)
    for name in others:
        model.load_adapter(folder / name, name)
    return model


def check_in_fresh_process(output: Path, data_folder: Path | None, seed: int) -> bool:
    """Have another process load everything from disk and compare its predictions with the saved ones."""
    command = [sys.executable, "-m", "examples.multitask_digits.storage", str(output), "--seed", str(seed)]
    if data_folder:
        command += ["--data-folder", str(data_folder)]
    return subprocess.run(command, check=False).returncode == 0


def compare(output: Path, data_folder: Path | None, seed: int) -> bool:
    """Predict with what is on disk; say by how much the logits differ from the saved ones."""
    shape = input_shape(output / "base", data_folder, 0)
    data = load_data(data_folder, shape, seed)
    base, _ = load_folder_model(output / "base", data.classes)
    tasks = eight_tasks()
    same = True
    for method in all_methods(base.model, len(tasks)):
        folder = output / "adapters" / method.key
        saved = load_file(folder / "logits.safetensors")
        model = load(method, copy.deepcopy(base.model), folder, tasks)
        again = predict_tasks(Base(base.model, base.mean, base.std), method, model, tasks, data.test)
        difference = max((again[key] - saved[key]).abs().max().item() for key in saved)
        equal = all((again[key].argmax(-1) == saved[key].argmax(-1)).all() for key in saved)
        same = same and bool(equal)
        print(f"  {method.label:24s} predictions {'equal' if equal else 'DIFFER'}, largest logit difference {difference:.1e}")
    return same


def main() -> int:
    """The fresh process."""
    parser = argparse.ArgumentParser(description=compare.__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    return 0 if compare(options.output, options.data_folder, options.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
