# SPDX-License-Identifier: Apache-2.0
"""`TaskSampler`: draw samples of many tasks by temperature."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence, Sized

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ....base.errors import PeftTypeError, PeftValueError
from ....base.plain_values import plain
from ....base.validation import at_least, is_int


class TaskSampler(Sampler[int]):
    """A sampler that draws a task with `p_t ∝ n_t^(1/T)`, where `n_t` is its number of samples, and
    then the task's next sample in a random order.

    Args:
        tasks: Each sample's task, by id or name: a column of the data set.
        temperature: `T ≥ 1`. 1 draws tasks in proportion to their sizes, `math.inf` all alike;
            values between draw small tasks more often than their size.
        num_samples: Samples of an epoch, by default the size of the data set.
        seed: Seed of the order, together with the epoch; the same on all processes.

    Raises:
        PeftTypeError: `tasks` is not a list of ids or names, or `seed` not an integer.
        PeftValueError: There are no samples, or a value is not allowed.

    Example:
        >>> tasks = ["sum"] * 6 + ["max"] * 2
        >>> TaskSampler(tasks, temperature=math.inf).probabilities
        {'sum': 0.5, 'max': 0.5}

    Source: arXiv:1907.05019, section 3 (temperature)
    """

    def __init__(
        self,
        tasks: Sequence[Hashable] | Tensor,
        temperature: float = 1.0,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(tasks, Tensor):
            tasks = tasks.tolist()
        if not isinstance(tasks, Sized):
            raise PeftTypeError(f"`tasks`={tasks!r} must be a list with the task of each sample.")
        if not len(tasks):
            raise PeftValueError("`tasks` is empty; pass the task of each sample.")
        if not isinstance(temperature, (int, float)) or not temperature >= 1:
            raise PeftValueError(
                f"`temperature`={temperature!r} must be at least 1; math.inf draws all tasks alike."
            )
        number, seed = plain(num_samples), plain(seed)
        for problem in () if number is None else at_least("num_samples", number, most=None):
            raise PeftValueError(problem)
        if not is_int(seed):
            raise PeftTypeError(f"`seed`={seed!r} must be an integer.")
        self.groups: dict[Hashable, list[int]] = {}
        for i, given in enumerate(tasks):
            task = given.tolist() if isinstance(given, Tensor) else given  # tensors are never equal
            if not isinstance(task, Hashable):
                raise PeftTypeError(f"`tasks[{i}]`={given!r} must be one task, an id or a name.")
            self.groups.setdefault(task, []).append(i)
        self.temperature, self.seed, self.epoch = temperature, seed, 0
        self.num_samples = number or len(tasks)

    def __repr__(self) -> str:
        return (
            f"TaskSampler({len(self.groups)} tasks, num_samples={self.num_samples}, "
            f"temperature={self.temperature})"
        )

    @property
    def probabilities(self) -> dict[Hashable, float]:
        """The probability of each task."""
        shares = {task: len(group) ** (1 / self.temperature) for task, group in self.groups.items()}
        return {task: share / math.fsum(shares.values()) for task, share in shares.items()}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass; without calls, each pass counts as one epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        self.epoch += 1
        groups = list(self.groups.values())
        waiting: list[list[int]] = [[] for _ in groups]
        probabilities = torch.tensor(list(self.probabilities.values()), dtype=torch.float64)
        draws = torch.multinomial(
            probabilities, self.num_samples, replacement=True, generator=generator
        )
        for task in draws.tolist():
            if not waiting[task]:
                order = torch.randperm(len(groups[task]), generator=generator).tolist()
                waiting[task] = [groups[task][i] for i in order]
            yield waiting[task].pop()
