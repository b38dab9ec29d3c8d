# SPDX-License-Identifier: Apache-2.0
"""`peft inspect`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import click

from ..base.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..base.errors import CheckpointNotFoundError, PeftError
from ..base.plain_values import JsonObject
from ..base.tables import in_bytes, table
from ..inspection import AdapterContents, inspect_adapter
from ..library import AdapterPack
from ..library.entry import PACK_SUFFIX
from .common import PLACE, Report, shared_options, show


@click.command()
@click.argument("source", type=PLACE)
@shared_options
def inspect(source: str, as_json: bool) -> None:
    """Show what is in an adapter's files.

    SOURCE is an adapter's folder, a file of any program (Hugging Face PEFT, LyCORIS, kohya,
    diffusers), a pack, a folder with many of them, or an id on the Hub. The report has writer,
    method, modules, ranks, dtypes and bytes. No base model is needed.
    """
    show(_report(source), as_json)


@dataclass
class _Pack:
    """The adapters in a pack."""

    path: str

    def to_dict(self) -> JsonObject:
        """Return the report as values of JSON."""
        with AdapterPack(self.path) as pack:
            return {
                "source": self.path,
                "sizes": pack.sizes()._asdict(),
                "adapters": [dict(zip(_COLUMNS, row, strict=True)) for row in _members(pack)],
            }

    def __str__(self) -> str:
        with AdapterPack(self.path) as pack:
            rows = [tuple(map(str, row)) for row in islice(_members(pack), _SHOWN)]
            lines = [f"{self.path}: a pack", table([_COLUMNS, *rows], right=[2])]
            lines += [f"… {len(pack) - _SHOWN} more"] if len(pack) > _SHOWN else []
            sizes = pack.sizes()
        lines.append(
            f"{sizes.members:,} adapters, {in_bytes(sizes.file)}; in folders of their own they "
            f"would take {in_bytes(sizes.separate)}"
        )
        return "\n".join(lines)


_COLUMNS = ("name", "method", "bytes")
# Rows of a pack's table that are printed.
_SHOWN = 40


def _members(pack: AdapterPack) -> Iterator[tuple[str, str, int]]:
    """Yield name, method and bytes of each adapter of a pack."""
    for name in pack.names:
        kind = pack.kind_of(name)
        yield name, str(json.loads(kind.config).get("peft_type")), kind.layout.nbytes


@dataclass
class _Several:
    """The adapters in a folder."""

    folder: str
    adapters: list[AdapterContents] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> JsonObject:
        """Return the report as values of JSON."""
        adapters = [contents.to_dict() for contents in self.adapters]
        return {"folder": self.folder, "adapters": adapters, "broken": self.broken}

    def __str__(self) -> str:
        rows = [("file", "method", "modules", "ranks", "parameters", "bytes", "writer")]
        for contents in self.adapters:
            ranks = ", ".join("full" if rank is None else str(rank) for rank in contents.ranks)
            rows.append(
                (
                    str(Path(contents.source).relative_to(self.folder)),
                    ", ".join(contents.methods) or "?",
                    str(len(contents.modules)),
                    ranks or "?",
                    f"{contents.parameters:,}",
                    in_bytes(contents.file_bytes),
                    contents.writer,
                )
            )
        lines = [table(rows, right=[2, 4, 5])]
        lines += [f"! {name}: {reason}" for name, reason in self.broken.items()]
        return "\n".join(lines)


def _report(source: str) -> Report:
    """Return the contents of a source, or of the adapters below a folder."""
    folder = Path(source)
    if folder.is_file() and source.endswith(PACK_SUFFIX):
        return _Pack(source)
    names = SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, CONFIG_NAME
    if not folder.is_dir() or any((folder / name).is_file() for name in names):
        return inspect_adapter(source)
    result = _Several(source)
    files = {path.parent / SAFETENSORS_WEIGHTS_NAME for path in folder.rglob(CONFIG_NAME)}
    loose = {path for path in folder.glob("*.safetensors") if not path.name.endswith(PACK_SUFFIX)}
    for path in sorted(files | loose):
        try:
            result.adapters.append(inspect_adapter(path if path.is_file() else path.parent))
        except PeftError as error:
            result.broken[str(path.relative_to(folder))] = str(error)
    if not result.adapters and not result.broken:
        raise CheckpointNotFoundError(f"The folder '{source}' has no adapter in it.")
    return result
