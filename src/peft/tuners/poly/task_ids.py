# SPDX-License-Identifier: Apache-2.0
"""Task ids in the forms that callers give them in, checked."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...utils.error import PeftTypeError, PeftValueError
from ...utils.tracing import shapes, untraced


def as_task_ids(
    task_ids: Any, configs: Sequence[Any], batch: int | None, device: torch.device, argument: str = "task_ids"
) -> Tensor:
    """Task ids as a tensor `[batch]` or `[1]` on `device`, checked against every adapter that will read them.

    Args:
        task_ids: A tensor `[batch]`, `[batch, 1]`, `[1]` or `[]` of integers, a list, one integer, or names.
        configs: The adapters' configs.
        batch: Number of samples, if known.
        device: Where the model's inputs are.
        argument: The caller's name for them, for messages.

    Raises:
        PeftTypeError: A wrong type.
        PeftValueError: None given though there are several tasks, a wrong number, an unknown name, or out of range.
    """
    n_tasks = min(config.n_tasks for config in configs)
    if task_ids is None:
        if n_tasks == 1 and all(config.n_tasks == 1 for config in configs):
            return torch.zeros(1, dtype=torch.long, device=device)
        wanted = "one id for each sample" if argument == "task_ids" else "one of them, by id or name"
        raise PeftValueError(f"{argument} should not be None: the adapter has {n_tasks} tasks; pass {wanted}.")
    ids = _integers(task_ids, configs, argument)
    if ids.dim() == 2 and ids.shape[1] == 1:
        ids = ids.squeeze(1)
    ids = ids.reshape(1) if ids.dim() == 0 else ids
    count = shapes(ids)[0][0]
    if ids.dim() != 1 or (batch is not None and count not in (1, batch)) or (count == 0 and batch != 0):
        wanted = "one id for each sample" if batch is None else f"{batch} ids, one for each sample, or a single one"
        packed = " (texts packed into one row are one sample)" if batch == 1 else ""
        raise PeftValueError(f"`{argument}` has shape {list(ids.shape)}; expected {wanted}{packed}.")
    if torch.compiler.is_compiling():
        torch._assert_async(((ids >= 0) & (ids < n_tasks)).all(), f"`{argument}` must be at least 0 and below {n_tasks}.")
    elif count and has_values(ids):
        with untraced():
            lowest, highest = (int(i) for i in torch.stack(ids.aminmax()).tolist())
        if lowest < 0 or highest >= n_tasks:
            raise PeftValueError(
                f"Only {n_tasks} tasks available. Found task id = {lowest if lowest < 0 else highest}; ids count from 0."
            )
    return ids.to(device=device, dtype=torch.long)


def _integers(task_ids: Any, configs: Sequence[Any], argument: str) -> Tensor:
    """Task ids of any accepted type as a tensor of integers."""
    if isinstance(task_ids, str):
        task_ids = [task_ids]
    if isinstance(task_ids, (list, tuple)) and any(isinstance(task, str) for task in task_ids):
        names = configs[0].task_names or []
        unknown = [task for task in task_ids if task not in names]
        if unknown:
            raise PeftValueError(f"Unknown task names {unknown}; the adapter's are {names or 'none, so use ids'}.")
        task_ids = [names.index(task) for task in task_ids]
    if not isinstance(task_ids, Tensor):
        try:
            with untraced():  # a constant
                task_ids = torch.as_tensor(task_ids)
                is_empty = task_ids.numel() == 0
        except (TypeError, ValueError, RuntimeError):
            raise PeftTypeError(f"`{argument}` must be integers, not {type(task_ids).__name__}.") from None
        if is_empty:
            return task_ids.long()  # an empty list has no dtype of its own
    if task_ids.is_floating_point() or task_ids.is_complex() or task_ids.dtype == torch.bool:
        raise PeftTypeError(f"`{argument}` must be integers, not {task_ids.dtype}.")
    return task_ids


def has_values(ids: Tensor) -> bool:
    """Tell if values can be read: there are none in `vmap`, `FakeTensorMode`, on the meta device."""
    if ids.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(ids):
        return False
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    return fakes is None or not fakes.is_fake(ids)
