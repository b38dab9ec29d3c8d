# SPDX-License-Identifier: Apache-2.0
"""`python -m studies`: run a study, or write its tables and figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .package_data import fetch
from .recombination import Recombination
from .runs import RESULTS, Study, copy_choices, go_on, read
from .served_bytes import ServedBytes
from .statistics import comparison

STUDIES: dict[str, Study] = {study.name: study for study in (Recombination(), ServedBytes())}


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    add = parser.add_argument
    add("study", choices=sorted(STUDIES))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the final runs")
    add("--arms", nargs="+", default=[], metavar="ARM", help="only final runs of these arms")
    add("--workers", type=int, default=2, help="processes, each with one thread")
    add("--minutes", type=float, default=10_000, help="start no run after so many minutes")
    add("--report", action="store_true", help="only write the tables and figures")
    add(
        "--quick",
        action="store_true",
        help="a few steps, to see that every part runs; needs --output",
    )
    add(
        "--again",
        action="store_true",
        help="repeat final runs with the rates that are checked in, and compare; needs --output",
    )
    add("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    for name in ("again", "quick"):
        if getattr(options, name) and options.output == RESULTS:
            parser.error(f"--{name} needs --output: a folder for its runs.")
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: at least one process is needed.")
    if unknown := {*options.arms} - {*(names := STUDIES[options.study].arms())}:
        parser.error(f"no arm is called {', '.join(sorted(unknown))}; there are: {names}")
    return options


def main() -> None:
    """Go on with a study, and write its report once no run is left."""
    options = parse()
    study, folder = STUDIES[options.study], options.output / options.study
    runs = folder / "runs.jsonl"
    checked_in = RESULTS / options.study / runs.name
    if not options.report:
        try:
            fetch()
        except RuntimeError as error:
            sys.exit(str(error))
    if options.again:
        copy_choices(checked_in, runs)
    how = options.seeds, options.workers, options.minutes, options.quick, options.arms
    is_done = options.report or go_on(study, runs, *how)
    if options.again:
        print(comparison(study.scores(read(runs)), study.scores(read(checked_in))))
    if not is_done:
        print(f"Runs are left. The same command goes on; so far: {runs}")
        return
    (folder / "report.md").write_text(study.report(read(runs), folder))
    print(f"{folder / 'report.md'}")


if __name__ == "__main__":
    main()
