# SPDX-License-Identifier: Apache-2.0
"""Damage valid files by their structure.

A folder's files are a dictionary in memory. A change takes a file's content and a source of chance
and returns other content with a few words that say what was done. The same changes serve the tests,
the campaign and the search guided by coverage, which gives its bytes as the source of chance.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import peft

from . import forged_pickles, tensor_files
from .values import FIELDS, PATTERNS, RAW, VALUES


class Special(NamedTuple):
    """Something in the place of a file: "folder", "fifo", or "link" with where it leads."""

    kind: str
    target: str = ""


Content = bytes | Special
Files = dict[str, Content]
Change = Callable[[bytes, random.Random], tuple[bytes, str]]

_SPECIALS = (
    Special("folder"),
    Special("fifo"),
    Special("link", "nowhere"),
    Special("link", "/dev/zero"),
    Special("link", "/dev/null"),
    Special("link", "/"),
    Special("link", "adapter_config.json"),
    Special("link", "../place"),
)


class Decisions(random.Random):
    """Chance that bytes decide, as long as there are any; a fixed generator goes on."""

    def __new__(cls, data: bytes) -> Decisions:
        """Make the generator that goes on when the bytes are used up."""
        return super().__new__(cls, 0)

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        super().__init__(0)

    def getrandbits(self, k: int) -> int:
        """Return an integer of `k` bits."""
        size = (k + 7) // 8
        part = self._data[self._at : self._at + size]
        if len(part) < size:
            return super().getrandbits(k)
        self._at += size
        return int.from_bytes(part, "little") & ((1 << k) - 1)

    def random(self) -> float:
        """Return a number from 0 to 1."""
        return self.getrandbits(16) / 2**16


def damaged(files: Files, chance: random.Random) -> tuple[Files, str]:
    """Return a folder's files after one to three changes, and words that say which."""
    result, said = dict(files), []
    names = sorted(name for name in files if not name.endswith(".md"))
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3))):
        name = chance.choice(names)
        content = result[name]
        if isinstance(content, Special):
            continue
        if len(files) > 1 and chance.randrange(64) == 0:
            result[name] = chance.choice(_SPECIALS)
            said.append(f"{name} is a {' to '.join(filter(None, result[name]))}")
            continue
        result[name], what = chance.choice(_changes(name))(content, chance)
        said.append(f"{name}: {what}")
    return result, "; ".join(said)


@lru_cache(maxsize=64)
def _changes(name: str) -> tuple[Change, ...]:
    """Return the changes for a file of this name."""
    result: list[Change] = [_flip, _cut, _splice]
    if name.endswith(".json"):
        result += [_json] * 20 + [_json_text] * 6
    if name.endswith(".jsonl"):
        result += [_lines] * 20
    if name.endswith(".adapters.safetensors"):
        result += [_kinds] * 12
    if name.endswith(".safetensors"):
        result += [tensor_files.header] * 10 + [tensor_files.tensors] * 12
    if name.endswith(".bin"):
        result += [_pickle] * 6 + [_archive] * 4
    return tuple(result)


