# SPDX-License-Identifier: Apache-2.0
"""Task ids in the forms that callers give them in, checked."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...base.errors import PeftTypeError, PeftValueError
from ...base.plain_values import plain
from ...base.suggestions import did_you_mean
from ...base.tracing import shapes, untraced
from ...config import number

# How many names of tasks a message lists; an adapter may have thousands.
_LISTED = 16


def as_task_ids(
    task_ids: Any,
    configs: Sequence[Any],
    batch: int | None,
    device: torch.device,
    argument: str = "task_ids",
    misnamed: str | None = None,
) -> Tensor:
    """Task ids as a tensor `[batch]` or `[1]` on `device`, checked against every adapter that will
    read them.

    Args:
        task_ids: A tensor `[batch]`, `[batch, 1]`, `[1]` or `[]` of integers, a list, one integer,
            or names.
        configs: The adapters' configs.
        batch: Number of samples, if known.
        device: Where the model's inputs are.
        argument: The caller's name for them, for messages.
        misnamed: An argument of the call that was probably meant for them.

    Raises:
        PeftTypeError: A wrong type.
        PeftValueError: None given though there are several tasks, a wrong number, an unknown name,
            or out of range.
    """
    n_tasks = min(config.n_tasks for config in configs)
    if task_ids is None:
        if n_tasks == 1 and all(config.n_tasks == 1 for config in configs):
            return torch.zeros(1, dtype=torch.long, device=device)
        wanted = (
            "one id for each sample" if argument == "task_ids" else "one of them, by id or name"
        )
        meant = (
            f" The argument is called `{argument}`; this call has `{misnamed}`." if misnamed else ""
        )
        raise PeftValueError(
            f"{argument} should not be None: the adapter has {n_tasks} tasks; pass {wanted}.{meant}"
        )
    ids = _integers(task_ids, configs, argument)
    if ids.dim() == 2 and ids.shape[1] == 1:
        ids = ids.squeeze(1)
    ids = ids.reshape(1) if ids.dim() == 0 else ids
    count = shapes(ids)[0][0]
    if count == 0 and argument != "task_ids":
        raise _no_task(argument)
    if (
        ids.dim() != 1
        or (batch is not None and count not in (1, batch))
        or (count == 0 and batch != 0)
    ):
        wanted = (
            "one id for each sample"
            if batch is None
            else f"{batch} ids, one for each sample, or a single one"
        )
        packed = " (texts packed into one row are one sample)" if batch == 1 else ""
        raise PeftValueError(
            f"`{argument}` has shape {list(ids.shape)}; expected {wanted}{packed}."
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


def some_tasks(tasks: Any, config: Any, argument: str = "tasks") -> list[int]:
    """Return the ids of tasks given by id or name, one or several.

    Raises:
        PeftTypeError: A task is neither a number nor a name.
        PeftValueError: There is no such task, or none is named.
    """
    each, cpu = tasks if isinstance(tasks, (list, tuple)) else [tasks], torch.device("cpu")
    numbers = [
        i for task in each for i in as_task_ids(task, [config], None, cpu, argument).tolist()
    ]
    if not numbers:
        raise _no_task(argument)
    return numbers


def one_task(task: Any, config: Any, argument: str = "task_id") -> int:
    """Return the id of a task given by id or name.

    Raises:
        PeftTypeError: It is neither a number nor a name.
        PeftValueError: There is no such task, or several are named.
    """
    first, *more = some_tasks(task, config, argument)
    if more:
        raise PeftValueError(f"`{argument}`={task!r} names {len(more) + 1} tasks; pass one.")
    return first


def task_shares(shares: Mapping[Any, Any], config: Any, argument: str) -> dict[int, float]:
    """Return the share that each task has in a blend, by id; those of a task that comes by id and
    by name add up.

    Raises:
        PeftTypeError: A task is neither a number nor a name.
        PeftValueError: There is no such task, or none is named, or a share is not a finite number.
    """
    if not shares:
        raise PeftValueError(
            f"`{argument}`={{}} names no task; pass a share for each task, by id or name."
        )
    result: dict[int, float] = {}
    for task, share in shares.items():
        share, which = plain(share), one_task(task, config, argument)
        for offence in number(f"{argument}[{task!r}]", share):
            raise PeftValueError(f"{offence} It is the task's share in the blend.")
        result[which] = result.get(which, 0.0) + float(share)
    return result


def task_label(task: int, config: Any) -> str:
    """Return a task as messages call it: its id, and its name where it has one."""
    return f"{task} ({config.task_names[task]!r})" if config.task_names else str(task)


def _no_task(argument: str) -> PeftValueError:
    return PeftValueError(f"`{argument}` names no task; pass at least one, by id or name.")


def _integers(task_ids: Any, configs: Sequence[Any], argument: str) -> Tensor:
    """Task ids of any accepted type as a tensor of integers."""
    if isinstance(task_ids, str):
        task_ids = [task_ids]
    if isinstance(task_ids, (list, tuple)) and any(isinstance(task, str) for task in task_ids):
        names = configs[0].task_names or []
        unknown = [task for task in task_ids if task not in names]
        if unknown:
            raise PeftValueError(
                f"Unknown task names {unknown}; the adapter's are {_names_there(unknown[0], names)}"
            )
        task_ids = [names.index(task) for task in task_ids]
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
    return task_ids


def _names_there(meant: Any, names: Sequence[str]) -> str:
    """Return the end of a message about an unknown task: the first of those there are, and which
    was meant.
    """
    if not names:
        return "none, so use ids."
    return f"{names_shown(names)}.{did_you_mean(str(meant), names)}"


def names_shown(names: Sequence[str]) -> str:
    """Return names of tasks as messages list them: the first, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{list(names[:_LISTED])}{more}"


def name_offences(names: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the names of an adapter's tasks."""
    yield from (f"{name!r} is blank" for name in names if not name.strip())
    yield from (f"{name!r} comes twice" for name, count in Counter(names).items() if count > 1)


def has_values(ids: Tensor) -> bool:
    """Tell if values can be read: there are none in `vmap`, `FakeTensorMode`, on the meta device."""
    if ids.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(ids):
        return False
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    return fakes is None or not fakes.is_fake(ids)
