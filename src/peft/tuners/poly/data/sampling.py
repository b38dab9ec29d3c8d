# SPDX-License-Identifier: Apache-2.0
"""Which samples of many tasks are seen how often, and metrics for each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from ....base.errors import PeftTypeError, PeftValueError

# Endings of metrics over all tasks, which go before tasks of these names.
_OVER_TASKS = ("mean", "worst")


class TaskSampler(Sampler[int]):
    """A sampler that draws tasks first, `p_t ∝ n_t^(1/T)` for a task of `n_t` samples, and then of
    the task's samples the next in a random order of all of them.

    Args:
        tasks: Each sample's task, by id or name: the data set's column.
        temperature: `T ≥ 1`. 1 draws in proportion to size; `math.inf` draws all tasks alike;
            between, small tasks are drawn more often than their size has it.
        num_samples: Samples of an epoch, by default as many as there are.
        seed: With the epoch it decides the order, the same on all processes.

    Raises:
        PeftValueError: There are no samples, or a value is not allowed.

    Example:
        >>> tasks = ["sum"] * 6 + ["max"] * 2
        >>> TaskSampler(tasks, temperature=math.inf).probabilities
        {'sum': 0.5, 'max': 0.5}

    Source: arXiv:1907.05019, section 3 (temperature)
    """

    def __init__(
        self,
        tasks: Sequence[Any],
        temperature: float = 1.0,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        if not len(tasks):
            raise PeftValueError("`tasks` is empty; pass the task of each sample.")
        if not isinstance(temperature, (int, float)) or not temperature >= 1:
            raise PeftValueError(
                f"`temperature`={temperature!r} must be at least 1; math.inf draws all tasks alike."
            )
        if num_samples is not None and num_samples < 1:
            raise PeftValueError(f"`num_samples`={num_samples} must be at least 1.")
        self.groups: dict[Any, list[int]] = {}
        for i, task in enumerate(tasks.tolist() if isinstance(tasks, torch.Tensor) else tasks):
            self.groups.setdefault(task, []).append(i)
        self.temperature, self.seed, self.epoch = temperature, seed, 0
        self.num_samples = num_samples or len(tasks)

    def __repr__(self) -> str:
        return f"TaskSampler({len(self.groups)} tasks, num_samples={self.num_samples}, temperature={self.temperature})"

    @property
    def probabilities(self) -> dict[Any, float]:
        """How likely each task is drawn."""
        shares = {task: len(group) ** (1 / self.temperature) for task, group in self.groups.items()}
        return {task: share / math.fsum(shares.values()) for task, share in shares.items()}

    def set_epoch(self, epoch: int) -> None:
        """Draw anew for an epoch; without, each pass over the sampler counts as one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        self.epoch += 1
        groups = list(self.groups.values())
        waiting: list[list[int]] = [[] for _ in groups]
        chances = torch.tensor(list(self.probabilities.values()), dtype=torch.float64)
        for task in torch.multinomial(
            chances, self.num_samples, replacement=True, generator=generator
        ).tolist():
            if not waiting[task]:
                order = torch.randperm(len(groups[task]), generator=generator).tolist()
                waiting[task] = [groups[task][i] for i in order]
            yield waiting[task].pop()


def metrics_by_task(
    compute: Callable[[Any], Mapping[str, float]], names: Sequence[str] | None = None
) -> Callable[[Any], dict[str, float]]:
    """A `compute_metrics` for transformers' `Trainer` that gives each metric for every task too,
    with their mean and the worst.

    The trainer has to gather the tasks: `TrainingArguments(label_names=["labels", "task_ids"])`.

    Args:
        compute: Takes predictions with `predictions` and `label_ids` and gives metrics, of which
            more is better.
        names: Names of the tasks by id, such as a config's `task_names`; by default "task_0",
            "task_1", ….

    Returns:
        A function that gives `{metric}_{task}` for each task in the predictions, `{metric}_mean`
        and `{metric}_worst`, and `metric` over all samples. A task called "mean" or "worst" goes by
        its id, as one without a name does: `{metric}_task_0`.

    Raises:
        PeftTypeError: `names` is no list of names. In evaluation: the predictions have no tasks.
        PeftValueError: In evaluation: a task has no name among them.
    """
    if names is not None and (
        isinstance(names, str) or not all(isinstance(name, str) for name in names)
    ):
        raise PeftTypeError(f"`names`={names!r} must be a list of the tasks' names by id, or None.")

    def by_task(prediction: Any) -> dict[str, float]:
        labels = prediction.label_ids
        if not isinstance(labels, (tuple, list)) or len(labels) < 2:
            raise PeftTypeError(
                "There are no tasks in the predictions; set `label_names=['labels', 'task_ids']` "
                "in TrainingArguments."
            )
        *rest, tasks = labels
        own = rest[0] if len(rest) == 1 else tuple(rest)
        every = dict(compute(_part(prediction, own, slice(None))))
        each: dict[str, list[float]] = {}
        for task in sorted({int(t) for t in tasks.reshape(-1)}):
            if names and not 0 <= task < len(names):
                raise PeftValueError(
                    f"`names` has no name for task {task}; it has {len(names)}, for the tasks from "
                    "0."
                )
            name = names[task] if names and names[task] not in _OVER_TASKS else f"task_{task}"
            for key, value in compute(_part(prediction, own, tasks.reshape(-1) == task)).items():
                every[f"{key}_{name}"] = value
                each.setdefault(key, []).append(value)
        for key, values in each.items():
            of_tasks = sum(values) / len(values), min(values)
            every |= {
                f"{key}_{word}": value for word, value in zip(_OVER_TASKS, of_tasks, strict=True)
            }
        return every

    return by_task


def _part(prediction: Any, labels: Any, rows: Any) -> Any:
    """Predictions of some rows."""

    def cut(arrays: Any) -> Any:
        return (
            type(arrays)(cut(a) for a in arrays)
            if isinstance(arrays, (tuple, list))
            else arrays
            if arrays is None
            else arrays[rows]
        )

    return type(prediction)(
        predictions=cut(prediction.predictions),
        label_ids=cut(labels),
        inputs=cut(prediction.inputs),
    )
