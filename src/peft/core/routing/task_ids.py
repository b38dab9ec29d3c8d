# SPDX-License-Identifier: Apache-2.0
"""Task ids in the forms that callers may pass, checked: tensors, lists, integers, names."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from ...base.errors import PeftTypeError, PeftValueError
from ...base.plain_values import plain
from ...base.suggestions import did_you_mean
from ...base.tracing import is_one_of, shapes, untraced
from ...base.validation import number

Shares: TypeAlias = Mapping[int, float] | Mapping[str, float] | Mapping[int | str, float]
"""The share of each task in a blend, by id, by name, or by both."""

# Largest number of task names in a message; an adapter may have thousands.
_LISTED = 16


class HasTasks(Protocol):
    """The tasks of an adapter, as its config or its router tells them."""

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""

    @property
    def task_names(self) -> Sequence[str] | None:
        """Names of the tasks by id, None without names."""


def as_task_ids(
    task_ids: object,
    adapters: Sequence[HasTasks],
    samples: int | None,
    device: torch.device,
    argument: str = "task_ids",
    misnamed: str | None = None,
) -> Tensor:
    """Return task ids as a tensor `[samples]` or `[1]` on `device`, checked against every adapter
    that reads them.

    Args:
        task_ids: A tensor `[samples]`, `[samples, 1]`, `[1]` or `[]` of integers; a list; one
            integer; or names.
        misnamed: Another argument of the call that was probably meant to be the task ids.
    """
    n_tasks = min(adapter.n_tasks for adapter in adapters)
    if task_ids is None:
        if all(adapter.n_tasks == 1 for adapter in adapters):
            return torch.zeros(1, dtype=torch.long, device=device)
        raise _missing(f"{n_tasks} {_noun(adapters)}s", argument, misnamed)
    ids = _integers(task_ids, adapters, argument)
    if ids.device.type == "meta" != device.type:
        raise PeftValueError(
            f"`{argument}` is on the meta device and has no values; pass ids on a device of the "
            "model's, or a list."
        )
    if ids.dim() == 2 and ids.shape[1] == 1:
        ids = ids.squeeze(1)
    ids = ids.reshape(1) if ids.dim() == 0 else ids
    count = shapes(ids)[0][0]
    if count == 0 and argument != "task_ids":
        raise _no_task(argument)
    fits = is_one_of(count, (1, samples)) if samples is not None else count > 0
    if ids.dim() != 1 or not fits:
        expected = "one id for each sample"
        if samples is not None:
            expected = f"{samples} ids, one for each sample, or a single one"
        packed = " (texts packed into one row are one sample)" if samples == 1 else ""
        raise PeftValueError(
            f"`{argument}` has shape {list(ids.shape)}; expected {expected}{packed}."
        )
    if torch.compiler.is_compiling():
        torch._assert_async(
            ((ids >= 0) & (ids < n_tasks)).all(),
            f"`{argument}` must be at least 0 and below {n_tasks}.",
        )
    elif count and has_values(ids):
        with untraced():
            lowest, highest = (int(i) for i in torch.stack(ids.aminmax()).tolist())
        if lowest < 0 or highest >= n_tasks:
            raise PeftValueError(
                f"Only {n_tasks} tasks available. Found task id = "
                f"{lowest if lowest < 0 else highest}; ids count from 0."
            )
    return ids.to(device=device, dtype=torch.long)


def some_tasks(tasks: object, adapter: HasTasks, argument: str = "tasks") -> list[int]:
    """Return the ids of one or several tasks, each given by id or name."""
    each, cpu = tasks if isinstance(tasks, (list, tuple)) else [tasks], torch.device("cpu")
    numbers = [
        i for task in each for i in as_task_ids(task, [adapter], None, cpu, argument).tolist()
    ]
    if not numbers:
        raise _no_task(argument)
    return numbers


def one_task(task: object, adapter: HasTasks, argument: str = "task_id") -> int:
    """Return the id of a task given by id or name."""
    first, *more = some_tasks(task, adapter, argument)
    if more:
        raise PeftValueError(f"`{argument}`={task!r} names {len(more) + 1} tasks; pass one.")
    return first


def task_shares(shares: Shares, adapter: HasTasks, argument: str) -> dict[int, float]:
    """Return the share of each task in a blend, by id; a task given by id and by name has the sum
    of both shares.
    """
    if not shares:
        raise PeftValueError(
            f"`{argument}`={{}} names no task; pass a share for each task, by id or name."
        )
    result: dict[int, float] = {}
    for task, share in shares.items():
        share, which = plain(share), one_task(task, adapter, argument)
        for offence in number(f"{argument}[{task!r}]", share):
            raise PeftValueError(f"{offence} It is the task's share in the blend.")
        result[which] = result.get(which, 0.0) + float(share)
    return result


def task_label(task: int, adapter: HasTasks) -> str:
    """Return a task for messages: its id, and its name if it has one."""
    return f"{task} ({adapter.task_names[task]!r})" if adapter.task_names else str(task)


def names_shown(names: Sequence[str]) -> str:
    """Return task names for messages: the first ones, and the number of others."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{list(names[:_LISTED])}{more}"


