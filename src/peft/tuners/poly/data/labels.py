# SPDX-License-Identifier: Apache-2.0
"""`TaskLabels`: label sets of several tasks side by side in one classification head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....base.errors import PeftTypeError, PeftValueError
from ....core.routing.task_ids import has_values
from . import heads


class TaskLabels:
    """Label sets of several tasks side by side in one head: of its logits `[batch, total]` each
    task has a range.

    The head is that of a base model with `num_labels=labels.total`. The data holds a label by its
    number in the head, `encode(task, label)`. The loss compares a sample's label with the labels of
    its task only, so that tasks do not compete.

    Args:
        sizes: The number of labels of each task, or their names, in the order of the adapter's
            tasks.

    Attributes:
        total: Number of labels of all tasks.
        tasks: Names of the tasks.
        names: Names of each task's labels; "0", "1", … if only their number is given.

    Raises:
        PeftTypeError: `sizes` is not such a dictionary, or a task's name is not a string.
        PeftValueError: There are no tasks, or a task has no labels or two of the same name.

    Example:
        >>> labels = TaskLabels({"mood": ["bad", "good"], "topic": 3})
        >>> labels.total, labels.encode("topic", 0), labels.encode("mood", "good")
        (5, 2, 1)
        >>> labels.decode(torch.tensor([[0.0, 1.0, 9.0, 8.0, 7.0]]), ["mood"])
        tensor([1])
    """

    def __init__(self, sizes: Mapping[str, int | Sequence[str]]) -> None:
        if not isinstance(sizes, Mapping):
            raise PeftTypeError(
                f"`sizes`={sizes!r} must be a dictionary: a number of labels, or their names, by "
                "task."
            )
        if nameless := [task for task in sizes if not isinstance(task, str)]:
            raise PeftTypeError(
                f"Tasks in `sizes` must have names (strings), not {nameless[0]!r}; numbers are "
                "their places in the dictionary."
            )
        self.names: dict[str, list[str]] = {
            task: _names(task, labels) for task, labels in sizes.items()
        }
        if not self.names:
            raise PeftValueError("`sizes` names no tasks.")
        self.tasks = list(self.names)
        counts = torch.tensor([len(labels) for labels in self.names.values()])
        self.total = int(counts.sum())
        self._starts = dict(zip(self.tasks, (counts.cumsum(0) - counts).tolist(), strict=True))
        owners = torch.arange(len(counts)).repeat_interleave(counts)  # [total], each label's task
        self._owners = {owners.device: owners}

    def __repr__(self) -> str:
        return f"TaskLabels({ {task: len(labels) for task, labels in self.names.items()} })"

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the labels for a model's config: "task: label" by number in the head."""
        return {
            self.encode(task, i): f"{task}: {name}"
            for task in self.tasks
            for i, name in enumerate(self.names[task])
        }

    def span(self, task: int | str) -> slice:
        """Return a task's range of the head.

        Raises:
            PeftValueError: There is no such task.
        """
        name = self._task(task)
        return slice(self._starts[name], self._starts[name] + len(self.names[name]))

    def encode(self, task: int | str, label: int | str) -> int:
        """Return the number in the head of a task's label; −100, which losses ignore, stays.

        Args:
            task: By number or name.
            label: By number within the task, or by name.

        Raises:
            PeftValueError: There is no such task or label.
        """
        name = self._task(task)
        labels = self.names[name]
        number = labels.index(label) if label in labels else _integer(label)
        if number == -100:
            return -100
        if number is None or not 0 <= number < len(labels):
            raise PeftValueError(
                f"Task {name!r} has no label {label!r}; its labels are {', '.join(labels)} (or 0 "
                f"to {len(labels) - 1})."
            )
        return self._starts[name] + number

    def _task(self, task: object) -> str:
        """Return the name of a task, given by number or name."""
        number = None if isinstance(task, bool) else _integer(task)
        if isinstance(task, str) and task in self.names:
            return task
        if number is None or not 0 <= number < len(self.tasks):
            raise PeftValueError(
                f"Unknown task {task!r}; the tasks are {', '.join(self.tasks)} (or 0 to "
                f"{len(self.tasks) - 1})."
            )
        return self.tasks[number]

    def task_of(self, labels: Tensor) -> Tensor:
        """Return the number of each label's task; −100 stays.

        Reads all labels, and so waits for their device.

        Args:
            labels: Numbers in the head.

        Raises:
            PeftTypeError: `labels` is not a tensor of integers.
            PeftValueError: A label is out of range.
        """
        numbers = _integers("labels", labels)
        self._check_range(numbers)
        return torch.where(
            numbers == -100, -100, self._owners_on(numbers.device)[numbers.clamp(min=0)]
        )

    def _check_range(self, labels: Tensor) -> None:
        """Check that labels are numbers in the head, or −100."""
        wrong = ((labels < 0) & (labels != -100)) | (labels >= self.total)
        if wrong.any():
            raise PeftValueError(
                f"`labels` has {int(labels[wrong][0])}; labels of the head are 0 to "
                f"{self.total - 1}, or -100 for those to ignore. `encode` gives them from a task's "
                "labels."
            )

    def _owners_on(self, device: torch.device) -> Tensor:
        """Return the number of every label's task, `[total]`, from a copy kept for each device."""
        if device not in self._owners:
            self._owners[device] = next(iter(self._owners.values())).to(device)
        return self._owners[device]

    def masked(self, logits: object, tasks: object) -> Tensor:
        """Return logits with −∞ for the labels of other tasks.

        Args:
            logits: `[batch, ..., total]`, a tensor, an array or lists.
            tasks: Each sample's task `[batch]`, by number or name, or one for all.

        Raises:
            PeftTypeError: The logits are not real numbers.
            PeftValueError: A task is unknown, the number of tasks is not that of samples, or the
                logits have a wrong shape.
        """
        logits = self._logits(logits)
        numbers = self._numbers(tasks, len(logits)).to(logits.device)
        tasks_of_samples = numbers.view(-1, *[1] * (logits.dim() - 1))
        return logits.masked_fill(tasks_of_samples != self._owners_on(logits.device), -torch.inf)

    def decode(self, logits: object, tasks: object) -> Tensor:
        """Return each sample's best label, by number within its task.

        Reads all logits, and so waits for their device.

        Args:
            logits, tasks: As for `masked`.

        Raises:
            PeftError: As for `masked`.
            PeftValueError: The logits of a sample's task have NaN, or are all −∞.
        """
        masked = self.masked(logits, tasks)
        numbers = self._numbers(tasks, len(masked))
        undecided = ~(masked.amax(-1) > -torch.inf)  # also true for NaN
        if undecided.any():
            place = undecided.nonzero()[0].tolist()
            name = self.tasks[int(numbers[place[0] if len(numbers) > 1 else 0])]
            raise PeftValueError(
                f"`logits{place}` has NaN for labels of task {name!r}, or -inf for all of them: "
                "none is best. Look for the cause in the model, or leave the sample out."
            )
        starts = torch.tensor([self._starts[task] for task in self.tasks])[numbers]
        return masked.argmax(-1) - starts.to(masked.device).view(-1, *[1] * (masked.dim() - 2))

    def loss(
        self, outputs: object, labels: Tensor, num_items_in_batch: float | Tensor | None = None
    ) -> Tensor:
        """Return the cross-entropy of each sample's label among the labels of its task; a
        `compute_loss_func` for `Trainer`.

        The range of labels is checked on a CPU only: elsewhere reading them waits for the device.

        Args:
            outputs: A model's output with `logits` `[batch, ..., total]`, or the logits.
            labels: `[batch, ...]`, numbers in the head; −100 is ignored.
            num_items_in_batch: Divisor of the sum; by default the number of labels.

        Raises:
            PeftTypeError: There are no logits, or the labels are not a tensor of integers.
            PeftValueError: Shapes differ, or a label on the CPU is out of range.
        """
        logits = self._logits(_logits_of(outputs))
        labels = _integers("labels", labels)
        if labels.shape != logits.shape[:-1]:
            raise PeftValueError(
                f"`labels` has the shape {list(labels.shape)}, the logits {list(logits.shape)}; "
                f"expected one label for each row of logits, {list(logits.shape[:-1])}, by number "
                "in the head."
            )
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and has_values(labels):
            self._check_range(labels)
        labels, owners = labels.to(logits.device), self._owners_on(logits.device)
        others = owners[labels.clamp(min=0)].unsqueeze(-1) != owners
        masked = logits.masked_fill(others, -torch.inf).flatten(0, -2).float()
        total = F.cross_entropy(masked, labels.flatten(), ignore_index=-100, reduction="sum")
        if num_items_in_batch is None:
            num_items_in_batch = (labels != -100).sum().clamp(min=1)
        return total / num_items_in_batch

    def _logits(self, values: object) -> Tensor:
        """Return logits as a tensor of real numbers `[batch, ..., total]`."""
        try:
            logits = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError):
            raise PeftTypeError(
                "Logits must be a tensor, an array or lists of numbers, not "
                f"{type(values).__name__}."
            ) from None
        if logits.is_complex():
            raise PeftTypeError(f"Logits must be real numbers, not {logits.dtype}.")
        if logits.dim() < 2:
            raise PeftValueError(
                f"The logits have the shape {list(logits.shape)}; expected [batch, ..., "
                f"{self.total}]. `logits[None]` makes a batch of one sample's."
            )
        if logits.shape[-1] != self.total:
            raise PeftValueError(
                f"The logits are for {logits.shape[-1]} labels, the tasks have {self.total} in "
                f"all; load the base model with `num_labels={self.total}` (`labels.total`)."
            )
        return logits if logits.is_floating_point() else logits.float()

    def narrow(self, model: nn.Module, task: int | str, module: str | None = None) -> nn.Module:
        """Cut the head of a model without adapters down to one task, in place, after
        `merge_and_unload(task_id=task)`.

        Args:
            model: The model.
            task: By number or name.
            module: Path of the linear layer with a row for each label; by default the only one in
                a classification head.

        Returns:
            The model, whose config then has the task's labels.

        Raises:
            PeftTypeError: `model` is not a model, or `module` not a path.
            PeftValueError: The task is unknown, the model has adapters, or there is no such layer
                or more than one.
        """
        span, name = self.span(task), self._task(task)
        if not isinstance(module, (str, type(None))):
            raise PeftTypeError(
                f"`module`={module!r} must be the path of a module of the model, or None for its "
                "head."
            )
        heads.check_unadapted(model, name)
        path = heads.find_head(model, self.total) if module is None else module
        heads.narrow(model, path, heads.linear_at(model, path, self.total), span, self.names[name])
        return model

    def _numbers(self, tasks: object, batch: int) -> Tensor:
        """Return the numbers of tasks, `[batch]` or `[1]`."""
        if hasattr(tasks, "tolist"):
            tasks = (tasks.reshape(-1) if hasattr(tasks, "reshape") else tasks).tolist()
        each: Sequence[object] = tasks if isinstance(tasks, (list, tuple, range)) else [tasks]
        numbers = torch.tensor(
            [self.tasks.index(self._task(task)) for task in each], dtype=torch.long
        )
        if len(numbers) not in (1, batch):
            raise PeftValueError(
                f"`tasks` names {len(numbers)} tasks; expected one for each of {batch} samples, or "
                "one for all."
            )
        return numbers


