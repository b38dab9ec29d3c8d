# SPDX-License-Identifier: Apache-2.0
"""Configuration of Poly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ...config import TargetedConfig, at_least, boolean, choice, name_list
from ...utils.peft_types import PeftType


@dataclass
class PolyConfig(TargetedConfig):
    """Configuration of Poly, `Δ(x) = x·A_w·B_w / r` where `A_w` and `B_w` mix the skills of an inventory with weights `w`.

    Args:
        r: Rank of each skill.
        target_modules: Names (or ends of paths), a regular expression for whole paths, "all-linear", or None for the model type's
            defaults.
        exclude_modules: Names or a regular expression; takes precedence over `target_modules`.
        modules_to_save: Modules to train whole and save beside the adapter.  # type: ignore[misc]
        init_weights: True: the `B` matrices start at zero, so that the adapter starts without effect. False: at random.
        poly_type: "poly": the weights are learned for each task, and calls take `task_ids`. "mope": a learned map of the layer's
            input gives the weights.
        n_tasks: Number of tasks.
        n_skills: Number of skills in each layer's inventory.
        n_splits: Number of heads that mix skills on their own, each for a share of the features (multi-head routing).
        task_names: Names of the tasks; `task_ids` may then use them.
        routing_level: With "mope": "sample" mixes once for each sample, from the mean of its prompt's tokens; "token" for each
            token from itself.
        trainable_token_indices: Tokens whose rows of the embedding are trained beside the adapter (and those of the output head,
            where it shares the weight); a dictionary names other modules: name → tokens.

    Raises:
        PeftValueError: A value is not allowed.

    Example:
        >>> PolyConfig(r=8, n_tasks=10, n_skills=4, n_splits=4, target_modules=["q_proj", "v_proj"]).poly_type
        'poly'

    Source: arXiv:2202.13914 (Polytropon), arXiv:2211.03831 (multi-head routing)
    """

    r: int = field(default=8, metadata={"help": "Rank of each skill."})
    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train whole."})  # type: ignore[misc]
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts without effect."})
    poly_type: Literal["poly", "mope"] = field(default="poly", metadata={"help": "Routing by task or by input."})
    n_tasks: int = field(default=1, metadata={"help": "Number of tasks."})
    n_skills: int = field(default=4, metadata={"help": "Number of skills in each layer."})
    n_splits: int = field(default=1, metadata={"help": "Number of heads that mix on their own."})
    task_names: list[str] | None = field(default=None, metadata={"help": "Names of the tasks."})
    routing_level: Literal["sample", "token"] = field(default="sample", metadata={"help": "What an input mixes for."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(  # type: ignore[misc]
        default=None, metadata={"help": "Tokens whose embedding is trained."}
    )

    absent_values: ClassVar[dict[str, Any]] = {"task_names": None, "routing_level": "sample", "trainable_token_indices": None}

    def __post_init__(self) -> None:
        self.peft_type = PeftType.POLY
        super().__post_init__()

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        for name in ("r", "n_tasks", "n_skills", "n_splits"):
            yield from at_least(name, getattr(self, name))
        yield from boolean("init_weights", self.init_weights)
        yield from choice("poly_type", self.poly_type, ("poly", "mope"))
        yield from choice("routing_level", self.routing_level, ("sample", "token"))
        yield from name_list("task_names", self.task_names)
        names = self.task_names
        if isinstance(names, (list, tuple)) and (len(names) != self.n_tasks or len(set(names)) != len(names)):
            yield f"`task_names` must be {self.n_tasks} different names, one for each of `n_tasks`; got {names!r}."