def name_offences(names: Sequence[str]) -> Iterator[str]:
    """Yield the faults of the names of an adapter's tasks: blank names and duplicates."""
    yield from (f"{name!r} is blank" for name in names if not name.strip())
    yield from (f"{name!r} comes twice" for name, count in Counter(names).items() if count > 1)


def has_values(ids: Tensor) -> bool:
    """Return whether values can be read: not in `vmap`, `FakeTensorMode` or on the meta device."""
    if ids.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(ids):
        return False
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    return fakes is None or not fakes.is_fake(ids)


def _noun(adapters: Sequence[HasTasks]) -> str:
    """Return what adapters call their tasks, for messages."""
    nouns = {getattr(adapter, "task_noun", "task") for adapter in adapters}
    return nouns.pop() if len(nouns) == 1 else "task"


def _missing(tasks: str, argument: str, misnamed: str | None) -> PeftValueError:
    """Return the error for task ids that are missing."""
    wanted = "one id for each sample" if argument == "task_ids" else "one of them, by id or name"
    meant = ""
    if misnamed:
        meant = f" The argument is called `{argument}`; this call has `{misnamed}`."
    return PeftValueError(
        f"{argument} should not be None: the adapter has {tasks}; pass {wanted}.{meant}"
    )


def _no_task(argument: str) -> PeftValueError:
    """Return the error for an empty list of tasks."""
    return PeftValueError(f"`{argument}` names no task; pass at least one, by id or name.")


def _ids_of_names(
    names: Sequence[object], adapters: Sequence[HasTasks], argument: str
) -> list[int]:
    """Return the ids of task names, which must be the same in all adapters."""
    every = []
    for adapter in adapters:
        own = adapter.task_names or []
        unknown = [name for name in names if name not in own]
        if unknown:
            known = "none, so use ids."
            if own:
                known = f"{names_shown(own)}.{did_you_mean(str(unknown[0]), own)}"
            whose = "the adapter's" if len(adapters) == 1 else "those of one active adapter"
            noun = _noun(adapters)
            raise PeftValueError(f"Unknown {noun} names {unknown}; {whose} are {known}")
        every.append([own.index(str(name)) for name in names])
    for name, first, *more in zip(names, *every, strict=True):
        if others := set(more) - {first}:
            raise PeftValueError(
                f"`{argument}`={name!r} is task {first} of one active adapter and task "
                f"{min(others)} of another. Bring their tasks into the same order with "
                "`reorder_tasks`, or pass ids, which each adapter counts in its own order."
            )
    return every[0]


def _integers(task_ids: object, adapters: Sequence[HasTasks], argument: str) -> Tensor:
    """Return task ids of any accepted form as a tensor of integers."""
    if getattr(getattr(task_ids, "dtype", None), "kind", "") in ("U", "O", "T"):
        task_ids = cast(Any, task_ids).tolist()  # an array of names
    if isinstance(task_ids, str):
        task_ids = [task_ids]
    if isinstance(task_ids, (list, tuple)) and any(isinstance(task, str) for task in task_ids):
        task_ids = _ids_of_names(task_ids, adapters, argument)
    if not isinstance(task_ids, Tensor):
        try:
            with untraced():  # a constant
                task_ids = torch.as_tensor(task_ids)
                is_empty = task_ids.numel() == 0
        except (TypeError, ValueError, RuntimeError):
            raise PeftTypeError(
                f"`{argument}` must be integers, not {type(task_ids).__name__}; ids or names go in "
                "a list."
            ) from None
        if is_empty:
            return task_ids.long()  # an empty list has no dtype of its own
    if task_ids.is_floating_point() or task_ids.is_complex() or task_ids.dtype == torch.bool:
        raise PeftTypeError(f"`{argument}` must be integers, not {task_ids.dtype}.")
    return task_ids.long()  # torch has few operations on other unsigned integers than bytes
