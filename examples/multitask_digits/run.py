# SPDX-License-Identifier: Apache-2.0
"""The demo from start to end: a base, eight tasks in six ways, a table, two later tasks, and all
adapters read back from disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import warnings
from pathlib import Path
from time import perf_counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.utils import logging

from . import figures, report
from .base import Base, input_shape, make_base, save_base
from .data import Data, load_data
from .late import meet
from .methods import all_methods
from .report import Row
from .storage import LATE, check_in_fresh_process, check_merged, save
from .tasks import Task, eight_tasks, late_tasks
from .training import Adapted, Budget, accuracy, predict, predict_tasks, train


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.multitask_digits",
        description="Adapt one pretrained vision transformer to eight tasks with LoRA, Poly, "
        "multi-head Poly, VB-LoRA and LoKr.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data-folder",
        type=Path,
        help="folder of pictures, one sub-folder per class; None: scikit-learn's digits",
    )
    add(
        "--model",
        type=Path,
        help="folder of a transformers image classifier; None: a small ViT, pretrained here",
    )
    add(
        "--side",
        type=int,
        default=32,
        help="width and height that pictures of --data-folder are resized to, without --model",
    )
    add(
        "--pretrain-epochs",
        type=int,
        default=40,
        help="epochs over the upright pictures for a new base or head",
    )
    add("--examples", type=int, default=240, help="labeled pictures of each task")
    add("--epochs", type=int, default=20, help="epochs over each task's examples")
    add("--batch", type=int, default=64, help="pictures in a step, of all tasks together")
    add("--shots", type=int, default=32, help="labeled pictures of each late task")
    add("--late-steps", type=int, default=80, help="training steps on each late task")
    add("--seed", type=int, default=0, help="seed of the split, the base and all training")
    add(
        "--threads",
        type=int,
        help="threads that torch uses; more than one is slower with a model this small "
        "(None: 1, or torch's default with --model)",
    )
    add(
        "--output",
        type=Path,
        default=Path("demo_output"),
        help="folder for adapters, tables and figures",
    )
    add("--quick", action="store_true", help="run a few steps of each part, to check the demo")
    options = parser.parse_args(arguments)
    if options.model and not (options.model / "config.json").is_file():
        parser.error(
            f"--model {options.model}: no config.json there; give the folder of a model saved with "
            "save_pretrained"
        )
    if options.data_folder and not options.data_folder.is_dir():
        parser.error(f"--data-folder {options.data_folder}: no such folder")
    if options.quick:
        options.pretrain_epochs, options.epochs, options.late_steps = 2, 1, 5
    return options


def set_up(options: argparse.Namespace) -> None:
    """Set threads, seed and quiet libraries, and remove an earlier run's adapters from the output
    folder.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if options.threads or not options.model:
        torch.set_num_threads(options.threads or 1)
    torch.manual_seed(options.seed)
    shutil.rmtree(options.output / "adapters", ignore_errors=True)
    options.output.mkdir(parents=True, exist_ok=True)


def measure(
    options: argparse.Namespace, base: Base, data: Data, tasks: list[Task]
) -> tuple[list[Row], dict[str, Adapted], dict[str, torch.Tensor]]:
    """Train and save every method.

    Returns:
        The table's rows, the frozen base first; the adapted models by method; the frozen base's
        logits by task.
    """
    frozen = {task.key: predict(base, base.model, task, data.test) for task in tasks}
    rows = [
        Row(
            "base",
            "frozen base",
            "none",
            {key: accuracy(logits, data.test) for key, logits in frozen.items()},
        )
    ]
    adapted = {}
    generator = torch.Generator().manual_seed(options.seed)
    count = min(options.examples, len(data.adapt))
    parts = [
        data.adapt.take(torch.randperm(len(data.adapt), generator=generator)[:count]) for _ in tasks
    ]
    budget = Budget(count, options.epochs, options.batch)
    for method in all_methods(base.model, len(tasks)):
        result = train(base, method, tasks, parts, budget, options.seed)
        result.logits = predict_tasks(base, method, result.model, tasks, data.test)
        size = save(result, options.output / "adapters" / method.key)
        scores = {key: accuracy(logits, data.test) for key, logits in result.logits.items()}
        rows.append(
            Row(
                method.key,
                method.label,
                method.mode,
                scores,
                result.trainable,
                size,
                result.seconds,
            )
        )
        adapted[method.key] = result
    return rows, adapted, frozen


