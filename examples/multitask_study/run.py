# SPDX-License-Identifier: Apache-2.0
"""The study from start to end: for each seed a base, all methods on its tasks, and new tasks from
few examples.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from examples.multitask_digits.base import Base, make_base
from examples.multitask_digits.data import Data, Shape, load_data
from transformers.utils import logging

from . import figures, report
from .methods import Method, all_methods
from .tasks import Task, draw
from .training import Budget, Trained, accuracy, adapt, train

SHOTS = (4, 16, 64)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.multitask_study",
        description="Compare Poly, multi-head routing and routing by input with LoRA, on 28 tasks "
        "and 6 that come later.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2, 3, 4],
        help="seeds of tasks, splits, base and training",
    )
    add("--examples", type=int, default=150, help="labeled pictures of each task")
    add("--steps", type=int, default=400, help="training steps on all tasks")
    add("--adapt-steps", type=int, default=30, help="training steps on each new task")
    add("--methods", nargs="+", help="keys of the methods to run; None: all")
    add("--output", type=Path, default=Path("study_output"), help="folder for tables and figures")
    add(
        "--quick",
        action="store_true",
        help="run a few steps of each part on a few tasks, to check the study",
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.steps, options.adapt_steps = options.seeds[:1], 3, 2
    return options


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures of one seed, by method."""
    torch.manual_seed(seed)
    data = load_data(None, Shape(8, 1, {}), seed)
    base = make_base(None, data, 2 if options.quick else 40)
    tasks, pairs, novel = draw(seed)
    if options.quick:
        tasks, pairs, novel = tasks[:4], pairs[:1], novel[:1]
    generator = torch.Generator().manual_seed(seed)
    parts = [
        data.adapt.take(torch.randperm(len(data.adapt), generator=generator)[: options.examples])
        for _ in tasks
    ]
    budget = Budget(options.steps, adapt_steps=options.adapt_steps)
    numbers = {}
    for method in all_methods(len(tasks)):
        if options.methods and method.key not in options.methods:
            continue
        trained = train(base, method, tasks, parts, budget, seed)
        trained.accuracies = {
            task.name: accuracy(base, trained.of(i), task, data.test, **trained.arguments(i))
            for i, task in enumerate(tasks)
        }
        new = [
            *new_tasks(base, trained, "pairs", pairs, data, options, seed),
            *new_tasks(base, trained, "novel", novel, data, options, seed),
        ]
        numbers[method.key] = {
            "parameters": trained.parameters,
            "seconds": trained.seconds,
            "accuracies": trained.accuracies,
            "new": new,
        }
        told = report.one_line(method, numbers[method.key])
        print(f"seed {seed}  {told}", flush=True)
    return numbers


def new_tasks(
    base: Base,
    trained: Trained,
    kind: str,
    tasks: list[Task],
    data: Data,
    options: argparse.Namespace,
    seed: int,
) -> list[dict[str, Any]]:
    """Return the accuracy on each new task, for each number of examples and each of the method's
    ways to adapt.
    """
    results = []
    for number, task in enumerate(tasks):
        order = torch.randperm(
            len(data.adapt), generator=torch.Generator().manual_seed(1000 * seed + number)
        )
        for way in trained.method.ways:
            for shots in SHOTS:
                few = data.adapt.take(order[:shots])
                model, told, seconds = adapt(
                    base, trained, way, task, few, options.adapt_steps, seed
                )
                score = accuracy(base, model, task, data.test, **told)
                results.append(
                    {
                        "kind": kind,
                        "task": task.name,
                        "way": way,
                        "shots": shots,
                        "accuracy": score,
                        "seconds": seconds,
                    }
                )
    return results


def main(arguments: list[str] | None = None) -> int:
    """Run the study, and write tables and figures."""
    options = parse(arguments)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    start = perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    methods: list[Method] = all_methods(4 if options.quick else len(draw(0)[0]))
    seeds: dict[int, Any] = {}
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
    }
    results = {"settings": settings, "seeds": seeds, "torch": torch.__version__}
    for seed in options.seeds:
        seeds[seed] = one_seed(seed, options)
        results["seconds"] = round(perf_counter() - start)
        (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = report.tables(results, methods)
    (options.output / "results.md").write_text(text)
    figures.draw(results, methods, options.output)
    print(text, file=sys.stdout)
    return 0