def _flip(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    result = bytearray(content)
    for _ in range(chance.choice((1, 4, 32))):
        if result:
            result[chance.randrange(len(result))] = chance.randrange(256)
    return bytes(result), "bytes changed"


def _cut(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    whole, anywhere = len(content), chance.randrange(1 + len(content))
    size = chance.choice((0, 1, 7, 8, 9, whole // 2, max(0, whole - 1), anywhere))
    return content[:size] + bytes(chance.choice((0, 0, 64))), f"cut to {size} bytes"


def _splice(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Copy a part of the file to another place in it, or take it out."""
    begin = chance.randrange(1 + len(content))
    part = content[begin : begin + chance.choice((1, 8, 64))]
    to = chance.randrange(1 + len(content))
    if chance.randrange(2):
        return content[:to] + part + content[to:], "a part twice"
    return content[:begin] + content[begin + len(part) :], "a part taken out"


def value(chance: random.Random, old: object = None) -> object:
    """Return a value that a file does not expect."""
    kind = chance.randrange(8)
    if kind == 0:
        return chance.choice(PATTERNS)
    if kind < 3 and isinstance(old, int | float) and not isinstance(old, bool):
        return chance.choice([old + 1, old - 1, old * chance.choice((-1, 0, 2, 10, 1000, 10**6))])
    if kind == 3 and isinstance(old, list) and old:
        return chance.choice([old * 2, old[:-1], old[::-1], [*old, None], [*old, old], old[0]])
    if kind == 4 and isinstance(old, str):
        return chance.choice([old.lower(), old + " ", old * 2, old[:-1], [old], {old: old}])
    return chance.choice(VALUES)


def _json(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Change one value or key of a JSON object, or all of it."""
    tree = _parsed(content)
    if not isinstance(tree, dict) or not tree:
        return _json_text(content, chance)
    tree, said = changed(tree, chance)
    return json.dumps(tree).encode(errors="surrogatepass"), said


def changed(tree: dict[str, Any], chance: random.Random) -> tuple[object, str]:
    """Return a JSON object with another value, key, or all of it."""
    kind = chance.randrange(16)
    if kind == 0:
        tree = value(chance)  # type: ignore[assignment]
        return tree, f"all is {_short(tree)}"
    if kind < 4:  # a field of any method
        key = chance.choice(FIELDS)
        tree[key] = value(chance, tree.get(key))
        return tree, f"{key} is {_short(tree[key])}"
    key = chance.choice(sorted(tree))
    if kind == 4:
        del tree[key]
        return tree, f"without {key}"
    if kind == 5:
        fresh = str(value(chance))
        tree[fresh] = tree.pop(key)
        return tree, f"{key} is called {_short(fresh)}"
    if kind == 6:
        other = chance.choice(sorted(tree))
        tree[key], tree[other] = tree[other], tree[key]
        return tree, f"{key} and {other} have changed places"
    place: Any = tree
    while isinstance(place[key], list | dict) and place[key] and chance.randrange(2):
        place = place[key]
        key = chance.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
    place[key] = value(chance, place[key])
    return tree, f"{key} is {_short(place[key])}"


def _parsed(content: bytes) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _json_text(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Put text into JSON that no writer of JSON writes."""
    raw = chance.choice(RAW)
    kind = chance.randrange(5)
    if kind == 0:
        return raw, f"all is {_short(raw)}"
    if kind == 1:
        return raw + content, f"{_short(raw)} before it"
    if kind == 2:
        return content + raw, f"{_short(raw)} after it"
    tree = _parsed(content)
    if not isinstance(tree, dict) or not tree:
        return content, "unchanged"
    key = chance.choice(sorted(tree))
    if kind == 3:
        entry = json.dumps(key).encode() + b": " + raw + b", "
        return content.replace(b"{", b"{" + entry, 1), f"{key} twice, once {_short(raw)}"
    tree[key] = "\x01"
    text = json.dumps(tree).encode(errors="surrogatepass")
    return text.replace(b'"\\u0001"', raw, 1), f"{key} is {_short(raw)}"


def _lines(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Change a line of JSON, or the order and number of lines."""
    lines = content.split(b"\n")
    at = chance.randrange(len(lines))
    kind = chance.randrange(12)
    if kind == 0:
        lines.insert(chance.randrange(len(lines)), lines[at])
        said = "a line twice"
    elif kind == 1:
        del lines[at]
        said = "without a line"
    elif kind == 2:
        chance.shuffle(lines)
        said = "lines in another order"
    else:
        lines[at], said = chance.choice((_json, _json, _json, _json_text))(lines[at], chance)
    return b"\n".join(lines), f"line {at + 1}: {said}"


def _kinds(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Change the names, configs and headers in the metadata of a pack."""
    split = tensor_files.parsed(content)
    if split is None or not isinstance(split[0].get("__metadata__"), dict):
        return content, "unchanged"
    tree, data = split
    metadata = tree["__metadata__"]
    kinds = _parsed(str(metadata.get("kinds")).encode())
    if not isinstance(kinds, list) or not kinds or not isinstance(kinds[0], dict):
        metadata["kinds"], said = "[]", "no kinds"
        return tensor_files.joined(tree, data), said
    kind = chance.choice(kinds)
    which = chance.randrange(8)
    if which < 3 and isinstance(kind.get("config"), str):
        text, said = chance.choice((_json, _json_text))(kind["config"].encode(), chance)
        kind["config"] = text.decode(errors="replace")
    elif which < 5 and isinstance(kind.get("header"), str):
        text, said = chance.choice((_json, _json_text))(kind["header"].encode(), chance)
        kind["header"] = text.decode(errors="replace")
    elif which == 5:
        kinds.append(dict(kind))
        said = "a kind twice"
    else:
        _, said = changed(kind, chance)
    metadata["kinds"] = json.dumps(kinds)
    return tensor_files.joined(tree, data), f"kinds: {said}"


def _pickle(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Put another pickle in place: one that would run code, that takes memory, or holds else."""
    name = chance.choice(sorted(forged_pickles.forged()))
    return forged_pickles.forged()[name], f"a pickle of {name}"


def _archive(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Change the pickle or the numbers in an archive, so that its sums are right again."""
    result = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
            changed_one = chance.randrange(len(old.namelist()))
            for number, name in enumerate(old.namelist()):
                part = old.read(name)
                if number == changed_one or (name.endswith("data.pkl") and chance.randrange(2)):
                    part, _ = chance.choice((_flip, _cut, _splice))(part, chance)
                kind = chance.choice((zipfile.ZIP_STORED,) * 7 + (zipfile.ZIP_DEFLATED,))
                new.writestr(name, part, kind)
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError):
        return content, "unchanged"
    return result.getvalue(), "an archive's parts changed"


def _short(found: object) -> str:
    text = repr(found)
    return text if len(text) < 60 else f"{text[:50]}… ({len(text)} signs)"


assert peft.__version__  # the registry of fields is full
