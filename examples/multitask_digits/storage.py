# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk: save and measure them, read them back in a fresh process, and merge one."""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft import PeftModel

from .base import Base, input_shape, load_folder_model
from .data import Data, load_data
from .methods import Method, all_methods
from .tasks import Task, eight_tasks, late_tasks
from .training import Adapted, predict, predict_tasks

TOLERANCE = 1e-3
LATE = "-late"


def save(adapted: Adapted, folder: Path) -> int:
    """Write an adapted model's adapters and the logits they gave.

    Returns:
        Bytes of the adapters' weights and configs.
    """
    if adapted.method.key == "vblora":
        for config in adapted.model.peft_config.values():
            config.save_only_topk_weights = True  # the compact form; training is over
    adapted.model.save_pretrained(folder)
    save_file(
        {task: logits.contiguous() for task, logits in adapted.logits.items()},
        folder / "logits.safetensors",
    )
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


def agree(label: str, now: dict[str, Tensor], before: dict[str, Tensor]) -> bool:
    """Print the difference of two sets of logits. Return True if they are equal up to rounding."""
    difference = max((now[key] - before[key]).abs().max().item() for key in before)
    changed = sum(int((now[key].argmax(-1) != before[key].argmax(-1)).sum()) for key in before)
    total = sum(len(logits) for logits in before.values())
    predictions = (
        f"all {total:,} predictions the same"
        if not changed
        else f"{changed} of {total:,} predictions DIFFER"
    )
    distance = "bit for bit" if difference == 0 else f"logits within {difference:.0e}"
    print(f"  {label + ':':48s} {predictions}, {distance}", flush=True)
    return not changed and difference < TOLERANCE


def check_in_fresh_process(output: Path, data_folder: Path | None, seed: int) -> bool:
    """Have another process load everything from disk and compare its predictions with the saved
    ones.
    """
    command = [sys.executable, "-m", f"{__package__}.storage", str(output), "--seed", str(seed)]
    command += ["--threads", str(torch.get_num_threads())]
    if data_folder:
        command += ["--data-folder", str(data_folder)]
    return subprocess.run(command, check=False).returncode == 0


def compare(output: Path, data_folder: Path | None, seed: int) -> bool:
    """Predict with the saved adapters, and print the difference from the saved logits."""
    data = load_data(data_folder, input_shape(output / "base", data_folder, 0), seed)
    base, _ = load_folder_model(output / "base", list(data.classes.values()))
    tasks = eight_tasks()
    same = True
    for method in all_methods(base.model, len(tasks)):
        versions = {method.key: tasks}
        if method.mode == "routed":
            versions[method.key + LATE] = tasks + late_tasks()
        for name, served in versions.items():
            folder = output / "adapters" / name
            model = load(method, copy.deepcopy(base.model), folder, served)
            label = method.label + (" with its late tasks" if name.endswith(LATE) else "")
            now = predict_tasks(base, method, model, served, data.test)
            same = agree(label, now, load_file(folder / "logits.safetensors")) and same
    return same


def check_merged(
    base: Base, adapted: Adapted, tasks: Sequence[Task], number: int, data: Data
) -> bool:
    """Merge one task of a routed adapter into plain weights; the result needs no adapter and
    predicts the same.
    """
    task = tasks[number]
    plain = copy.deepcopy(adapted.model).merge_and_unload(task_id=number)
    now = {task.key: predict(base, plain, task, data.test)}
    label = f"{adapted.method.label}, {task.label}, as a plain {type(plain).__name__}"
    return agree(label, now, {task.key: adapted.logits[task.key]}) and not hasattr(
        plain, "peft_config"
    )


def main() -> int:
    """Run in the fresh process."""
    parser = argparse.ArgumentParser(description=compare.__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return 0 if compare(options.output, options.data_folder, options.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