def keep_late(
    options: argparse.Namespace,
    base: Base,
    data: Data,
    adapted: dict[str, Adapted],
    tasks: list[Task],
) -> bool:
    """Save the grown adapters. Return True if each old task's logits are equal to the bit."""
    held = True
    for one in (one for one in adapted.values() if one.method.mode == "routed"):
        before, one.logits = (
            one.logits,
            predict_tasks(base, one.method, one.model, tasks, data.test),
        )
        held = all(torch.equal(one.logits[key], logits) for key, logits in before.items()) and held
        save(one, options.output / "adapters" / (one.method.key + LATE))
    print(f"  the eight old tasks' logits are {'the same, bit for bit' if held else 'DIFFERENT'}")
    return held


def draw(
    options: argparse.Namespace,
    rows: list[Row],
    adapted: dict,
    ways: list,
    frozen: dict,
    data: Data,
) -> None:
    """Draw all figures."""
    tasks, late, output = eight_tasks(), late_tasks(), options.output
    names = [task.label for task in tasks + late]
    best = max(
        (one for one in adapted.values() if one.method.mode == "routed"),
        key=lambda one: mean_accuracy(rows, one),
    )
    figures.accuracy_against_bytes(rows, output / "accuracy_against_bytes.png")
    for key in ("poly", "mhr"):
        one = adapted[key]
        figures.router(
            one.model.get_router_weights(),
            names,
            len(tasks),
            one.method.label,
            output / f"router_{key}.png",
        )
    figures.late_tasks(ways, late, options.shots, output / "late_tasks.png")
    figures.gallery(tasks, data, frozen, best, output / "tasks.png")


def mean_accuracy(rows: list[Row], adapted: Adapted) -> float:
    """Return the table's mean of a method."""
    return next(row.mean for row in rows if row.key == adapted.method.key)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo. Return 0 if every check passed."""
    options = parse(arguments)
    start = perf_counter()
    set_up(options)
    try:
        shape = input_shape(options.model, options.data_folder, options.side)
        data = load_data(options.data_folder, shape, options.seed)
    except (ValueError, OSError) as problem:
        print(f"Nothing to start from: {problem}")
        return 2
    print(
        f"{len(data.pretrain)} pictures to pretrain on, {len(data.adapt)} to adapt on, "
        f"{len(data.test)} held out from all of it"
    )
    base = make_base(options.model, data, options.pretrain_epochs)
    save_base(base, options.output / "base")

    tasks, late = eight_tasks(), late_tasks()
    rows, adapted, frozen = measure(options, base, data, tasks)
    examples = min(options.examples, len(data.adapt))
    text = (
        f"Accuracy in per cent on {len(data.test)} held-out pictures; "
        f"{options.epochs} passes over {examples} examples a task:\n\n"
    )
    text += f"{report.table(rows, tasks)}\n\n{report.conclusion(rows)}"
    print(f"\n{text}\n")

    print("Merging one task of a routed adapter into the weights:")
    merged = check_merged(base, adapted["mhr"], tasks, 1, data)
    ways = meet(base, adapted, late, data, options.shots, options.late_steps, options.seed)
    later = (
        f"Two tasks that come later, from {options.shots} examples each; accuracy in per cent:\n\n"
        f"{report.late_table(ways, late)}"
    )
    print(f"\n{later}\n")
    print("Having learned the later tasks:")
    unchanged = keep_late(options, base, data, adapted, tasks + late)

    print("Reading everything back in a fresh process:", flush=True)
    same = check_in_fresh_process(options.output, options.data_folder, options.seed)
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
    }
    report.write(options.output, f"{text}\n\n{later}", rows, ways, settings)
    draw(options, rows, adapted, ways, frozen, data)
    print(
        f"\nTables, figures and adapters are in {options.output}/ ({perf_counter() - start:.0f} "
        "seconds in all)"
    )
    if not (merged and unchanged and same):
        print("A CHECK FAILED, see above")
        return 1
    return 0
