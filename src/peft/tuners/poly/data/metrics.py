# SPDX-License-Identifier: Apache-2.0
"""`metrics_by_task`: evaluation metrics for each task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ....base.errors import PeftTypeError, PeftValueError

# Endings of metrics over all tasks. A task of such a name is called by its id.
_OVER_TASKS = ("mean", "worst")


# A class with `predictions`, `label_ids` and `inputs`, as transformers' `EvalPrediction`.
P = TypeVar("P")


def metrics_by_task(
    compute: Callable[[P], Mapping[str, float]], names: Sequence[str] | None = None
) -> Callable[[P], dict[str, float]]:
    """Return a `compute_metrics` for transformers' `Trainer` with each metric for every task, their
    mean and the worst.

    The trainer has to gather the tasks: `TrainingArguments(label_names=["labels", "task_ids"])`.

    Args:
        compute: A function from predictions to metrics; larger metrics are better.
        names: Names of the tasks by id, for instance the config's `task_names`; by default
            "task_0", "task_1", ….

    Returns:
        A function that returns `{metric}_{task}` for each task in the predictions, `{metric}_mean`,
        `{metric}_worst`, and `{metric}` over all samples. A task named "mean" or "worst" is called
        by its id: `{metric}_task_0`.

    Raises:
        PeftTypeError: `names` is not a list of names. In evaluation: the predictions have no tasks.
        PeftValueError: In evaluation: a task has no name among them.
    """
    if names is not None and (
        isinstance(names, str)
        or not isinstance(names, Iterable)
        or not all(isinstance(name, str) for name in names)
    ):
        raise PeftTypeError(f"`names`={names!r} must be a list of the tasks' names by id, or None.")

    def by_task(prediction: P) -> dict[str, float]:
        labels = getattr(prediction, "label_ids", None)
        if not isinstance(labels, (tuple, list)) or len(labels) < 2:
            raise PeftTypeError(
                "There are no tasks in the predictions; set `label_names=['labels', 'task_ids']` "
                "in TrainingArguments."
            )
        *rest, tasks = labels
        tasks = tasks.reshape(-1)
        without_tasks = rest[0] if len(rest) == 1 else tuple(rest)
        metrics = dict(compute(_rows(prediction, without_tasks, slice(None))))
        each: dict[str, list[float]] = {}
        for task in sorted({int(t) for t in tasks}):
            name = _name(task, names)
            for key, value in compute(_rows(prediction, without_tasks, tasks == task)).items():
                metrics[f"{key}_{name}"] = value
                each.setdefault(key, []).append(value)
        for key, values in each.items():
            metrics[f"{key}_mean"] = sum(values) / len(values)
            metrics[f"{key}_worst"] = min(values)
        return metrics

    return by_task


def _name(task: int, names: Sequence[str] | None) -> str:
    """Return the ending of a task's metrics."""
    if names and not 0 <= task < len(names):
        raise PeftValueError(
            f"`names` has no name for task {task}; it has {len(names)}, for the tasks from 0."
        )
    return names[task] if names and names[task] not in _OVER_TASKS else f"task_{task}"


def _rows(prediction: Any, labels: object, rows: object) -> Any:
    """Return the predictions of some rows, with the given labels."""

    def cut(arrays: Any) -> object:
        if isinstance(arrays, (tuple, list)):
            return type(arrays)(cut(array) for array in arrays)
        return arrays if arrays is None else arrays[rows]

    return type(prediction)(
        predictions=cut(prediction.predictions),
        label_ids=cut(labels),
        inputs=cut(prediction.inputs),
    )
