# SPDX-License-Identifier: Apache-2.0
"""`python -m studies`: run a study, or write its tables and figures."""

from __future__ import annotations

import argparse
from pathlib import Path

from .recombination import Recombination
from .runs import RESULTS, Study, go_on, read
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
    add("--output", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args()


def main() -> None:
    """Go on with a study, and write its report once no run is left."""
    options = parse()
    study, folder = STUDIES[options.study], options.output / options.study
    runs = folder / "runs.jsonl"
    turns = options.seeds, options.workers, options.minutes, options.quick
    if not options.report and not go_on(study, runs, *turns):
        print(f"Runs are left. The same command goes on; so far: {runs}")
        return
    (folder / "report.md").write_text(study.report(read(runs), folder))
    print(f"{folder / 'report.md'}")


if __name__ == "__main__":
    main()
