# SPDX-License-Identifier: Apache-2.0
"""`peft inspect`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import click

from ..base.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..base.errors import CheckpointNotFoundError, PeftError
from ..base.plain_values import JsonObject
from ..base.tables import in_bytes, table
from ..inspection import AdapterContents, inspect_adapter
from .common import PLACE, Report, shared_options, show


@click.command()
@click.argument("source", type=PLACE)
@shared_options
def inspect(source: str, as_json: bool) -> None:
    """Show what is in an adapter's files.

    SOURCE is an adapter's folder, a file of any program (Hugging Face PEFT, LyCORIS, kohya,
    diffusers), a folder with many of them, or an id on the Hub. The report has writer, method,
    modules, ranks, dtypes and bytes. No base model is needed.
    """
    show(_report(source), as_json)


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
    own = [folder / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, CONFIG_NAME)]
    if not folder.is_dir() or any(path.is_file() for path in own):
        return inspect_adapter(source)
    result = _Several(source)
    files = {path.parent / SAFETENSORS_WEIGHTS_NAME for path in folder.rglob(CONFIG_NAME)}
    for path in sorted({*files, *folder.glob("*.safetensors")}):
        try:
            result.adapters.append(inspect_adapter(path if path.is_file() else path.parent))
        except PeftError as error:
            result.broken[str(path.relative_to(folder))] = str(error)
    if not result.adapters and not result.broken:
        raise CheckpointNotFoundError(f"The folder '{source}' has no adapter in it.")
    return result
