# SPDX-License-Identifier: Apache-2.0
"""Read files that someone damaged or forged.

Each input is a valid folder after one to three changes (`damage`). Reading it has to succeed or to
raise an error of this package, within five seconds and a bound of memory in its size; no file out
of its folder is opened, nothing is executed. A refusal leaves the model to the bit as it was; after
an accepted input the model holds what a slow reading of the file gives.
"""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path

import click
import torch
from torch import nn

import peft
from peft import PeftError, PeftModel

from . import judge, slow_reading
from .damage import Content, Files, damaged
from .forged_pickles import EVIL
from .hostile_targets import Target, targets
from .scenarios import fresh

__all__ = ["Attack", "attacking", "inputs", "targets"]

# Of a parser so many inputs are tried for each one of a load.
PARSER_SHARE = 25
Tries = Callable[..., Iterator[tuple[str, str | None]]]
_watch: judge.Watch | None = None


def watch() -> judge.Watch:
    """Return the only watch of the process: audit hooks can't be taken out."""
    global _watch
    _watch = _watch or judge.Watch()
    return _watch


class Attack:
    """A target with its valid files, and what judges an input.

    Args:
        target: What reads.
        folder: A folder to work in.
    """

    def __init__(self, target: Target, folder: Path) -> None:
        self.target, self.place = target, fresh(folder / "place")
        target.write(self.place)
        self.valid: Files = {
            path.relative_to(self.place).as_posix(): path.read_bytes()
            for path in sorted(self.place.rglob("*"))
            if path.is_file()
        }
        self._written: dict[str, Content] = dict(self.valid)
        self._evil = Path.cwd() / EVIL
        self._model: nn.Module | None = None
        self._before: nn.Module | None = None
        judge.forget_peak()
        target.read(target.model(), self.valid if target.is_parser else self.place)
        if wrong := self.judged(self.valid):
            raise RuntimeError(f"{target.name}: the valid files are not read: {wrong}")

    def input(self, chance: random.Random) -> tuple[str, str | None]:
        """Make an input, read it, and return what it is and what was wrong, None if nothing."""
        files, what = damaged(self.valid, chance)
        return what, self.judged(files)

    def judged(self, files: Files) -> str | None:
        """Read files, and return what was wrong, None if nothing."""
        target, size = self.target, sum(_size(content) for content in files.values())
        if not target.is_parser:
            self._put(files)
        if self._model is None:
            self._model, self._before = target.model(), target.model()
        before = judge.peak()
        taken, wrong = self._read(files)
        wrong = wrong or watch().finding
        if wrong is None and self._evil.exists():
            wrong = "code was executed"
            self._evil.rmdir()
        if wrong is None and judge.peak() - before > judge.FACTOR * size + judge.CONSTANT:
            self._model = target.model()
            wrong = judge.takes_too_much(lambda: self._read(files), size)
            taken = True
        if target.is_parser:
            return wrong
        assert self._before is not None
        if wrong is None and not taken and not _are_same(self._model, self._before):
            wrong = "the model has changed"
        if wrong is None and isinstance(taken, PeftModel) and target.equals_file:
            wrong = slow_reading.difference(taken, self.place)
        if taken or wrong is not None:
            self._model = None
        return wrong

    def _read(self, files: Files) -> tuple[object, str | None]:
        """Read an input; return what came of it, False for a refusal, and what was wrong."""
        target = self.target
        source = files if target.is_parser else self.place
        try:
            with (
                warnings.catch_warnings(),
                judge.time_limit(),
                watch().over(None if target.is_parser else self.place, target.names_others),
            ):
                warnings.simplefilter("ignore")
                return target.read(self._model, source) or True, None
        except (PeftError, click.ClickException):
            return False, None
        except judge.Overtime:
            return False, f"more than {judge.SECONDS} seconds"
        except Exception as error:
            return False, f"a bare error: {type(error).__name__}: {str(error)[:200]}"

    def _put(self, files: Files) -> None:
        """Write what differs from what is in the folder."""
        there = {path.relative_to(self.place).as_posix() for path in _paths(self.place)}
        for name in there - files.keys():
            _remove(self.place / name)
            self._written.pop(name, None)
        for name, content in files.items():
            path = self.place / name
            if name in there and self._written.get(name) == content:
                continue
            _remove(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content.kind == "folder":
                path.mkdir()
            elif content.kind == "fifo":
                os.mkfifo(path)
            else:
                path.symlink_to(content.target)
            self._written[name] = content


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else 0


def _paths(folder: Path) -> Iterator[Path]:
    """Yield the paths in a folder that are no folders with something in them; links are leaves."""
    for root, folders, names in os.walk(folder):
        yield from (Path(root, name) for name in names)
        for name in folders:
            path = Path(root, name)
            if path.is_symlink() or not any(path.iterdir()):
                yield path


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _are_same(model: nn.Module, other: nn.Module) -> bool:
    """Return whether modules and values are the same."""
    modules = [
        [(name, type(part), part.training, sorted(vars(part))) for name, part in m.named_modules()]
        for m in (model, other)
    ]
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=False)
    return (
        modules[0] == modules[1]
        and all(
            names == own and a.requires_grad == b.requires_grad and torch.equal(a, b)
            for (names, a), (own, b) in pairs
        )
        and all(
            own.to_dict() == config.to_dict()
            for own, config in zip(_configs(model), _configs(other), strict=True)
        )
    )


def _configs(model: nn.Module) -> list[peft.PeftConfig]:
    return [*getattr(model, "peft_config", {}).values()]


def attacking(target: Target, folder: Path, seed: int = 0) -> Iterator[tuple[str, str | None]]:
    """Yield, without end, each input and what was wrong with how it was read, None if nothing."""
    attack = Attack(target, folder)
    for number in count():
        what, wrong = attack.input(random.Random(f"{seed} {target.name} {number}"))
        yield f"input {number}: {what}", wrong


def inputs(number: int, parsed: int | None = None) -> Tries:
    """Return a function that tries so many inputs of a target; by default 25 times as many of one
    that is only parsed.
    """

    def tries(target: Target, folder: Path, seed: int = 0) -> Iterator[tuple[str, str | None]]:
        of_parsers = number * PARSER_SHARE if parsed is None else parsed
        return islice(attacking(target, folder, seed), of_parsers if target.is_parser else number)

    return tries
