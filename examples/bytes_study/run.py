# SPDX-License-Identifier: Apache-2.0
"""The study: for each of five seeds a base model, a bank trained on some tasks, and users of other
tasks, each with an adapter of every kind.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import nn

from peft import PeftModel, VectorBank, get_peft_model
from peft.optimizers import parameter_groups

from ..multitask_digits.data import Data, Images, Shape, load_data
from ..multitask_digits.tasks import Task, eight_tasks, late_tasks
from . import report
from .arms import LENGTH, SCHEDULES, Arm, all_arms, vblora
from .base import Net, accuracy, batches, fit, make_base

TASKS = {task.key: task for task in eight_tasks() + late_tasks()}
PROVIDERS = ["rot270", "rot180", "rot0-inv", "rot90-inv"]  # the shared bank is trained on these
USERS = ["rot90", "rot180-inv"]  # and used for these


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.bytes_study",
        description="Measure accuracy against stored bytes: VB-LoRA (own or shared bank), LoRA and "
        "LoKr on rotated and inverted digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--seeds",
        type=int,
        default=5,
        help="number of seeds; each one splits the pictures and trains all models again",
    )
    add("--steps", type=int, default=150, help="training steps of each adapter, 32 pictures a step")
    add("--base-steps", type=int, default=600, help="training steps of the base model")
    add("--examples", type=int, default=240, help="labeled pictures of each user")
    add("--every", type=int, default=1, help="measure every n-th adapter only, for a short run")
    add(
        "--output",
        type=Path,
        default=Path("bytes_study_output"),
        help="folder for the table, figures and adapters",
    )
    add(
        "--draw",
        action="store_true",
        help="only write the table and figures again, from the results in --output",
    )
    return parser.parse_args(arguments)


def seen(task: Task, images: Images) -> Images:
    """Return images transformed by a task."""
    return Images(task(images.pixels), images.labels)


def adapt(net: Net, config: Any, arm: Arm, images: Images, steps: int, seed: int) -> PeftModel:
    """Return a copy of the base with an adapter trained on images."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(net), config)
    fit(
        model,
        parameter_groups(model, arm.lr, rates=arm.rates),
        batches(images, 32, torch.Generator().manual_seed(seed)),
        steps,
    )
    return model


def make_bank(
    kind: str, size: int, net: Net, data: Data, options: argparse.Namespace, seed: int, folder: Path
) -> Path:
    """Write a bank to a folder: random, or trained by one adapter on the providers' pictures."""
    place = folder / f"{kind} bank {size}"
    if place.exists():
        return place
    torch.manual_seed(1000 + seed)
    if kind == "random":
        # Uniform vectors of the size that training gives them.
        bank = VectorBank(nn.init.uniform_(torch.empty(size, LENGTH), -0.5, 0.5))
    else:
        views = [seen(TASKS[key], data.adapt) for key in PROVIDERS]
        images = Images(torch.cat([v.pixels for v in views]), torch.cat([v.labels for v in views]))
        arm = Arm("providers", size, lambda _: vblora(size), rates=SCHEDULES["two rates"])
        bank = VectorBank.of(adapt(net, vblora(size), arm, images, 2 * options.steps, seed))
    bank.save_pretrained(place)
    return place


def one(
    arm: Arm, key: str, net: Net, data: Data, options: argparse.Namespace, seed: int, folder: Path
) -> dict[str, Any]:
    """Adapt to a user's task, save and reload the adapter, and test the reloaded one."""
    start = process_time()
    bank = make_bank(arm.bank, arm.size, net, data, options, seed, folder) if arm.bank else None
    begin = process_time()
    generator = torch.Generator().manual_seed(seed)
    images = data.adapt.take(
        torch.randperm(len(data.adapt), generator=generator)[: options.examples]
    )
    model = adapt(net, arm.config(bank), arm, seen(TASKS[key], images), options.steps, seed)
    trained, place = process_time() - begin, folder / "user"
    trainable = model.get_nb_trainable_parameters()[0]
    model.save_pretrained(place)
    file = place / "adapter_model.safetensors"
    loaded = PeftModel.from_pretrained(copy.deepcopy(net), place)
    test = seen(TASKS[key], data.test)
    return {
        "family": arm.family,
        "size": arm.size,
        "seed": seed,
        "task": key,
        "accuracy": accuracy(loaded, test),
        "tensor_bytes": tensor_bytes(file),
        "file_bytes": file.stat().st_size,
        "trainable": trainable,
        "seconds": round(trained, 3),
        "bank_seconds": round(begin - start, 3),
    }


def tensor_bytes(file: Path) -> int:
    """Return the size of a safetensors file without its header."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Run all arms for all seeds."""
    rows: list[dict[str, Any]] = []
    frozen: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        data = load_data(None, Shape(8, 1, {}), seed)
        torch.manual_seed(seed)
        net = make_base(data, options.base_steps, torch.Generator().manual_seed(seed))
        folder = options.output / "adapters" / str(seed)
        shutil.rmtree(folder, ignore_errors=True)
        frozen += [
            {"seed": seed, "task": key, "accuracy": accuracy(net, seen(TASKS[key], data.test))}
            for key in USERS
        ]
        for arm in islice(all_arms(), 0, None, options.every):
            rows += [one(arm, key, net, data, options, seed, folder) for key in USERS]
            say(
                f"seed {seed}  {arm.label:45s} {100 * rows[-1]['accuracy']:5.1f} %  "
                f"{rows[-1]['tensor_bytes']:7,d} bytes"
            )
    machine = f"{platform.machine()}, torch {torch.__version__}, one thread"
    about = {
        "machine": machine,
        "steps": options.steps,
        "examples": options.examples,
        "users": USERS,
        "providers": PROVIDERS,
    }
    return {"about": about, "frozen": frozen, "runs": rows}


def main(arguments: list[str] | None = None) -> int:
    """Run the study, or only draw its results again."""
    options = parse(arguments)
    torch.set_num_threads(1)
    file = options.output / "results.json"
    if not options.draw:
        options.output.mkdir(parents=True, exist_ok=True)
        results = measure(options, print)
        file.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(file.read_text())
    table = report.table(results)
    (options.output / "table.md").write_text(table)
    print(table)
    report.draw(results, options.output)
    return 0
