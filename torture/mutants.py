# SPDX-License-Identifier: Apache-2.0
"""Test the tests: `python -m torture --only mutants --minutes 30`.

Each mutant of `mutations.py` is tried in a fork of one process that has imported everything and
collected the tests. The fork replaces the code of the functions that changed and runs the tests
that are known to reach the changed line, until one fails. A mutant that hangs or takes too much
memory is killed too.

Results are kept by the text of the function. Mutants that a test has killed are not tried again;
those that survived are, after the new ones. `survivors.json` says of those that no test can kill
why. The exit code is 1 if another one survived.

Broken code runs here: run it as a user, or in a container, that can't write to what you value.
"""

from __future__ import annotations

import argparse
import ast
import gc
import json
import math
import random
import sys
import time
from collections import Counter, defaultdict
from fnmatch import fnmatch
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

from .mutations import Mutant, first_line, mutants, mutated
from .reaching import Tests, in_fork, run_tests

SOURCE = Path("src/peft").resolve()
FILES = (
    "checkpoint/*.py",
    "library/*.py",
    "core/saving.py",
    "core/loading.py",
    "core/filling.py",
    "core/merges.py",
    "core/model_merges.py",
    "core/switching.py",
    "ops/exact_merge.py",
    "tuners/vblora/shared_bank.py",
    "tuners/vblora/packed.py",
    "tuners/vblora/storage.py",
    "tuners/lokr/files/*.py",
)
TESTS = (
    "tests/test_torture.py",
    "tests/contract",
    "tests/library",
    "tests/cli",
    "tests/golden",
    "tests/tuners",
    "tests/quantized",
    "src/peft/checkpoint",
    "src/peft/library",
    "src/peft/core",
    "src/peft/ops",
    "src/peft/tuners",
)
MARKS = "not compile and not clients and not distributed and not kernels and not study"
EXPLAINED = Path(__file__).with_name("survivors.json")

Key = tuple[str, int]  # a function's name and first line


class Campaign:
    """A plugin of pytest that tries mutants instead of running the tests once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.output = options.output.resolve()
        self.output.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + 60 * options.minutes
        self.explained = json.loads(EXPLAINED.read_text()) if EXPLAINED.exists() else {}
        self.killers: dict[str, Counter[str]] = defaultdict(Counter)
        self.unexplained = 0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Record the tests that are new or changed, then try mutants until the time is over."""
        files = sorted({file for pattern in FILES for file in SOURCE.glob(pattern)})
        self.functions = _functions(files)
        gc.collect()
        gc.freeze()
        self.tests = Tests(session.items, files, SOURCE, self.output / "tests.json")
        chosen = [
            mutant
            for name, text in self.tests.sources.items()
            for mutant in mutants(name, text)
            if not self.options.files or any(fnmatch(name, p) for p in self.options.files)
        ]
        random.Random(self.options.seed).shuffle(chosen)
        self._try(chosen)
        return True

    def _try(self, chosen: list[Mutant]) -> None:
        path = self.output / "results.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        results = {result["name"]: result for result in map(json.loads, lines)}
        for mutant in chosen:
            if mutant.name in results:
                self._note(mutant, results[mutant.name]["by"])
        new = [mutant for mutant in chosen if mutant.name not in results]
        left = [m for m in chosen if m.name in results and self._is_open(m, results[m.name])]
        with open(path, "a") as record:
            for mutant in (*left, *new) if self.options.again else (*new, *left):
                if time.monotonic() > self.end:
                    break
                start = time.monotonic()
                status, by = self._attempt(mutant, self._order(mutant))
                seconds = round(time.monotonic() - start, 1)
                result = {**mutant._asdict(), "status": status, "by": by, "seconds": seconds}
                results[mutant.name] = result
                record.write(json.dumps(result) + "\n")
                record.flush()
                self._note(mutant, by)
                if status != "killed":
                    print(f"{status}: {mutant}", flush=True)
        self.unexplained = _print_rate(chosen, results, self.explained)

    def _is_open(self, mutant: Mutant, result: dict[str, Any]) -> bool:
        return result["status"] in ("survived", "unreached") and mutant.name not in self.explained

    def _note(self, mutant: Mutant, by: str) -> None:
        """Remember the test that killed a mutant, for its neighbors."""
        if by in self.tests.seconds:
            self.killers[mutant.file][by] += 1
            self.killers[mutant.file + mutant.function][by] += 10

    def _order(self, mutant: Mutant) -> list[str]:
        """Return tests that reach a mutant's line: those that killed its neighbors, then by turns
        the fastest, and those of files that killed most of its file's mutants; one of each function
        first.
        """
        seconds = self.tests.seconds
        lines = ((mutant.file, line) for line in (mutant.line, mutant.statement))
        reach = next((found for at in lines if (found := self.tests.by_line.get(at))), [])
        kills = self.killers[mutant.file] + self.killers[mutant.file + mutant.function]
        by_file: Counter[str] = Counter()
        for test, number in self.killers[mutant.file].items():
            by_file[_file(test)] += number
        fast = sorted(reach, key=lambda test: seconds[test])
        one_each = [*{test.partition("[")[0]: test for test in reversed(fast)}.values()][::-1]
        near = sorted(one_each, key=lambda test: -by_file[_file(test)])
        most = self.options.seconds / 8
        front = sorted((t for t in fast if kills[t] and seconds[t] < most), key=lambda t: -kills[t])
        turns = (test for pair in zip(one_each, near, strict=True) for test in pair)
        result, total = [], 0.0
        for test in dict.fromkeys((*front[:8], *turns, *fast)):
            if total + seconds[test] <= self.options.seconds:
                result.append(test)
                total += seconds[test]
        return result

    def _attempt(self, mutant: Mutant, tests: list[str]) -> tuple[str, str]:
        """Return "killed", "survived", "unreached" or "not tried", and by what."""
        if not tests:
            return "unreached", ""
        killer = self.output / "killer"
        killer.write_text("")

        def work(folder: Path) -> int:
            try:
                self._change(mutant)
            except (SyntaxError, ValueError):  # for example, of the variables of a closure
                return 2
            failed = run_tests([self.tests.items[test] for test in tests], folder)
            killer.write_text(failed or "")
            return 1 if failed else 0

        code = in_fork(work, 4 + 2 * sum(self.tests.seconds[test] for test in tests))
        if code == 0:
            return "survived", f"{len(tests)} tests"
        return (
            ("not tried", "") if code == 2 else ("killed", killer.read_text() or f"ended: {code}")
        )

    def _change(self, mutant: Mutant) -> None:
        """Put a mutant into this process."""
        tree, function = mutated(self.tests.sources[mutant.file], mutant.number)
        codes = _codes(compile(tree, str(SOURCE / mutant.file), "exec", dont_inherit=True))
        for key, functions in self.functions[mutant.file].items():
            for live in functions:
                if key in codes and codes[key] != live.__code__:
                    live.__code__ = codes[key]
                if function is not None and key == (function.name, first_line(function)):
                    _set_defaults(live, function.args)


