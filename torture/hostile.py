# SPDX-License-Identifier: Apache-2.0
"""Load files that someone damaged or forged.

A seed is a valid adapter of some kind. Each input changes its config as JSON (other types, sizes,
names, paths), its safetensors header (offsets, shapes, dtypes, keys, metadata), or bytes anywhere.
Loading it has to succeed or to raise an error of this package, soon and within a bound of memory,
and a refusal leaves the model to the bit as it was. Nothing is executed: a pickle that would make a
file makes none.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import signal
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

import peft
from peft import PeftError, PeftModel

from .scenarios import METHODS, adapted, base, fresh

SECONDS = 5.0  # an input may take
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EVIL = "executed"


VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.0, math.nan, math.inf, 1e308),
    *(2**31, 2**63, 2**100, "", "0", "default", "none", "all", "x" * 300, "../../etc"),
    *("/etc/passwd", "\x00", "é\ud800", "(a+)+$", "[", "(?P<a>", [], [[]], [0], [1, "2"]),
    *(["0"], {}, {"0": 1}, {"": None}, {"a": {"b": []}}, [[0, 1]], "LORA", "POLY", "XLORA"),
    *("SEQ_CLS", "CAUSAL_LM", "auto", "int8", "uint16", "pissa", "eva", "mope", "token"),
]


class Target(NamedTuple):
    """A kind of file: how to write a valid one, and how to read it into a model."""

    name: str
    write: Callable[[Path], object]
    read: Callable[[nn.Module, Path], object]


class _Evil:
    """An object whose unpickling makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def targets() -> Iterator[Target]:
    """Yield the kinds of files."""
    for method in METHODS:
        saved = adapted(method, 2)
        yield Target(
            f"{method} adapter", saved.save_pretrained, lambda m, f: PeftModel.from_pretrained(m, f)
        )
    legacy = adapted("LORA", 2)
    yield Target(
        "legacy adapter",
        lambda f: legacy.save_pretrained(f, safe_serialization=False),
        lambda m, f: PeftModel.from_pretrained(m, f),
    )
    lokr = adapted("LOKR", 2)
    for layout in ("lycoris", "kohya", "comfyui"):
        yield Target(
            f"LoKr file, {layout}",
            lambda f, layout=layout: peft.save_lokr_file(lokr, f / WEIGHTS, layout),
            lambda m, f: peft.load_lokr_file(m, f / WEIGHTS),
        )
    bank = adapted("VBLORA", 2)
    yield Target(
        "vector bank",
        peft.VectorBank.of(bank).save_pretrained,
        lambda m, f: peft.VectorBank.from_pretrained(f),
    )


def attacking(target: Target, folder: Path, seed: int = 0) -> Iterator[tuple[str, str | None]]:
    """Yield, without end, each input and what was wrong with how it was read, None if nothing."""
    place = fresh(folder / "place")
    target.write(place)
    valid = {path: path.read_bytes() for path in place.iterdir() if path.is_file()}
    model, before = base(), base()
    number = 0
    while True:
        for path, content in valid.items():
            path.write_bytes(content)
        chance = random.Random(f"{seed} {target.name} {number}")
        what = _damage(place, chance, folder)
        was_read, wrong = _read(target, model, place)
        if wrong is None and (folder / EVIL).exists():
            wrong = "code was executed"
        if wrong is None and not was_read and not _are_same(model, before):
            wrong = "the model has changed"
        if was_read or wrong is not None:
            model = base()
        yield f"input {number}: {what}", wrong
        number += 1


def inputs(number: int) -> Callable[..., Iterator[tuple[str, str | None]]]:
    """Return a function that tries so many inputs of a target."""
    return lambda target, folder, seed=0: islice(attacking(target, folder, seed), number)


def _are_same(model: nn.Module, other: nn.Module) -> bool:
    """Return whether modules and values are the same."""
    modules = [
        [(name, type(part), part.training, sorted(vars(part))) for name, part in m.named_modules()]
        for m in (model, other)
    ]
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=False)
    return modules[0] == modules[1] and all(
        names == own and a.requires_grad == b.requires_grad and torch.equal(a, b)
        for (names, a), (own, b) in pairs
    )


def _read(target: Target, model: nn.Module, place: Path) -> tuple[bool, str | None]:
    """Read an input; return whether it was taken, and what was wrong, None if nothing."""
    try:
        with warnings.catch_warnings(), _time_limit():
            warnings.simplefilter("ignore")
            target.read(model, place)
    except PeftError:
        return False, None
    except TimeoutError:
        return False, f"more than {SECONDS} seconds"
    except Exception as error:
        return False, f"a bare error: {type(error).__name__}: {error}"
    return True, None


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _damage(place: Path, chance: random.Random, folder: Path) -> str:
    """Damage one or two things of an adapter, and say which."""
    said = []
    for _ in range(chance.choice((1, 1, 1, 2))):
        files = sorted(p for p in place.iterdir() if p.is_file() and p.suffix != ".md")
        if not files:
            break
        path = chance.choice(files)
        kinds: list[Callable[..., str]] = [_flip, _cut]
        if path.suffix == ".json":
            kinds += [_json] * 8
        if path.suffix == ".safetensors":
            kinds += [_header] * 8
        if path.suffix == ".bin":
            kinds += [_pickle] * 4
        said.append(f"{path.name}: {chance.choice(kinds)(path, chance, folder)}")
    return "; ".join(said)


