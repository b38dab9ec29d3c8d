# SPDX-License-Identifier: Apache-2.0
"""`python -m studies`: run a study, or write its tables and figures."""

from __future__ import annotations

import argparse
from pathlib import Path

from .recombination import Recombination
from .runs import RESULTS, Study, copy_choices, go_on, read, repeated
from .served_bytes import ServedBytes

STUDIES: dict[str, Study] = {study.name: study for study in (Recombination(), ServedBytes())}


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    add = parser.add_argument
    add("study", choices=sorted(STUDIES))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the final runs")
    add("--workers", type=int, default=2, help="processes, each with one thread")
    add("--minutes", type=float, default=10_000, help="start no run after so many minutes")
    add("--report", action="store_true", help="only write the tables and figures")
    add("--quick", action="store_true", help="a few steps: only check that every part runs")
    add(
        "--again",
        action="store_true",
        help="do runs that are checked in once more, with their rates; needs --output",
    )
    add("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    if options.again and options.output == RESULTS:
        parser.error("--again needs --output: a folder for the new runs.")
    return options


def main() -> None:
    """Go on with a study, and write its report once no run is left."""
    options = parse()
    study, folder = STUDIES[options.study], options.output / options.study
    runs = folder / "runs.jsonl"
    checked_in = RESULTS / options.study / runs.name
    if options.again:
        copy_choices(checked_in, runs)
    turns = options.seeds, options.workers, options.minutes, options.quick
    is_done = options.report or go_on(study, runs, *turns)
    if options.again:
        print(repeated(read(runs), read(checked_in)))
    if not is_done:
        print(f"Runs are left. The same command goes on; so far: {runs}")
        return
    (folder / "report.md").write_text(study.report(read(runs), folder))
    print(f"{folder / 'report.md'}")


if __name__ == "__main__":
    main()