def _file(test: str) -> str:
    return test.partition("::")[0]


def _functions(files: list[Path]) -> dict[str, dict[Key, list[FunctionType]]]:
    """Return the live functions of files."""
    names = {str(file): str(file.relative_to(SOURCE)) for file in files}
    found: dict[str, dict[Key, list[FunctionType]]] = defaultdict(lambda: defaultdict(list))
    for thing in gc.get_objects():
        if isinstance(thing, FunctionType) and (name := names.get(thing.__code__.co_filename)):
            found[name][thing.__code__.co_name, thing.__code__.co_firstlineno].append(thing)
    return found


def _codes(code: CodeType) -> dict[Key, CodeType]:
    """Return the codes of functions; not those whose name and first line are also another's."""
    found, twice = {(code.co_name, code.co_firstlineno): code}, set()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _codes(constant)
            twice |= found.keys() & inner.keys()
            found |= inner
    return {key: value for key, value in found.items() if key not in twice}


def _set_defaults(live: FunctionType, arguments: ast.arguments) -> None:
    if live.__defaults__:
        pairs = zip(arguments.defaults, live.__defaults__, strict=True)
        live.__defaults__ = tuple(_value(node, old) for node, old in pairs)
    for name, node in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if node is not None and live.__kwdefaults__:
            live.__kwdefaults__[name.arg] = _value(node, live.__kwdefaults__[name.arg])


def _value(node: ast.expr, old: object) -> object:
    """Return a default that is made of constants, such as `1 << 30`."""
    parts = (ast.Constant, ast.BinOp, ast.operator)
    if all(isinstance(part, parts) for part in ast.walk(node)):
        return eval(compile(ast.Expression(node), "", "eval"))
    try:
        return ast.literal_eval(node)
    except ValueError:
        return old


def _print_rate(chosen: list[Mutant], results: dict[str, Any], explained: dict[str, str]) -> int:
    """Print how many were killed, and return how many survived that are not explained."""
    by_file: dict[str, Counter[str]] = defaultdict(Counter)
    for mutant in chosen:
        if (result := results.get(mutant.name)) and result["status"] != "not tried":
            status = "explained" if mutant.name in explained else result["status"]
            by_file[mutant.file][status] += 1
    for name, counts in sorted(by_file.items()):
        print(f"{counts['killed']:5} of {counts.total():5} killed  {name}")
    total = sum(by_file.values(), Counter())
    number, killed = total.total(), total["killed"]
    if number:
        low, high = _interval(killed, number)
        print(
            f"{number:,} of {len(chosen):,} mutants tried, {killed / number:.1%} killed (at 95 %: "
            f"{low:.1%} to {high:.1%}), {total['explained']} explained, "
            f"{total['survived']} survived, {total['unreached']} unreached."
        )
    return total["survived"] + total["unreached"]


def _interval(hits: int, number: int) -> tuple[float, float]:
    """Return Wilson's interval of a rate."""
    z, rate = 1.96, hits / number
    middle = rate + z * z / (2 * number)
    half = z * math.sqrt(rate * (1 - rate) / number + z * z / (4 * number**2))
    return (middle - half) / (1 + z * z / number), (middle + half) / (1 + z * z / number)


def main(arguments: list[str] | None = None) -> int:
    """Try mutants and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m torture --only mutants", description=__doc__)
    parser.add_argument("files", nargs="*", help="patterns of paths in src/peft")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so many")
    parser.add_argument("--seconds", type=float, default=20.0, help="of tests for one mutant")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--again", action="store_true", help="first try those that survived")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="files and folders")
    parser.add_argument("--output", type=Path, default=Path("torture_output/mutants"))
    options = parser.parse_args(arguments)
    campaign = Campaign(options)
    code = pytest.main(
        [*options.tests, "-m", MARKS, "-s", "-p", "no:cacheprovider"], plugins=[campaign]
    )
    return int(code) or min(campaign.unexplained, 1)


if __name__ == "__main__":
    sys.exit(main())
