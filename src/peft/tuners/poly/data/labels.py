# SPDX-License-Identifier: Apache-2.0
"""Label sets of several tasks, side by side in one classification head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....base.constants import SEQ_CLS_HEAD_NAMES
from ....base.errors import PeftTypeError, PeftValueError
from ....base.suggestions import did_you_mean
from ....core.auxiliary import AuxiliaryTrainingWrapper
from ....core.layer import BaseTunerLayer
from ..task_ids import has_values


class TaskLabels:
    """Label sets of several tasks, side by side in one head: `[batch, total]` logits, of which each
    task has a range.

    The head is that of a base model with `num_labels=labels.total`, and trained like any other. A
    label of the data is its number in the head, `encode(task, label)`. The loss compares a sample's
    label with others of its task only, so tasks do not compete.

    Args:
        sizes: By task, in the order of the adapter's tasks: how many labels it has, or their names.

    Attributes:
        total: The number of labels of all tasks.
        tasks: The tasks' names.
        names: Each task's labels by name; "0", "1", … where they have none.

    Raises:
        PeftTypeError: `sizes` is no such dictionary, or a task in it has no name.
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
        """Names for a model's config, "task: label" by number in the head."""
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
        """Return the number in the head of a task's label; −100, which losses leave out, stays.

        Args:
            task: By number or name.
            label: By number within the task, or by name.

        Raises:
            PeftValueError: There is no such task or label.
        """
        name = self._task(task)
        own = self.names[name]
        number = (
            own.index(label) if label in own else None if isinstance(label, str) else _whole(label)
        )
        if number == -100:
            return -100
        if number is None or not 0 <= number < len(own):
            raise PeftValueError(
                f"Task {name!r} has no label {label!r}; its labels are {', '.join(own)} (or 0 to "
                f"{len(own) - 1})."
            )
        return self._starts[name] + number

    def _task(self, task: Any) -> str:
        """Return a task's name.

        Raises:
            PeftValueError: There is no such task.
        """
        number = None if isinstance(task, (str, bool)) else _whole(task)
        if isinstance(task, str) and task in self.names:
            return task
        if number is None or not 0 <= number < len(self.tasks):
            raise PeftValueError(
                f"Unknown task {task!r}; the tasks are {', '.join(self.tasks)} (or 0 to "
                f"{len(self.tasks) - 1})."
            )
        return self.tasks[number]

    def task_of(self, labels: Tensor) -> Tensor:
        """Return the task of each label of the head, by number; −100 stays, being no task's.

        All labels are looked at, which waits for their device.

        Raises:
            PeftTypeError: `labels` is no tensor of integers.
            PeftValueError: A label is out of range.
        """
        numbers = _integers("labels", labels)
        self._check_range(numbers)
        return torch.where(
            numbers == -100, -100, self._owners_on(numbers.device)[numbers.clamp(min=0)]
        )

    def _check_range(self, labels: Tensor) -> None:
        """Insist on labels of the head, or −100.

        Raises:
            PeftValueError: One is out of range.
        """
        wrong = ((labels < 0) & (labels != -100)) | (labels >= self.total)
        if wrong.any():
            raise PeftValueError(
                f"`labels` has {int(labels[wrong][0])}; labels of the head are 0 to "
                f"{self.total - 1}, or -100 for those that are "
                "left out. `encode` gives them from a task's own."
            )

    def _owners_on(self, device: torch.device) -> Tensor:
        """Return each label's task, kept on every device where it was asked for."""
        if device not in self._owners:
            self._owners[device] = next(iter(self._owners.values())).to(device)
        return self._owners[device]

    def masked(self, logits: Any, tasks: Any) -> Tensor:
        """Return logits with −∞ at the labels of other tasks.

        Args:
            logits: `[batch, ..., total]`, a tensor, an array or lists.
            tasks: Each sample's task, `[batch]` by number or name, or one for all.

        Raises:
            PeftTypeError: The logits are no numbers.
            PeftValueError: A task is unknown, there is not one for each sample, or the logits have
                another shape.
        """
        logits = self._logits(logits)
        numbers = self._numbers(tasks, len(logits)).to(logits.device)
        own = numbers.view(-1, *[1] * (logits.dim() - 1)) == self._owners_on(logits.device)
        return logits.masked_fill(~own, -torch.inf)

    def decode(self, logits: Any, tasks: Any) -> Tensor:
        """Return each sample's best label, by number within its task.

        All logits are looked at, which waits for their device.

        Args:
            logits, tasks: As for `masked`.

        Raises:
            As for `masked`.
            PeftValueError: A sample has NaN among the logits of its task, or nothing but −∞, so
                that none is best.
        """
        masked = self.masked(logits, tasks)
        numbers = self._numbers(tasks, len(masked))
        undecided = ~(masked.amax(-1) > -torch.inf)  # which NaN is not either
        if undecided.any():
            place = undecided.nonzero()[0].tolist()
            name = self.tasks[int(numbers[place[0] if len(numbers) > 1 else 0])]
            raise PeftValueError(
                f"`logits{place}` has NaN for labels of task {name!r}, or -inf for all of them: "
                "none is best. Look for what made "
                "them so in the model, or leave the sample out."
            )
        starts = torch.tensor([self._starts[task] for task in self.tasks])[numbers]
        return masked.argmax(-1) - starts.to(masked.device).view(-1, *[1] * (masked.dim() - 2))

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Return the cross-entropy of each sample's label among those of its task, as
        `compute_loss_func` of a `Trainer`.

        Types and shapes are checked, the range of labels only on a CPU: elsewhere a label out of
        range is for torch to find, since a look at values waits for the device.

        Args:
            outputs: A model's output with `logits` `[batch, ..., total]`, or the logits.
            labels: `[batch, ...]`, numbers in the head; −100 is left out.
            num_items_in_batch: What the sum is divided by; by default the number of labels.

        Raises:
            PeftTypeError: There are no logits, or the labels are no tensor of integers.
            PeftValueError: A shape differs, or a label on the CPU is out of range.
        """
        logits = self._logits(_logits_of(outputs))
        labels = _integers("labels", labels)
        if labels.shape != logits.shape[:-1]:
            raise PeftValueError(
                f"`labels` has the shape {list(labels.shape)}, the logits {list(logits.shape)}; "
                "expected one label for each row "
                f"of logits, {list(logits.shape[:-1])}, by number in the head."
            )
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and has_values(labels):
            self._check_range(labels)
        labels, owners = labels.to(logits.device), self._owners_on(logits.device)
        own = owners[labels.clamp(min=0)].unsqueeze(-1) == owners
        masked = logits.masked_fill(~own, -torch.inf).flatten(0, -2).float()
        total = F.cross_entropy(masked, labels.flatten(), ignore_index=-100, reduction="sum")
        if num_items_in_batch is None:
            num_items_in_batch = (labels != -100).sum().clamp(min=1)
        return total / num_items_in_batch

    def _logits(self, logits: Any) -> Tensor:
        """Return logits as a tensor of real numbers `[batch, ..., total]`.

        Raises:
            PeftTypeError: They are no numbers.
            PeftValueError: They have another shape.
        """
        try:
            logits = torch.as_tensor(logits)
        except (TypeError, ValueError, RuntimeError):
            raise PeftTypeError(
                "Logits must be a tensor, an array or lists of numbers, not "
                f"{type(logits).__name__}."
            ) from None
        if logits.is_complex():
            raise PeftTypeError(f"Logits must be real numbers, not {logits.dtype}.")
        if logits.dim() < 2:
            raise PeftValueError(
                f"The logits have the shape {list(logits.shape)}; expected [batch, ..., "
                f"{self.total}]. `logits[None]` makes a "
                "batch of one sample's."
            )
        if logits.shape[-1] != self.total:
            raise PeftValueError(
                f"The logits are for {logits.shape[-1]} labels, the tasks have {self.total} in "
                "all; load the base model with "
                f"`num_labels={self.total}` (`labels.total`)."
            )
        return logits if logits.is_floating_point() else logits.float()

    @torch.no_grad()
    def narrow(self, model: nn.Module, task: int | str, module: str | None = None) -> nn.Module:
        """Cut a plain model's head down to one task, in place, after
        `merge_and_unload(task_id=task)`.

        Args:
            model: A model without adapters.
            task: By number or name.
            module: The path of the linear layer whose rows are the labels; by default the one there
                is in the head.

        Returns:
            The model, whose config then has the task's number of labels and their names.

        Raises:
            PeftTypeError: The model is none.
            PeftValueError: The task is unknown, or there is no such layer, or there are several; or
                there are adapters.
        """
        span = self.span(task)
        if not isinstance(model, nn.Module):
            raise PeftTypeError(f"`model` must be a model, not {type(model).__name__}.")
        if not isinstance(module, (str, type(None))):
            raise PeftTypeError(
                f"`module`={module!r} must be the path of a module of the model, or None for its "
                "head."
            )
        adapted = (
            path
            for path, layer in model.named_modules()
            if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        )
        if (with_adapters := next(adapted, None)) is not None:
            raise PeftValueError(
                f"The model has adapters (in `{with_adapters}`); call "
                f"`merge_and_unload(task_id={self._task(task)!r})` first and "
                "narrow the model that it returns."
            )
        path = self._head_of(model) if module is None else module
        old = self._linear(model, path)
        new = nn.Linear(
            old.in_features,
            span.stop - span.start,
            old.bias is not None,
            old.weight.device,
            old.weight.dtype,
        )
        new.weight.copy_(old.weight[span])
        if old.bias is not None:
            new.bias.copy_(old.bias[span])
        new.requires_grad_(old.weight.requires_grad).train(old.training)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        config: Any = getattr(model, "config", None)
        if hasattr(config, "id2label"):
            names = self.names[self._task(task)]
            config.id2label, config.label2id = (
                dict(enumerate(names)),
                {name: i for i, name in enumerate(names)},
            )
        if hasattr(model, "num_labels"):
            model.num_labels = span.stop - span.start
        return model

    def _head_of(self, model: nn.Module) -> str:
        """Return the path of the only linear layer in a head that has as many outputs as there are
        labels.
        """
        found = [
            path
            for path, layer in model.named_modules()
            if isinstance(layer, nn.Linear)
            and layer.out_features == self.total
            and set(path.split(".")) & set(SEQ_CLS_HEAD_NAMES)
        ]
        if len(found) != 1:
            raise PeftValueError(
                f"Found {found or 'no layer'} with {self.total} outputs in "
                f"{' or '.join(SEQ_CLS_HEAD_NAMES)}; name the one that "
                "gives the labels as `module`."
            )
        return found[0]

    def _linear(self, model: nn.Module, path: str) -> nn.Linear:
        """Return the linear layer at a path, which has as many outputs as there are labels.

        Raises:
            PeftValueError: There is none.
        """
        modules = {
            name: layer for name, layer in model.named_modules(remove_duplicate=False) if name
        }
        layer = modules.get(path)
        if layer is None:
            raise PeftValueError(f"The model has no module `{path}`.{did_you_mean(path, modules)}")
        if not isinstance(layer, nn.Linear) or layer.out_features != self.total:
            raise PeftValueError(
                f"`{path}` ({type(layer).__name__}) is no linear layer with {self.total} outputs, "
                "one for each label of all tasks."
            )
        return layer

    def _numbers(self, tasks: Any, batch: int) -> Tensor:
        """Return tasks by number, `[batch]` or `[1]`.

        Raises:
            PeftValueError: One is unknown, or there is not one for each sample.
        """
        if hasattr(tasks, "tolist"):
            tasks = (tasks.reshape(-1) if hasattr(tasks, "reshape") else tasks).tolist()
        each = tasks if isinstance(tasks, (list, tuple, range)) else [tasks]
        numbers = torch.tensor(
            [self.tasks.index(self._task(task)) for task in each], dtype=torch.long
        )
        if len(numbers) not in (1, batch):
            raise PeftValueError(
                f"`tasks` names {len(numbers)} tasks; expected one for each of {batch} samples, or "
                "one for all."
            )
        return numbers


def _whole(value: Any) -> int | None:
    """Return a whole number of any type as an `int`, None for what is none."""
    try:
        return index(value)
    except TypeError:
        return None


def _integers(name: str, values: Any) -> Tensor:
    """Return a tensor of integers as 64-bit ones.

    Raises:
        PeftTypeError: It is none.
    """
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


def _logits_of(outputs: Any) -> Tensor:
    """Return the logits of a model's output.

    Raises:
        PeftTypeError: There are none.
    """
    try:
        logits = (
            outputs
            if isinstance(outputs, Tensor)
            else outputs["logits" if isinstance(outputs, Mapping) else 0]
        )
    except (KeyError, IndexError, TypeError):
        logits = None
    if not isinstance(logits, Tensor):
        raise PeftTypeError(
            f"`outputs` ({type(outputs).__name__}) has no logits; expected a model's output with "
            "`logits`, a tuple that begins "
            "with them, or themselves."
        )
    return logits


def _names(task: str, labels: Any) -> list[str]:
    """Return a task's labels by name.

    Raises:
        PeftTypeError: `labels` is neither their number nor a list of names.
        PeftValueError: There are none, or two of the same name.
    """
    count = None if isinstance(labels, bool) else _whole(labels)
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
            f"Task {task!r} has {labels!r} for labels; there must be some, each of another name."
        )
    return names
