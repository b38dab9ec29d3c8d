# SPDX-License-Identifier: Apache-2.0
"""Label sets of several tasks, side by side in one classification head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import is_int
from ...utils.constants import SEQ_CLS_HEAD_NAMES
from ...utils.error import PeftTypeError, PeftValueError


class TaskLabels:
    """Label sets of several tasks, side by side in one head: `[batch, total]` logits, of which each task has a range.

    The head is that of a base model with `num_labels=labels.total`, and trained like any other. A label of the data is
    its number in the head, `encode(task, label)`. The loss compares a sample's label with others of its task only, so
    tasks do not compete.

    Args:
        sizes: By task, in the order of the adapter's tasks: how many labels it has, or their names.

    Attributes:
        total: The number of labels of all tasks.
        tasks: The tasks' names.
        names: Each task's labels by name; "0", "1", … where they have none.

    Raises:
        PeftTypeError: `sizes` is no such dictionary.
        PeftValueError: It is empty, or a task has no labels, or two of the same name.

    Example:
        >>> labels = TaskLabels({"mood": ["bad", "good"], "topic": 3})
        >>> labels.total, labels.encode("topic", 0), labels.encode("mood", "good")
        (5, 2, 1)
        >>> labels.decode(torch.tensor([[0.0, 1.0, 9.0, 8.0, 7.0]]), ["mood"])
        tensor([1])
    """

    def __init__(self, sizes: Mapping[str, int | Sequence[str]]) -> None:
        if not isinstance(sizes, Mapping):
            raise PeftTypeError(f"`sizes`={sizes!r} must be a dictionary: a number of labels, or their names, by task.")
        self.names: dict[str, list[str]] = {task: _names(task, labels) for task, labels in sizes.items()}
        if not self.names:
            raise PeftValueError("`sizes` names no tasks.")
        self.tasks = list(self.names)
        counts = torch.tensor([len(labels) for labels in self.names.values()])
        self.total = int(counts.sum())
        self._starts = dict(zip(self.tasks, (counts.cumsum(0) - counts).tolist(), strict=True))
        self._owners = torch.arange(len(counts)).repeat_interleave(counts)  # [total], each label's task

    def __repr__(self) -> str:
        return f"TaskLabels({ {task: len(labels) for task, labels in self.names.items()} })"

    @property
    def id2label(self) -> dict[int, str]:
        """Names for a model's config, "task: label" by number in the head."""
        return {self.encode(task, i): f"{task}: {name}" for task in self.tasks for i, name in enumerate(self.names[task])}

    def span(self, task: int | str) -> slice:
        """Return a task's range of the head.

        Raises:
            PeftValueError: There is no such task.
        """
        name = self._task(task)
        return slice(self._starts[name], self._starts[name] + len(self.names[name]))

    def encode(self, task: int | str, label: int | str) -> int:
        """Return the number in the head of a task's label; −100, which losses leave out, stays.

        Args:
            task: By number or name.
            label: By number within the task, or by name.

        Raises:
            PeftValueError: There is no such task or label.
        """
        name = self._task(task)
        own = self.names[name]
        if label == -100:
            return -100
        number = own.index(label) if label in own else label
        if not hasattr(number, "__index__") or not 0 <= index(number) < len(own):
            raise PeftValueError(f"Task {name!r} has no label {label!r}; its labels are {', '.join(own)}.")
        return self._starts[name] + index(number)

    def _task(self, task: int | str) -> str:
        """Return a task's name."""
        if isinstance(task, int) and 0 <= task < len(self.tasks):
            return self.tasks[task]
        if not isinstance(task, str) or task not in self.names:
            raise PeftValueError(f"Unknown task {task!r}; the tasks are {', '.join(self.tasks)}.")
        return task

    def task_of(self, labels: Tensor) -> Tensor:
        """Return the task of each label of the head, by number; 0 for −100."""
        return self._owners_on(labels.device)[labels.clamp(min=0)]

    def _owners_on(self, device: torch.device) -> Tensor:
        """Return each label's task, kept where it was last asked for."""
        if self._owners.device != device:
            self._owners = self._owners.to(device)
        return self._owners

    def masked(self, logits: Any, tasks: Any) -> Tensor:
        """Return logits with −∞ at the labels of other tasks.

        Args:
            logits: `[batch, ..., total]`, a tensor or an array.
            tasks: Each sample's task, `[batch]` by number or name, or one for all.

        Raises:
            PeftValueError: A task is unknown, or the logits are of another number of labels.
        """
        logits = torch.as_tensor(logits)
        if logits.shape[-1] != self.total:
            raise PeftValueError(f"The logits are for {logits.shape[-1]} labels, the tasks have {self.total} in all.")
        numbers = self._numbers(tasks).to(logits.device)
        own = numbers.view(-1, *[1] * (logits.dim() - 1)) == self._owners_on(logits.device)
        return logits.masked_fill(~own, -torch.inf)

    def decode(self, logits: Any, tasks: Any) -> Tensor:
        """Return each sample's best label, by number within its task.

        Args:
            logits, tasks: As for `masked`.
        """
        masked = self.masked(logits, tasks)
        starts = torch.tensor([self.span(i).start for i in range(len(self.tasks))])[self._numbers(tasks)]
        return masked.argmax(-1) - starts.to(masked.device).view(-1, *[1] * (masked.dim() - 2))

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Return the cross-entropy of each sample's label among those of its task, as `compute_loss_func` of a `Trainer`.

        Args:
            outputs: A model's output with `logits` `[batch, ..., total]`, or the logits.
            labels: `[batch, ...]`, numbers in the head; −100 is left out.
            num_items_in_batch: What the sum is divided by; by default the number of labels.
        """
        logits = outputs if isinstance(outputs, Tensor) else outputs["logits" if isinstance(outputs, Mapping) else 0]
        own = self.task_of(labels).unsqueeze(-1) == self._owners_on(logits.device)
        masked = logits.masked_fill(~own, -torch.inf).flatten(0, -2).float()
        total = F.cross_entropy(masked, labels.flatten(), ignore_index=-100, reduction="sum")
        if num_items_in_batch is None:
            num_items_in_batch = (labels != -100).sum().clamp(min=1)
        return total / num_items_in_batch

    @torch.no_grad()
    def narrow(self, model: nn.Module, task: int | str, module: str | None = None) -> nn.Module:
        """Cut a plain model's head down to one task, in place, after `merge_and_unload(task_id=task)`.

        Args:
            model: A model without adapters.
            task: By number or name.
            module: The path of the linear layer whose rows are the labels; by default the one there is in the head.

        Returns:
            The model, whose config then has the task's number of labels and their names.

        Raises:
            PeftValueError: The task is unknown, or there is no such layer, or there are several.
        """
        span = self.span(task)
        path = module or self._head_of(model)
        old = model.get_submodule(path)
        if not isinstance(old, nn.Linear) or old.out_features != self.total:
            raise PeftValueError(f"`{path}` is no linear layer with {self.total} outputs.")
        new = nn.Linear(old.in_features, span.stop - span.start, old.bias is not None, old.weight.device, old.weight.dtype)
        new.weight.copy_(old.weight[span])
        if old.bias is not None:
            new.bias.copy_(old.bias[span])
        new.requires_grad_(old.weight.requires_grad).train(old.training)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        config: Any = getattr(model, "config", None)
        if hasattr(config, "id2label"):
            names = self.names[self._task(task)]
            config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        if hasattr(model, "num_labels"):
            model.num_labels = span.stop - span.start
        return model

    def _head_of(self, model: nn.Module) -> str:
        """Return the path of the only linear layer in a head that has as many outputs as there are labels."""
        found = [
            path
            for path, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and layer.out_features == self.total and set(path.split(".")) & set(SEQ_CLS_HEAD_NAMES)
        ]
        if len(found) != 1:
            raise PeftValueError(
                f"Found {found or 'no layer'} with {self.total} outputs in {' or '.join(SEQ_CLS_HEAD_NAMES)}; name the one that "
                "gives the labels as `module`."
            )
        return found[0]

    def _numbers(self, tasks: Any) -> Tensor:
        """Return tasks by number, `[batch]` or `[1]`."""
        if isinstance(tasks, (str, int)):
            tasks = [tasks]
        if isinstance(tasks, (list, tuple)):
            tasks = [self.tasks.index(task) if task in self._starts else task for task in tasks]
        numbers = torch.as_tensor(tasks)
        if numbers.numel() and (numbers.min() < 0 or numbers.max() >= len(self.tasks)):
            raise PeftValueError(f"`tasks`={tasks!r} names tasks that there are not; they are {', '.join(self.tasks)}.")
        return numbers.long().reshape(-1).cpu()


def _names(task: str, labels: int | Sequence[str]) -> list[str]:
    """Return a task's labels by name."""
    if is_int(labels):
        names = [str(i) for i in range(labels)]  # type: ignore[arg-type]
    elif isinstance(labels, (list, tuple)) and all(isinstance(name, str) for name in labels):
        names = list(labels)
    else:
        raise PeftTypeError(f"Task {task!r} has {labels!r} for labels; give their number or their names.")
    if not names or len(set(names)) != len(names):
        raise PeftValueError(f"Task {task!r} has {labels!r} for labels; there must be some, each of another name.")
    return names
