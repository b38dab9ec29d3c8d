# SPDX-License-Identifier: Apache-2.0
"""`AdapterPack`: many adapters in one safetensors file, whose headers are stored once.

Adapters of one kind, with the same config and the same header, are the rows of one tensor:

| in the file | content |
|---|---|
| `adapters.<k>`, uint8 `[members, bytes]` | the data of their files, as they are |
| `digests.<k>`, uint8 `[members, 32]` | SHA-256 of each complete file |
| metadata `kinds`, JSON | `config`, `header` and the names of the `members` of each kind |

A member's `adapter_model.safetensors` is the length of the header, the header and the row. So a
folder comes back to the bit, one member is read without the others, and any reader of safetensors
can do the same.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from torch import Tensor

from ..base.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from ..base.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    PeftRuntimeError,
    PeftTypeError,
    PeftValueError,
)
from ..base.plain_values import JsonObject, json_object
from ..base.progress import track
from ..base.suggestions import adapters_there
from ..checkpoint.files import alone_in, folder_for, replace_file, sync_folder, write_file
from ..checkpoint.layout import MAX_HEADER, TensorLayout, parse_header, read_layout
from ..checkpoint.paths import as_folder, as_path, check_regular
from .configs import config_from
from .content import Content, LoadedAdapter, file_digest, opened_folder, read_folder
from .entry import PACK_SUFFIX
from .naming import listed

FORMAT_KEY, VERSION = "peft_adapter_pack", "1"
_DIGEST_BYTES = 32


class Kind(NamedTuple):
    """Adapters with the same config and header: the text of the config, and the header."""

    config: str
    header: str

    @property
    def layout(self) -> TensorLayout:
        """The tensors of each."""
        return parse_header(self.header.encode())


class Row(NamedTuple):
    """The place of a member: its kind's number, and its row there."""

    kind: int
    row: int


class PackSizes(NamedTuple):
    """Sizes of a pack in bytes.

    Args:
        members: Number of adapters.
        file: The whole file.
        data: Tensors of the adapters.
        separate: Config and weights files that the members would have by themselves.
    """

    members: int
    file: int
    data: int
    separate: int


@dataclass(frozen=True)
class _Position:
    """Positions in the file at which a kind's rows and digests begin."""

    rows: int
    digests: int


