# SPDX-License-Identifier: Apache-2.0
"""A parameter with a row for each task, of which single rows can be trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...base.errors import PeftRuntimeError
from ...integrations.distributed import (
    gathered_tensor,
    is_distributed,
    is_managed,
    is_sharded,
    shard_like,
    write_value,
)


class _Rows(nn.ParameterList):
    """Rows of a table that train. They share its memory, and checkpoints have only the table."""

    def state_dict(self, *args: object, destination: Any = None, **kwargs: object) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        pass


class TaskTable(nn.Module):
    """A parameter `[n_tasks, …]`, of which single rows can be trained.

    `open_rows` freezes the table and makes each run of successive rows a parameter of its own, in
    the table's memory. An optimizer then sees those rows only: the others get no gradient, no
    weight decay and no optimizer state. Saving, merging and converting read the table and so see
    the trained values.

    Attributes:
        table_name: The parameter's name.
        rows: The rows that train.
        fixed: True if the table is never trained.
    """

    table_name: ClassVar[str] = "values"
    fixed = False

    def __init__(self) -> None:
        super().__init__()
        self.rows = _Rows()
        self.runs: list[tuple[int, int]] = []  # start and end in the table of each of `rows`

    def extra_repr(self) -> str:
        """Return the table's shape and the open rows."""
        opened = f", open={self.opened}" if self.runs else ""
        return ", ".join(map(str, self.closed_table.shape)) + opened

    def __repr__(self) -> str:
        return f"{self._get_name()}({self.extra_repr()})"

    @property
    def closed_table(self) -> nn.Parameter:
        """The parameter that holds all rows."""
        return getattr(self, self.table_name)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that the values are in: the table, and rows that train alone."""
        return (self.closed_table, *self.rows) if self.runs else (self.closed_table,)

    def table(self) -> Tensor:
        """Return all rows; gradients reach those that train."""
        values = self.closed_table
        if not self.runs:
            return values
        pieces, end = [], 0
        for row, (start, stop) in zip(self.rows, self.runs, strict=True):
            pieces += [values[end:start], row]
            end = stop
        return torch.cat([*pieces, values[end:]])

    @property
    def opened(self) -> list[int]:
        """The tasks whose rows are open."""
        return [task for start, stop in self.runs for task in range(start, stop)]

    def check_can_open(self) -> None:
        """Check that rows can be trained separately."""
        if is_sharded(self.closed_table):
            raise PeftRuntimeError(
                "An engine has sharded the adapter; choose what trains before the model is sharded."
            )

    def open_rows(self, tasks: Collection[int]) -> None:
        """Train the rows of some tasks and freeze the others."""
        self.check_can_open()
        self.close_rows()
        values = self.closed_table
        values.requires_grad_(False)
        for task in sorted(set(tasks)):
            if self.runs and self.runs[-1][1] == task:
                self.runs[-1] = (self.runs[-1][0], task + 1)
            else:
                self.runs.append((task, task + 1))
        self.rows.extend(nn.Parameter(values.data[start:stop]) for start, stop in self.runs)

    def close_rows(self) -> None:
        """Make the rows part of the table again; whether the table trains stays as it is."""
        self._gather()
        self.rows, self.runs = _Rows().train(self.training), []

    def replace(self, values: Tensor, origin: Sequence[int | None]) -> None:
        """Replace the parameter by `values [n_tasks, …]`; rows that train stay so. `origin` has the
        number of the old row that each row is, None for a new task.
        """
        opened, trains = set(self.opened), self.closed_table.requires_grad
        self.close_rows()
        setattr(self, self.table_name, nn.Parameter(values, requires_grad=trains))
        if opened:
            self.open_rows([task for task, before in enumerate(origin) if before in opened])

    def overwrite(self, values: Tensor) -> None:
        """Write values of the same shape into the table and so into its open rows."""
        write_value(self.closed_table, values)
        for row, (start, stop) in zip(self.rows, self.runs, strict=True):
            if is_managed(row):  # and so not in the table's memory
                write_value(row, values[start:stop])

    @torch.no_grad()
    def _gather(self) -> None:
        """Copy rows that an engine has sharded back into the table."""
        if any(is_distributed(row) for row in self.rows):
            values = gathered_tensor(self.closed_table).clone()
            for row, (start, stop) in zip(self.rows, self.runs, strict=True):
                values[start:stop] = gathered_tensor(row)
            self.closed_table.copy_(shard_like(self.closed_table, values))

    def _tie(self) -> None:
        """Make the rows views of the table again, after either was moved or loaded."""
        for row, (start, stop) in zip(self.rows, self.runs, strict=True):
            row.data = self.closed_table.data[start:stop]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TaskTable:
        super()._apply(fn, recurse)
        self._tie()
        return self

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._tie()

    def _save_to_state_dict(
        self, destination: dict[str, object], prefix: str, keep_vars: bool
    ) -> None:
        self._gather()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._tie()
