# SPDX-License-Identifier: Apache-2.0
"""The report of a command that wrote an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..base.plain_values import JsonObject
from ..base.tables import in_bytes, table
from ..inspection import inspect_adapter


@dataclass
class Written:
    """The place and the errors of an adapter that was written.

    Attributes:
        output: The folder or file.
        errors: Relative error of the conversion, of each adapter or layer; None if none was
            computed.
        error: The same of all together.
    """

    output: str
    errors: dict[str, float] = field(default_factory=dict)
    error: float | None = None

    def to_dict(self) -> JsonObject:
        """Return the report as values of JSON."""
        contents = inspect_adapter(self.output)
        return {
            "output": self.output,
            "methods": contents.methods,
            "modules": len(contents.modules),
            "parameters": contents.parameters,
            "file_bytes": contents.file_bytes,
            "error": self.error,
            "errors": self.errors,
        }

    def __str__(self) -> str:
        contents = inspect_adapter(self.output)
        ranks = [str(rank) for rank in contents.ranks if rank is not None]
        of_rank = f" of rank {ranks[0]}" if len(ranks) == 1 else ""
        of_rank = f" of ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else of_rank
        lines = [
            f"Wrote {', '.join(contents.methods)}{of_rank} on {len(contents.modules)} modules, "
            f"{contents.parameters:,} parameters, {in_bytes(contents.file_bytes)}, to {self.output}"
        ]
        inexact = {name: error for name, error in self.errors.items() if error > 0}
        if self.error is not None:
            exact = f"{self.error:.3g} of its Frobenius norm" if inexact else "none, it is exact"
            lines.append(f"error of the delta: {exact}")
        if inexact:
            worst = sorted(inexact.items(), key=lambda item: -item[1])[:8]
            rows = [("largest errors", "error"), *((name, f"{e:.3g}") for name, e in worst)]
            lines.append(table(rows, right=[1]))
        return "\n".join(lines)


@dataclass
class WrittenTasks:
    """The folders that tasks were written to, with the error of each."""

    output: str
    errors: Mapping[str, float]

    def to_dict(self) -> JsonObject:
        """Return the report as values of JSON."""
        return {"output": self.output, "tasks": dict(self.errors)}

    def __str__(self) -> str:
        rows = [("folder", "error")]
        rows += [(str(Path(self.output, name)), f"{e:.3g}") for name, e in self.errors.items()]
        return table(rows, right=[1])
