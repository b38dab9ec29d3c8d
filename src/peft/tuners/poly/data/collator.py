# SPDX-License-Identifier: Apache-2.0
"""Tasks in batches: what a data set says of each sample's task, as the `task_ids` of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ....base.errors import PeftValueError
from ..config import PolyConfig
from ..task_ids import as_task_ids


class TaskCollator:
    """A data collator around another, which never sees the tasks: names become ids, and all are
    checked before they reach a model.

    Collators that pad with a tokenizer carry a column of whole numbers by themselves; this one is
    for columns of names, and for collators that drop what they do not know.

    Args:
        collator: Makes a batch of the samples' other columns.
        config: The adapter's config, for `n_tasks` and `task_names`.
        copies: How many rows of the batch a sample becomes, where the collator stacks all samples
            so many times: 2 for pairs of a chosen and a rejected answer, as TRL stacks them.

    Example:
        >>> from peft import PolyConfig
        >>> collator = TaskCollator(lambda samples: {"x": torch.tensor([s["x"] for s in samples])}, PolyConfig(
        ...     n_tasks=2, task_names=["sum", "max"]))
        >>> collator([{"x": 1, "task_ids": "max"}, {"x": 2, "task_ids": "sum"}])
        {'x': tensor([1, 2]), 'task_ids': tensor([1, 0])}
    """

    def __init__(self, collator: Callable[..., Any], config: PolyConfig, copies: int = 1) -> None:
        self.collator = collator
        self.config = config
        self.copies = copies

    def __getattr__(self, name: str) -> Any:
        """What trainers ask of a collator is the other's."""
        if name == "collator":
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __repr__(self) -> str:
        return f"TaskCollator({self.collator!r}, n_tasks={self.config.n_tasks})"

    def __call__(self, samples: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> Any:
        """A batch with `task_ids`, `[batch]`, in the order of its rows. Where a sample has several
        texts, in columns `…_input_ids`, each of them has the sample's task, in a column
        `…_task_ids`.

        Args:
            samples: Each with its task, by id or name, as `task_ids`.
            *args, **kwargs: For the other collator.

        Raises:
            PeftTypeError: A task is neither a whole number nor a name.
            PeftValueError: A sample has no task, or it is unknown.
        """
        without = [i for i, sample in enumerate(samples) if sample.get("task_ids") is None]
        if without:
            raise PeftValueError(
                f"Samples {without} of a batch have no `task_ids`; add a column of that name to "
                "the data set, and have "
                "the trainer keep it (`remove_unused_columns=False`)."
            )
        tasks = [sample["task_ids"] for sample in samples]
        ids = as_task_ids(tasks, [self.config], len(tasks), torch.device("cpu"))
        batch = self.collator(
            [{k: v for k, v in sample.items() if k != "task_ids"} for sample in samples],
            *args,
            **kwargs,
        )
        texts = (
            []
            if "input_ids" in batch
            else [key for key in batch if key.endswith("_input_ids") and key != "decoder_input_ids"]
        )
        for prefix in ("", *(key.removesuffix("input_ids") for key in texts)):
            batch[f"{prefix}task_ids"] = ids.repeat(self.copies)
        return batch
