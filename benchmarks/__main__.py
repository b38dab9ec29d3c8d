# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: time this package, Hugging Face PEFT and LyCORIS in turns on the same
work. Results are ratios to the frozen model's time.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import report, routing, scaling, startup
from .methods import METHODS
from .run import LIBRARIES, Workers
from .work import Shape

KINDS = ("train", "prefill", "decode", "generate")
MODELS = ("llama", "stack")
DTYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    """Measure what the command line asks for and write the results."""
    parser = _parser()
    options = parser.parse_args()
    _check(parser, options)
    folder = Path(options.output)
    measures: dict[str, Callable[..., bool | None]] = {
        "steps": _steps,
        "scaling": _scaling,
        "startup": _startup,
        "first-step": _first_step,
        "routing": _routing,
    }
    failed = measures[options.what](options, folder)
    print(f"Results in {folder}/.")
    if failed:
        sys.exit(1)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what can't be measured."""
    kind = torch.device(options.device).type
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no CUDA device here")
    if options.graph and kind != "cuda":
        parser.error(f"--graph captures a CUDA graph, and --device is {options.device}")
    if (options.graph or options.compiled) and "generate" in options.mode:
        parser.error("--mode generate is neither captured nor compiled; leave it out")


def _shapes(options: argparse.Namespace) -> list[Shape]:
    """Return the work that the command line asks for, for each model and width."""
    names = {field.name for field in dataclasses.fields(Shape)} - {"model", "width"}
    given = {name: value for name, value in vars(options).items() if name in names}
    given = {name: value for name, value in given.items() if not isinstance(value, list)}
    return [
        Shape(model=model, width=width, **given)
        for model in options.model
        for width in options.width
    ]


def _steps(options: argparse.Namespace, folder: Path) -> bool:
    """Measure steps. Results are written after each method, so that nothing measured is lost."""
    rows: list[dict[str, Any]] = report.known(folder) if options.add else []
    failed = False
    for shape in _shapes(options):
        with Workers(shape, options.library, options.threads) as workers:
            for method in options.method:
                found = []
                for mode in options.mode:
                    found += workers.measure(method, mode, options.rounds, options.repeat)
                for row in found:
                    print(f"{report.line(row)} {row['model']} {row['width']} |", flush=True)
                failed = failed or any("failed" in row for row in found)
                rows = report.replaced(rows, found)
                report.write(folder, rows, options.threads)
    report.draw(report.plot, folder / "steps.png", rows, options.threads)
    print(f"\n{report.verdict(rows)}")
    return failed


def _scaling(options: argparse.Namespace, folder: Path) -> None:
    torch.set_num_threads(options.threads)
    sizes = {axis: values[: options.sizes] for axis, values in scaling.SIZES.items()}
    rows = scaling.measure(options.width[0], options.rounds * options.repeat, sizes)
    _write(folder, "scaling", scaling.lines(rows), rows, options.threads)
    report.draw(scaling.plot, folder / "scaling.png", rows, options.threads)


def _startup(options: argparse.Namespace, folder: Path) -> None:
    libraries = {name: LIBRARIES[name] for name in options.library if name != "lycoris"}
    shape = _shapes(options)[0]
    rows = startup.measure(libraries, options.rounds, startup.PRESENT[: options.sizes], shape)
    _write(folder, "startup", report.table(startup.HEAD, map(startup.line, rows)), rows, 1)


def _first_step(options: argparse.Namespace, folder: Path) -> None:
    libraries = {name: LIBRARIES[name] for name in options.library if name != "lycoris"}
    rows = startup.first_steps(libraries, options.rounds, _shapes(options)[0])
    _write(folder, "first-step", report.table(startup.HEAD, map(startup.line, rows)), rows, 1)


def _routing(options: argparse.Namespace, folder: Path) -> None:
    rows = []
    for shape in _shapes(options):
        turns = options.threads, options.rounds, options.repeat
        experts, top_k = options.experts, options.top_k
        rows += routing.measure(shape, options.library, *turns, options.mode, experts, top_k)
    lines = report.table(routing.HEAD, map(routing.line, rows))
    _write(folder, "routing", lines, rows, options.threads)


def _write(folder: Path, name: str, lines: list[str], rows: list[report.Row], threads: int) -> None:
    report.write_table(folder, name, lines, rows, threads)
    print("\n".join(lines))


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=formatter
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=("steps", "scaling", "startup", "first-step", "routing"),
        default="steps",
        help="steps: time that an adapter adds to a training step, a prompt and a token, in turns "
        "with the libraries compared. scaling: growth of a step's time with tasks, adapters and "
        "the bank's size. startup: time of importing, injecting, loading, saving and a first step. "
        "first-step: only this. routing: time of a step that routes over many adapters",
    )

    def some(name: str, default: Sequence[Any], text: str, choices: Any = None) -> None:
        kind = type(default[0])
        parser.add_argument(
            name, nargs="+", type=kind, choices=choices, default=list(default), help=text
        )

    def number(name: str, default: int, text: str) -> None:
        parser.add_argument(name, type=int, default=default, help=text)

    methods = [name for name in METHODS if name != "arrow"]
    some("--method", methods, "methods to measure in `steps`", methods)
    some("--mode", KINDS[:3], "work: a training step, a prompt, a token, whole texts", KINDS)
    some("--library", list(LIBRARIES), "libraries to compare", list(LIBRARIES))
    some("--model", MODELS[:1], "models: a Llama, or its linear layers in a row", MODELS)
    some("--width", [1024, 2048], "widths of the model in turn; `scaling` takes the first")
    number("--layers", 2, "decoder layers of the model")
    number("--batch", 4, "samples in a training step and in a prompt")
    number("--tokens", 128, "tokens of a sample")
    number("--decode-batch", 32, "samples that get one token each in `decode`")
    number("--rank", 8, "rank `r` of the adapters")
    number("--tasks", 10, "tasks of a Poly adapter")
    number("--bank", 256, "vectors of a VB-LoRA bank")
    some("--experts", routing.EXPERTS, "numbers of adapters to route over in `routing`")
    some("--top-k", routing.TOP_K, "numbers of adapters that serve a token in `routing`")
    number("--threads", 2, "threads that torch uses on a CPU")
    number("--rounds", 5, "turns each library takes")
    number("--repeat", 6, "steps in a turn, of the frozen and of the adapted model each")
    number("--sizes", 4, "how many of the sizes in `scaling` and `startup`, the smallest first")
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="dtype of the model")
    add("--device", default="cpu", help="device to measure on, as torch names it")
    add("--compile", dest="compiled", action="store_true", help="compile both sides in `steps`")
    add("--graph", action="store_true", help="capture steps in CUDA graphs, on a GPU")
    add("--add", action="store_true", help="keep what the output folder has of other work")
    add("--output", default=str(Path(__file__).parent / "results"), help="folder for the results")
    return parser


if __name__ == "__main__":
    main()