def _integer(value: object) -> int | None:
    """Return an integer of any type as an `int`, None for other values."""
    try:
        return index(value) if isinstance(value, SupportsIndex) else None
    except TypeError:  # a tensor that is not one integer
        return None


def _integers(name: str, values: object) -> Tensor:
    """Return a tensor of integers as `int64`."""
    if (
        not isinstance(values, Tensor)
        or values.is_floating_point()
        or values.is_complex()
        or values.dtype == torch.bool
    ):
        given = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise PeftTypeError(
            f"`{name}` must be a tensor of integers, labels by number in the head, not {given}."
        )
    return values.long()


def _logits_of(outputs: object) -> Tensor:
    """Return the logits of a model's output."""
    logits = outputs
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    elif isinstance(outputs, Sequence) and outputs:
        logits = outputs[0]
    if not isinstance(logits, Tensor):
        raise PeftTypeError(
            f"`outputs` ({type(outputs).__name__}) has no logits; expected a model's output with "
            "`logits`, a tuple that begins with them, or the logits."
        )
    return logits


def _names(task: str, labels: object) -> list[str]:
    """Return the names of a task's labels, given their number or names."""
    count = None if isinstance(labels, bool) else _integer(labels)
    if count is not None:
        names = [str(i) for i in range(count)]
    elif isinstance(labels, (list, tuple)) and all(isinstance(name, str) for name in labels):
        names = list(labels)
    else:
        raise PeftTypeError(
            f"Task {task!r} has {labels!r} for labels; give their number or their names."
        )
    if not names or len(set(names)) != len(names):
        raise PeftValueError(
            f"Task {task!r} has {labels!r} for labels; give at least one, each with a new name."
        )
    return names
