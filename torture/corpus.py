# SPDX-License-Identifier: Apache-2.0
"""Inputs that are kept: those that were read wrongly once, and those that cover most of the code.

A case is a line of JSON: the name of its target, what it is, and the files that differ from the
valid ones. `python -m torture.corpus tests/torture_corpus.jsonl` adds inputs that reach lines of
the package that no case reaches
"""

from __future__ import annotations

import base64
import json
import random
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import peft

from . import hostile
from .damage import Content, Files, Special, damaged

_MORE = 40  # pairs of lines that an input has to add
_PACKAGE = str(Path(peft.__file__).parent)


class Case(NamedTuple):
    """An input: its target, words that say what it is, and files that differ from valid ones."""

    target: str
    what: str
    files: Files

    def to_json(self) -> str:
        """Return the case as a line."""
        files = {name: _written(content) for name, content in self.files.items()}
        return json.dumps({"target": self.target, "what": self.what, "files": files})


def read(path: Path) -> Iterator[Case]:
    """Yield the cases of a file."""
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        files = {name: _content(text) for name, text in entry["files"].items()}
        yield Case(entry["target"], entry["what"], files)


def _written(content: Content) -> str | list[str]:
    if isinstance(content, Special):
        return [*content]
    return base64.b64encode(zlib.compress(content, 9)).decode()


def _content(text: str | list[str]) -> Content:
    if isinstance(text, list):
        return Special(*text)
    return zlib.decompress(base64.b64decode(text))


class _Lines:
    """Lines of the package that were reached."""

    def __init__(self) -> None:
        self.reached: set[tuple[str, int, int]] = set()
        self._before = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        """Note a line and the one before it; other code is not followed."""
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        self.reached.add((frame.f_code.co_filename, self._before, frame.f_lineno))
        self._before = frame.f_lineno
        return self


def grow(path: Path, number: int, seed: int) -> None:
    """Add inputs that reach pairs of lines that no case reaches, so many tries for each target."""
    known = list(read(path)) if path.exists() else []
    for target in hostile.targets():
        with tempfile.TemporaryDirectory() as folder:
            attack = hostile.Attack(target, Path(folder))
            lines = _Lines()

            def reached(files: Files, attack: Any = attack, lines: _Lines = lines) -> int:
                before = len(lines.reached)
                sys.settrace(lines)
                try:
                    attack.judged(files)
                finally:
                    sys.settrace(None)
                return len(lines.reached) - before

            for case in known:
                if case.target == target.name:
                    reached({**attack.valid, **case.files})
            found = []
            for i in range(number):
                chance = random.Random(f"corpus {seed} {target.name} {i}")
                files, what = damaged(attack.valid, chance)
                if reached(files) > _MORE and i > 0:
                    new = {k: v for k, v in files.items() if v != attack.valid.get(k)}
                    found.append(Case(target.name, what[:200], new))
        _append(path, found)
        print(f"{target.name}: {len(found)} more, {len(lines.reached)} pairs of lines", flush=True)


def _append(path: Path, cases: Iterable[Case]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(f"{case.to_json()}\n" for case in cases if len(case.to_json()) < 3000)


if __name__ == "__main__":
    grow(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
