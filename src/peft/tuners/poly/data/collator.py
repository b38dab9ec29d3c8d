# SPDX-License-Identifier: Apache-2.0
"""`TaskCollator`: collate a data set's column of tasks into `task_ids`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ....base.errors import PeftTypeError, PeftValueError
from ....base.validation import at_least
from ....core.routing.task_ids import as_task_ids
from ..config import PolyConfig


class TaskCollator:
    """A data collator that adds `task_ids` to the batches of another collator, which never sees
    the tasks. Names become ids, and all are checked.

    Collators that pad with a tokenizer keep a column of integers; this one is for columns of names
    and for collators that drop unknown columns.

    Args:
        collator: Collates the other columns.
        config: The adapter's config, for `n_tasks` and `task_names`.
        copies: Rows of the batch for each sample, if the collator stacks all samples so many times:
            2 for pairs of a chosen and a rejected answer in TRL.

    Raises:
        PeftTypeError: `collator` is not a function, or `config` is of another method.
        PeftValueError: `copies` is below one.

    Example:
        >>> from peft import PolyConfig
        >>> config = PolyConfig(n_tasks=2, task_names=["sum", "max"])
        >>> collate_x = lambda samples: {"x": torch.tensor([s["x"] for s in samples])}
        >>> collator = TaskCollator(collate_x, config)
        >>> collator([{"x": 1, "task_ids": "max"}, {"x": 2, "task_ids": "sum"}])
        {'x': tensor([1, 2]), 'task_ids': tensor([1, 0])}
    """

    def __init__(self, collator: Callable[..., Any], config: PolyConfig, copies: int = 1) -> None:
        if not callable(collator):
            raise PeftTypeError(f"`collator`={collator!r} must be a function that makes a batch.")
        if not isinstance(config, PolyConfig):
            raise PeftTypeError(
                f"`config` must be a PolyConfig, not {type(config).__name__}; a model has it as "
                "`model.peft_config[name]`."
            )
        for problem in at_least("copies", copies):
            raise PeftValueError(problem)
        self.collator = collator
        self.config = config
        self.copies = copies

    def __getattr__(self, name: str) -> Any:
        """Return attributes of the other collator, which trainers read."""
        if name == "collator":
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __repr__(self) -> str:
        return f"TaskCollator({self.collator!r}, n_tasks={self.config.n_tasks})"

    def __call__(
        self, samples: Sequence[Mapping[str, object]], *args: object, **kwargs: object
    ) -> Any:
        """Return a batch with `task_ids`, `[batch]`, in the order of its rows.

        If samples have several texts, in columns `…_input_ids`, each text gets the task of its
        sample in a column `…_task_ids` too.

        Args:
            samples: Each with its task, by id or name, as `task_ids`.
            *args, **kwargs: Arguments of the other collator.

        Raises:
            PeftTypeError: A task is neither an integer nor a name, a sample is not a dictionary, or
                the other collator's batch.
            PeftValueError: There is no sample, or one has no task, or an unknown one.
        """
        if not isinstance(samples, Sequence) or not all(isinstance(s, Mapping) for s in samples):
            raise PeftTypeError("The samples of a batch must be a list of dictionaries.")
        if not samples:
            raise PeftValueError("The batch has no samples.")
        without = [i for i, sample in enumerate(samples) if sample.get("task_ids") is None]
        if without:
            raise PeftValueError(
                f"Samples {without} of a batch have no `task_ids`; add a column of that name to "
                "the data set, and have the trainer keep it (`remove_unused_columns=False`)."
            )
        tasks = [sample["task_ids"] for sample in samples]
        ids = as_task_ids(tasks, [self.config], len(tasks), torch.device("cpu"))
        columns = [
            {key: value for key, value in sample.items() if key != "task_ids"} for sample in samples
        ]
        batch = self.collator(columns, *args, **kwargs)
        if not hasattr(batch, "keys"):
            raise PeftTypeError(
                f"`collator` made a {type(batch).__name__}; `task_ids` are put into a dictionary."
            )
        prefixes = [""]
        if "input_ids" not in batch:
            texts = [key for key in batch if key.endswith("_input_ids")]
            prefixes += [key.removesuffix("input_ids") for key in texts]
        for prefix in prefixes:
            if prefix != "decoder_":
                batch[f"{prefix}task_ids"] = ids.repeat(self.copies)
        return batch