class AdapterPack:
    """Many adapters in one file. Their headers, configs and names are read when it is opened.

    An open pack shows the file as it was when it was opened, if it has been replaced since.

    Args:
        path: The file, as `AdapterPack.write` wrote it.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CheckpointError: It is no pack, or it is damaged, or of a newer version.

    Example:
        `AdapterPack.write("users.adapters.safetensors", {"ada": "users/ada", "ben": "users/ben"})`
        writes one; `AdapterPack("users.adapters.safetensors").load("ada")` reads one adapter.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = as_path(path, "path")
        self._lock = Lock()
        self._shared: dict[str, Tensor] = {}
        check_regular(self.path)
        try:
            self._handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            raise CheckpointNotFoundError(f"Can't find '{self.path}'.") from None
        except OSError as error:
            raise CheckpointError(f"'{self.path}' can't be read: {error}.") from error
        self._close = weakref.finalize(self, os.close, self._handle)
        try:
            self.file_size = os.fstat(self._handle).st_size
            with open(self._handle, "rb", closefd=False) as file:
                layout = read_layout(file, self.file_size, self.path)
        except OSError as error:
            raise CheckpointError(f"'{self.path}' can't be read: {error}.") from error
        self._start = len(layout.prefix)
        self.kinds, self._rows, self._positions = _members(layout, self.path)

    def __enter__(self) -> AdapterPack:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._close()

    def __repr__(self) -> str:
        return f"AdapterPack('{self.path}', {len(self)} adapters, {self.file_size:,} bytes)"

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    @property
    def names(self) -> list[str]:
        """The members' names, in the order of their rows."""
        return list(self._rows)

    def sizes(self) -> PackSizes:
        """Return the pack's size, and that of its members as single folders."""
        data = separate = 0
        for row in self._rows.values():
            kind = self.kinds[row.kind]
            data += kind.layout.nbytes
            separate += kind.layout.file_size + len(kind.config.encode())
        return PackSizes(len(self), self.file_size, data, separate)

    def kind_of(self, name: str) -> Kind:
        """Return a member's config and header."""
        return self.kinds[self.row(name).kind]

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 digest of each member's weights file, without reading the members."""
        result = {}
        by_kind: dict[int, list[str]] = {}
        for name, row in self._rows.items():
            by_kind.setdefault(row.kind, []).append(name)
        for kind, names in by_kind.items():
            text = self._read(self._positions[kind].digests, len(names) * _DIGEST_BYTES)
            for name in names:
                start = self._rows[name].row * _DIGEST_BYTES
                result[name] = bytes(text[start : start + _DIGEST_BYTES]).hex()
        return result

    def digest(self, name: str) -> str:
        """Return the SHA-256 digest of a member's weights file, without reading the member."""
        row = self.row(name)
        start = self._positions[row.kind].digests + row.row * _DIGEST_BYTES
        return bytes(self._read(start, _DIGEST_BYTES)).hex()

    def read(self, name: str) -> bytes:
        """Return the bytes of a member's `adapter_model.safetensors`.

        Raises:
            PeftValueError: There is no such member.
            CheckpointError: Its bytes are not those that were written.
        """
        content = self.content(name)
        return content.layout.prefix + content.data

    def content(self, name: str) -> Content:
        """Return a member as it is stored, checked against its digest."""
        row = self.row(name)
        kind, position = self.kinds[row.kind], self._positions[row.kind]
        layout = kind.layout
        data = self._read(position.rows + row.row * layout.nbytes, layout.nbytes)
        if file_digest(layout, data) != self.digest(name):
            raise CheckpointError(
                f"{name!r} in '{self.path}' is damaged: it does not have the digest that it was "
                "written with. The others can be read; replace it by `update`."
            )
        return Content(kind.config, layout, data, (str(self.path.parent), {}))

    def load(self, name: str) -> LoadedAdapter:
        """Return a member's config and tensors.

        Raises:
            As `read`; and CheckpointNotFoundError if a file that its config names is missing.
        """
        content = self.content(name).with_shared(self._shared)
        self._shared.update(content.shared)
        return content.adapter()

    def unpack(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Write a member as a folder of its own, with the files that it was made of.

        Raises:
            PeftValueError: There is no such member, or `folder` is a file or has an adapter.
            As `read`.
        """
        target = as_folder(folder)
        content = self.content(name)
        weights = target / SAFETENSORS_WEIGHTS_NAME
        if weights.exists():
            raise PeftValueError(f"'{target}' has an adapter already; choose another folder.")
        config, data = content.config_text.encode(), content.layout.prefix + content.data
        with folder_for(target), alone_in(target):
            replace_file(target / CONFIG_NAME, lambda temporary: temporary.write_bytes(config))
            sync_folder(target)
            # Last, since it makes the adapter whole.
            replace_file(weights, lambda temporary: temporary.write_bytes(data))
            sync_folder(target)

    def update(
        self, add: Mapping[str, str | os.PathLike[str]] | None = None, remove: Iterable[str] = ()
    ) -> AdapterPack:
        """Write the file again with members added, replaced or removed, and return it opened.

        The new file takes the place of the old one in one step: a process that is killed leaves one
        or the other. It costs a copy of the file, so change many members at once. Changes that
        others made since this pack was opened stay.

        Args:
            add: Folder of an adapter by the member's name; one of that name is replaced.
            remove: Names of members to leave out.

        Raises:
            PeftValueError: A name is unknown or can't be one; the file is as it was.
            CheckpointError: A folder or a member is damaged; the file is as it was.
        """
        gone = listed(remove, "remove")
        added = {} if add is None else add
        if not isinstance(added, Mapping):
            raise PeftTypeError(f"`add`={add!r} must be a dictionary: name → folder.")

        def write(temporary: Path) -> None:
            with AdapterPack(self.path) as present:
                for name in gone:
                    present.row(name)
                replaced = {*gone, *added}
                kept = {name: present for name in present if name not in replaced}
                _write(temporary, {**kept, **added})

        write_file(self.path, write)
        return AdapterPack(self.path)

    @classmethod
    def write(
        cls, path: str | os.PathLike[str], adapters: Mapping[str, str | os.PathLike[str]]
    ) -> AdapterPack:
        """Write a pack and return it opened.

        Args:
            path: The file; its name ends in `.adapters.safetensors`, by which a library finds it.
            adapters: Folder of each adapter by its name in the pack.

        Raises:
            CheckpointNotFoundError: A folder has no adapter.
            CheckpointError: An adapter is damaged; nothing is written.
            PeftValueError: A name can't be one, or there are none; or no library would find the
                file.
        """
        file = as_path(path, "path")
        if not file.name.endswith(PACK_SUFFIX) or file.name.startswith("."):
            stem = file.name.removesuffix(PACK_SUFFIX).removesuffix(".safetensors").strip(".")
            instead = file.parent / f"{stem or 'users'}{PACK_SUFFIX}"
            raise PeftValueError(
                f"A pack's name ends in '{PACK_SUFFIX}' and does not begin with a dot, so that a "
                f"library finds it; not '{file}'. Write '{instead}'."
            )
        write_file(file, lambda temporary: _write(temporary, adapters))
        return cls(file)

    def row(self, name: object) -> Row:
        """Return the number of a member's kind, and its row there."""
        if not isinstance(name, str) or name not in self._rows:
            raise PeftValueError(
                f"'{self.path}' has no adapter {name!r}; it has {adapters_there(name, self._rows)}"
            )
        return self._rows[name]

    def _read(self, start: int, size: int) -> bytearray:
        """Read bytes of the data. Threads and forked processes may share the file."""
        if not self._close.alive:
            raise PeftRuntimeError(f"The pack '{self.path}' was closed; open it again.")
        result = bytearray(size)
        if hasattr(os, "preadv"):
            count = os.preadv(self._handle, [result], self._start + start)
        else:
            with self._lock:
                os.lseek(self._handle, self._start + start, os.SEEK_SET)
                result = bytearray(os.read(self._handle, size))
                count = len(result)
        if count != size:
            raise CheckpointError(f"'{self.path}' was cut while it was open; write it again.")
        return result


def _members(
    layout: TensorLayout, path: Path
) -> tuple[list[Kind], dict[str, Row], list[_Position]]:
    """Return kinds, members and positions of a pack; raise CheckpointError unless all fit."""
    version = layout.metadata.get(FORMAT_KEY)
    if version != VERSION:
        says = f"it is of version {version}" if version else "it has no such metadata"
        raise CheckpointError(f"'{path}' is no pack of adapters that can be read here: {says}.")
    kinds: list[Kind] = []
    rows: dict[str, Row] = {}
    positions: list[_Position] = []
    try:
        for number, kind in enumerate(json.loads(layout.metadata["kinds"])):
            names = kind["members"]
            kinds.append(Kind(kind["config"], kind["header"]))
            if not all(isinstance(text, str) for text in kinds[-1]):
                raise ValueError(f"config or header of kind {number} is not text")
            json_object(kinds[-1].config, f"the config of kind {number}")
            data, digests = layout.spans[f"adapters.{number}"], layout.spans[f"digests.{number}"]
            expected = (len(names), kinds[-1].layout.nbytes), (len(names), _DIGEST_BYTES)
            own = {name: Row(number, i) for i, name in enumerate(names)}
            if (data.shape, digests.shape) != expected or len(own) != len(names):
                raise ValueError(f"kind {number} does not have a row for each member")
            if own.keys() & rows.keys() or not all(isinstance(name, str) for name in names):
                raise ValueError(f"kind {number} has the member of another, or one without a name")
            rows |= own
            positions.append(_Position(data.begin, digests.begin))
    except (KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"'{path}' is a damaged pack of adapters: {error}.") from None
    return kinds, rows, positions


Source = str | os.PathLike[str] | AdapterPack


def _write(path: Path, sources: Mapping[str, Source]) -> None:
    """Write a new file with adapters in folders and in packs."""
    if not isinstance(sources, Mapping):
        raise PeftTypeError(
            f"Adapters are given by a dictionary: name → folder; got {type(sources).__name__}."
        )
    for name in sources:
        if not isinstance(name, str) or not name or "\n" in name:
            raise PeftValueError(f"An adapter's name {name!r} must be a non-empty string.")
    if not sources:
        raise PeftValueError("A pack holds at least one adapter; name some, or delete the file.")
    by_kind: dict[Kind, list[str]] = {}
    for name in track(list(sources), "Reading headers", unit="adapter"):
        by_kind.setdefault(_kind_of(name, sources[name]), []).append(name)
    _write_rows(path, _header(by_kind), by_kind, sources)


def _kind_of(name: str, source: Source) -> Kind:
    """Return the kind of an adapter in a folder or pack."""
    if isinstance(source, AdapterPack):
        return source.kind_of(name)
    folder = as_folder(source)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise CheckpointNotFoundError(
            f"Can't find '{weights}' for {name!r}; packs hold adapters in safetensors files."
        )
    with opened_folder(folder, SAFETENSORS_WEIGHTS_NAME) as (text, layout, _):
        config_from(text, folder / CONFIG_NAME)
        return Kind(text, layout.header.decode())


def _header(by_kind: Mapping[Kind, list[str]]) -> bytes:
    """Return the length and header of a pack's file."""
    kinds = [{**kind._asdict(), "members": names} for kind, names in by_kind.items()]
    content: JsonObject = {
        "__metadata__": {
            "format": "pt",
            FORMAT_KEY: VERSION,
            "kinds": json.dumps(kinds, ensure_ascii=False, separators=(",", ":")),
        }
    }
    at = 0
    sizes = [(len(names), kind.layout.nbytes) for kind, names in by_kind.items()]
    for word, shapes in (
        ("adapters", sizes),
        ("digests", [(count, _DIGEST_BYTES) for count, _ in sizes]),
    ):
        for number, (count, size) in enumerate(shapes):
            end = at + count * size
            content[f"{word}.{number}"] = {
                "dtype": "U8",
                "shape": [count, size],
                "data_offsets": [at, end],
            }
            at = end
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER:
        raise PeftValueError(
            f"Names and configs take {len(text):,} bytes, and a file's header has {MAX_HEADER:,} "
            "at most; write several packs."
        )
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_rows(
    path: Path, header: bytes, by_kind: Mapping[Kind, list[str]], sources: Mapping[str, Source]
) -> None:
    """Write a pack's file; raise if an adapter changed since the header was made."""
    digests = []
    members = [(kind, name) for kind, names in by_kind.items() for name in names]
    with open(path, "wb") as file:
        file.write(header)
        for kind, name in track(members, "Packing", unit="adapter"):
            source = sources[name]
            if isinstance(source, AdapterPack):
                content, digest = source.content(name), source.digest(name)
            else:
                folder = as_folder(source)
                content, digest = read_folder(folder, SAFETENSORS_WEIGHTS_NAME, (str(folder), {}))
            if Kind(content.config_text, content.layout.header.decode()) != kind:
                raise CheckpointError(f"{name!r} changed while it was packed; pack it again.")
            file.write(content.data)
            digests.append(bytes.fromhex(digest))
        file.writelines(digests)
