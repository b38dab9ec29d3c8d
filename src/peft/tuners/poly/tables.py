# SPDX-License-Identifier: Apache-2.0
"""A tensor with a row for each task, of which some rows can be trained by themselves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...base.errors import PeftRuntimeError
from ...integrations.distributed import gathered_tensor, is_distributed, is_managed, shard_like


class _Rows(nn.ParameterList):
    """Rows of a table that are trained by themselves. They share the table's memory, and a
    checkpoint has the table.
    """

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class TaskTable(nn.Module):
    """A parameter `[n_tasks, …]`.

    Rows can be opened for training: each run of successive rows becomes a parameter of its own, in
    the table's memory, and the table is frozen. An optimiser then sees those rows alone: closed
    rows get no gradient, no weight decay, and have no state in it. All that reads the table
    (saving, merging, converting) sees what was learned.

    Attributes:
        table_name: The parameter's name.
        rows: The rows that are open.
    """

    table_name: ClassVar[str] = "values"

    def __init__(self) -> None:
        super().__init__()
        self.rows = _Rows()
        self.runs: list[tuple[int, int]] = []  # where each of `rows` begins in the table, and ends

    def extra_repr(self) -> str:
        """The table's shape, and which rows are open."""
        opened = f", open={self.opened}" if self.runs else ""
        return ", ".join(map(str, self.closed_table.shape)) + opened

    def __repr__(self) -> str:
        return f"{self._get_name()}({self.extra_repr()})"

    @property
    def closed_table(self) -> nn.Parameter:
        """The parameter itself."""
        return getattr(self, self.table_name)

    def table(self) -> Tensor:
        """All rows, through which gradients reach what is trained of them."""
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
        """Check that rows can be opened.

        Raises:
            PeftRuntimeError: An engine holds the table's memory.
        """
        if is_managed(self.closed_table):
            raise PeftRuntimeError(
                "An engine has sharded the adapter; choose what trains before the model is sharded."
            )

    def open_rows(self, tasks: Collection[int]) -> None:
        """Train the rows of some tasks, and no others.

        Raises:
            PeftRuntimeError: An engine holds the table's memory.
        """
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
        """Train no rows by themselves; the table stays frozen or not as it is."""
        self._gather()
        self.rows, self.runs = _Rows(), []

    def replace(self, values: Tensor, origin: Sequence[int | None]) -> None:
        """Put another table in place, with the rows open that were.

        Args:
            values: `[n_tasks, …]`.
            origin: For each of its rows the number it had, None for new ones.
        """
        opened = set(self.opened)
        self.close_rows()
        setattr(
            self,
            self.table_name,
            nn.Parameter(values, requires_grad=self.closed_table.requires_grad),
        )
        if opened:
            self.open_rows([task for task, before in enumerate(origin) if before in opened])

    @torch.no_grad()
    def overwrite(self, values: Tensor) -> None:
        """Write other values of the same shape into the table; rows that are open have them too."""
        self.closed_table.copy_(values)

    @torch.no_grad()
    def _gather(self) -> None:
        """Where an engine has put rows elsewhere, bring the table up to date."""
        if any(is_distributed(row) for row in self.rows):
            values = gathered_tensor(self.closed_table).clone()
            for row, (start, stop) in zip(self.rows, self.runs, strict=True):
                values[start:stop] = gathered_tensor(row)
            self.closed_table.copy_(shard_like(self.closed_table, values))

    def _tie(self) -> None:
        """Give the rows the table's memory again, which has the same values."""
        for row, (start, stop) in zip(self.rows, self.runs, strict=True):
            row.data = self.closed_table.data[start:stop]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TaskTable:
        super()._apply(fn, recurse)
        self._tie()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tie()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._gather()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._tie()
