# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: time this package, Hugging Face PEFT and LyCORIS in turns on the same
work. Results are ratios to the frozen model's time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import report, routing, scaling, startup
from .run import LIBRARIES, METHODS, Workers
from .work import Shape

KINDS = ("train", "prefill", "decode", "generate")


def main() -> None:
    """Measure what the command line asks for and write the results."""
    options = _parser().parse_args()
    folder = Path(options.output)
    measures = {"steps": _steps, "scaling": _scaling, "startup": _startup, "routing": _routing}
    measures[options.what](options, folder)
    print(f"Results in {folder}/.")


def _steps(options: argparse.Namespace, folder: Path) -> None:
    rows = []
    for width in options.width:
        shape = Shape(
            width=width,
            layers=options.layers,
            batch=options.batch,
            tokens=options.tokens,
            decode_batch=options.decode_batch,
            rank=options.rank,
            tasks=options.tasks,
            bank=options.bank,
            dtype=options.dtype,
            device=options.device,
        )
        with Workers(shape, options.library, options.threads) as workers:
            for method in options.method:
                for kind in options.mode:
                    found = workers.measure(method, kind, options.rounds, options.repeat)
                    rows += found
                    for row in found:
                        print(report.line(row), flush=True)
    rows = report.write(folder, rows, options.threads, options.add)
    print(f"\n{report.verdict(rows)}")


def _scaling(options: argparse.Namespace, folder: Path) -> None:
    torch.set_num_threads(options.threads)
    sizes = {axis: values[: options.sizes] for axis, values in scaling.SIZES.items()}
    rows = scaling.measure(options.width[0], options.rounds * options.repeat, sizes)
    report.write_table(
        folder, "scaling", scaling.HEAD, [scaling.line(row) for row in rows], rows, options.threads
    )
    report.draw(scaling.plot, folder / "scaling.png", rows, options.threads)


def _startup(options: argparse.Namespace, folder: Path) -> None:
    libraries = {name: LIBRARIES[name] for name in options.library if name != "lycoris"}
    rows = startup.measure(libraries, options.rounds, startup.PRESENT[: options.sizes])
    report.write_table(
        folder, "startup", startup.HEAD, [startup.line(row) for row in rows], rows, 1
    )


def _routing(options: argparse.Namespace, folder: Path) -> None:
    rows = []
    for width in options.width:
        shape = Shape(
            width=width,
            layers=options.layers,
            batch=options.batch,
            tokens=options.tokens,
            decode_batch=options.decode_batch,
            rank=options.rank,
            dtype=options.dtype,
            device=options.device,
        )
        turns = options.threads, options.rounds, options.repeat
        experts, top_k = options.experts, options.top_k
        rows += routing.measure(shape, options.library, *turns, options.mode, experts, top_k)
    lines = [routing.line(row) for row in rows]
    report.write_table(folder, "routing", routing.HEAD, lines, rows, options.threads)


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=formatter
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=("steps", "scaling", "startup", "routing"),
        default="steps",
        help="steps: time that an adapter adds to a training step, a prompt and a token, in turns "
        "with the libraries compared. scaling: growth of a step's time with tasks, adapters and "
        "the bank's size. startup: time of importing, injecting, loading and saving. routing: time "
        "of a step that routes over many adapters",
    )
    add = parser.add_argument
    add(
        "--method",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="methods to measure in `steps`",
    )
    add(
        "--mode",
        nargs="+",
        choices=KINDS,
        default=list(KINDS[:3]),
        help="work to measure in `steps`: a training step, a prompt, a token, whole texts",
    )
    add(
        "--library",
        nargs="+",
        choices=list(LIBRARIES),
        default=list(LIBRARIES),
        help="libraries to compare",
    )
    add(
        "--width",
        nargs="+",
        type=int,
        default=[1024, 2048],
        help="widths of the model, one after the other; `scaling` takes the first",
    )
    add("--layers", type=int, default=2, help="decoder layers of the model")
    add("--batch", type=int, default=4, help="samples in a training step and in a prompt")
    add("--tokens", type=int, default=128, help="tokens of a sample")
    add("--decode-batch", type=int, default=32, help="samples that get one token each in `decode`")
    add("--rank", type=int, default=8, help="rank `r` of the adapters")
    add("--tasks", type=int, default=10, help="tasks of a Poly adapter")
    add("--bank", type=int, default=256, help="vectors of a VB-LoRA bank")
    add(
        "--experts",
        nargs="+",
        type=int,
        default=list(routing.EXPERTS),
        help="numbers of adapters to route over in `routing`",
    )
    add(
        "--top-k",
        nargs="+",
        type=int,
        default=list(routing.TOP_K),
        help="numbers of adapters that serve a token in `routing`",
    )
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="dtype of the model",
    )
    add("--device", default="cpu", help="device to measure on, as torch names it")
    add("--threads", type=int, default=2, help="threads that torch uses on a CPU")
    add("--rounds", type=int, default=5, help="turns each library takes")
    add(
        "--repeat",
        type=int,
        default=6,
        help="steps in a turn, of the frozen and of the adapted model each",
    )
    add(
        "--sizes",
        type=int,
        default=4,
        help="how many of the sizes in `scaling` and `startup`, the smallest first",
    )
    add("--add", action="store_true", help="keep what the output folder has of other work")
    add(
        "--output",
        default=str(Path(__file__).parent / "results"),
        help="folder for tables and figures",
    )
    return parser


if __name__ == "__main__":
    main()
