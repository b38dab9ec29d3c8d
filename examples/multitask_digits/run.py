# SPDX-License-Identifier: Apache-2.0
"""The whole story: pretrain or load a base, adapt it in five ways to eight tasks, compare, save, reload, add a ninth task."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from time import perf_counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from .base import input_shape, make_base, save_base
from .data import load_data
from .figures import accuracy_against_bytes, router_heat_map
from .methods import all_methods
from .ninth import learn_ninth
from .report import Row, conclusion, ninth_table, table, write
from .storage import check_in_fresh_process, save
from .tasks import eight_tasks, ninth_task
from .training import Budget, accuracy, predict, predict_tasks, train


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.multitask_digits", description=__doc__)
    parser.add_argument("--data-folder", type=Path, help="your pictures: a sub-folder a class (default: scikit-learn's digits)")
    parser.add_argument("--model", type=Path, help="folder of a transformers image classifier (default: a small ViT)")
    parser.add_argument("--side", type=int, default=32, help="size of --data-folder's pictures where no --model says it")
    parser.add_argument("--pretrain-epochs", type=int, default=30, help="passes over the upright pictures for a new base or head")
    parser.add_argument("--epochs", type=int, default=14, help="passes over each task's examples")
    parser.add_argument("--examples", type=int, default=240, help="training examples of each task")
    parser.add_argument("--shots", type=int, default=32, help="examples of the ninth task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.pretrain_epochs, options.epochs = 2, 1
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run; 0 if every check held."""
    options = parse(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)  # as fast for so small a model, and no slower when the other core is busy
    torch.manual_seed(options.seed)
    start = perf_counter()
    shutil.rmtree(options.output / "adapters", ignore_errors=True)
    options.output.mkdir(parents=True, exist_ok=True)

    data = load_data(options.data_folder, input_shape(options.model, options.data_folder, options.side), options.seed)
    print(f"{len(data.pretrain)} pictures to pretrain on, {len(data.adapt)} to adapt on, {len(data.test)} to test on")
    base = make_base(options.model, data, options.pretrain_epochs)
    save_base(base, options.output / "base")

    tasks = eight_tasks()
    rows, adapted = measure(options, base, data, tasks)
    print(f"\nAccuracy on {len(data.test)} held-out pictures, per cent:\n\n{table(rows, tasks)}\n\n{conclusion(rows)}\n")

    print("Reloading all adapters in a fresh process:")
    held = check_in_fresh_process(options.output, options.data_folder, options.seed)

    late = ninth_task()
    steps = 5 if options.quick else 60
    ninth = learn_ninth(base, adapted["poly"].model, late, data, options.shots, steps, options.seed)
    print(f"\n{ninth_table(ninth, late)}\n")

    write(options.output, rows, tasks, ninth, late)
    accuracy_against_bytes(rows, options.output / "accuracy_against_bytes.png")
    labels = [task.label for task in [*tasks, late]]
    router_heat_map(adapted["poly"].model.get_router_weights(), labels, options.output / "router.png")
    print(f"Table, figures and adapters are in {options.output}/ ({perf_counter() - start:.0f} s in all)")
    return 0 if held else 1


def measure(options: argparse.Namespace, base, data, tasks):
    """Train and save every method; the rows of the table, the frozen base first."""
    frozen = {task.key: accuracy(predict(base, base.model, task, data.test), data.test) for task in tasks}
    rows = [Row("base", "frozen base", "none", frozen, 0, 0, 0.0)]
    adapted = {}
    generator = torch.Generator().manual_seed(options.seed)
    # Every task has examples of its own: what is learned of a picture in one view is no help with it in another.
    count = min(options.examples, len(data.adapt))
    parts = [data.adapt.take(torch.randperm(len(data.adapt), generator=generator)[:count]) for _ in tasks]
    budget = Budget(count, options.epochs, 64)
    for method in all_methods(base.model, len(tasks)):
        result = train(base, method, tasks, parts, budget, options.seed)
        result.logits = predict_tasks(base, method, result.model, tasks, data.test)
        size = save(result, options.output / "adapters" / method.key)
        scores = {key: accuracy(logits, data.test) for key, logits in result.logits.items()}
        rows.append(Row(method.key, method.label, method.mode, scores, result.trainable, size, result.seconds))
        adapted[method.key] = result
    return rows, adapted


if __name__ == "__main__":
    sys.exit(main())