def _flip(path: Path, chance: random.Random, folder: Path) -> str:
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 4, 32))):
        if content:
            content[chance.randrange(len(content))] = chance.randrange(256)
    path.write_bytes(content)
    return "bytes changed"


def _cut(path: Path, chance: random.Random, folder: Path) -> str:
    content = path.read_bytes()
    size = chance.choice((0, 1, 7, 8, 9, len(content) // 2, max(0, len(content) - 1)))
    path.write_bytes(content[:size] + bytes(chance.choice((0, 0, 64))))
    return f"cut to {size} bytes"


def _value(chance: random.Random, old: object = None) -> object:
    """Return a value that a config or header does not expect."""
    number = old if isinstance(old, int | float) and not isinstance(old, bool) else 1
    near = [number + 1, number * 2, number * 1000, -number]
    return chance.choice([*VALUES, *near])


def _json(path: Path, chance: random.Random, folder: Path) -> str:
    """Change one value, key or the whole of a JSON file."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError):
        return "unchanged"
    if not isinstance(content, dict) or not content:
        return "unchanged"
    key, kind = chance.choice(sorted(content)), chance.randrange(10)
    if kind == 0:
        said = f"without {key}"
        del content[key]
    elif kind == 1:
        fresh_key = str(_value(chance))
        said = f"{key} is called {fresh_key!r}"
        content[fresh_key] = content.pop(key)
    elif kind == 2:
        content = _value(chance)
        said = f"all is {content!r}"
    else:
        content[key] = _value(chance, content[key])
        said = f"{key} is {content[key]!r}"
    text = json.dumps(content)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return said


def _header(path: Path, chance: random.Random, folder: Path) -> str:
    """Change one entry of a safetensors header, and sometimes its length."""
    content = path.read_bytes()
    try:
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        data = content[8 + size :]
        key = chance.choice(sorted(header))
        entry = header[key]
    except (ValueError, struct.error, IndexError, UnicodeDecodeError):
        return "unchanged"
    kind = chance.randrange(8)
    if kind == 0:
        del header[key]
        said = f"without {key}"
    elif kind == 1:
        name = chance.choice(["", ".", "a" * 1000, key + ".x", key[1:], "\x00", "weight", "../w"])
        header[name] = header.pop(key)
        said = f"{key} is called {name[:20]!r}"
    elif kind == 2:
        header[key] = _value(chance)
        said = f"{key} is {header[key]!r}"
    elif kind == 3 and isinstance(entry, dict) and entry:
        field = chance.choice(sorted(entry))
        entry[field] = _value(chance)
        said = f"{field} of {key} is {entry[field]!r}"
    elif kind == 4 and isinstance(entry, dict) and isinstance(entry.get("shape"), list):
        shape = entry["shape"]
        entry["shape"] = chance.choice(
            [
                [math.prod(shape)],
                shape[::-1],
                [1, *shape],
                [*shape, 1],
                [0],
                [2**40, 2**40],
                shape * 3,
            ]
        )
        said = f"shape of {key} is {entry['shape']}"
    elif kind == 5 and isinstance(entry, dict):
        entry["dtype"] = chance.choice(
            ["F64", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "C64", "x"]
        )
        said = f"dtype of {key} is {entry['dtype']}"
    elif kind == 6:
        values = bytearray(data)
        pattern = chance.choice(
            [b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\xff\xff", bytes(4)]
        )
        for at in range(0, len(values) - 3, 4 * chance.choice((1, 3))):
            values[at : at + 4] = pattern
        data = bytes(values)
        said = f"values {pattern.hex()}"
    else:
        said = "another length of the header"
        text = json.dumps(header).encode()
        wrong = chance.choice([0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63, len(content)])
        path.write_bytes(struct.pack("<Q", wrong) + text + data)
        return said
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return said


def _pickle(path: Path, chance: random.Random, folder: Path) -> str:
    """Put a pickle in place that would run code, or that holds other things than tensors."""
    evil = _Evil(str(folder / EVIL))
    content = chance.choice(
        [evil, {"x": evil}, {"base_model.model.0.lora_A.weight": evil}, [1], {1: 2}, {"x": [1]}]
    )
    if chance.random() < 0.5:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return "a pickle"
