# SPDX-License-Identifier: Apache-2.0
"""Configuration of Poly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...base.registry import PeftType
from ...config import (
    TargetedConfig,
    at_least,
    boolean,
    choice,
    is_int,
    name_list,
    number,
    pattern_dict,
    probability,
)
from ...core import targets as _targets
from .task_ids import name_offences

if TYPE_CHECKING:
    from .methods import PolyPeftModel

GRANULARITIES = ("linear", "layer", "block", "coder", "model")
# Fields that have a value for each layer, by the field with their patterns.
_PATTERNS = {"rank_pattern": "r", "n_skills_pattern": "n_skills", "n_splits_pattern": "n_splits"}
# What an entry of `routing_pattern` stands for.
_ROUTING = {
    "learned": {"poly_type": "poly", "routing": "learned"},
    "fixed": {"poly_type": "poly", "routing": "fixed"},
    "input": {"poly_type": "mope", "routing": "learned"},
}


@dataclass
class PolyConfig(TargetedConfig):
    """Configuration of Poly, `Δ(x) = x·A_w·B_w / r` where `A_w` and `B_w` mix the skills of an
    inventory with weights `w`.

    Args:
        r: Rank of each skill.
        target_modules: Names (or ends of paths), a regular expression for whole paths,
            "all-linear", or None for the model type's defaults.
        exclude_modules: Names or a regular expression; takes precedence over `target_modules`.
        modules_to_save: Modules to train whole and save beside the adapter.
        init_weights: True: the `B` matrices start at zero, so that the adapter starts without
            effect. False: at random.
        poly_type: "poly": the weights are learned for each task, and calls take `task_ids`. "mope":
            a learned map of the layer's input gives the weights.
        n_tasks: Number of tasks.
        n_skills: Number of skills in each layer's inventory.
        n_splits: Number of heads that mix skills on their own, each for a share of the features
            (multi-head routing).
        task_names: Names of the tasks; `task_ids` may then use them.
        routing_level: With "mope": "sample" mixes once for each sample, from the mean of its
            prompt's tokens; "token" for each token from itself.
        trainable_token_indices: Tokens whose rows of the embedding are trained beside the adapter
            (and those of the output head, where it shares the weight); a dictionary names other
            modules: name → tokens.
        alpha: The adapter's output is scaled by `alpha / r`.
        relaxed_bernoulli: Training draws each gate from a relaxed Bernoulli distribution. False
            takes the sigmoid, as the published models of multi-head routing do.
        straight_through: Gates are 0 or 1, the rounded sigmoid (or draw); gradients pass as if they
            were not rounded.
        router_dropout: Probability in training that a sample does without a skill.
        n_shared_skills: How many of the `n_skills`, the last ones, are always on, for every task.
        eval_top_k: In evaluation each split keeps its largest weights only, so many; a lone sample
            then reads that share of the skills. None keeps all.
        router_granularity: What has one router: each "linear" layer; each "layer", the module
            around them (attention, MLP); each "block"; the encoder and the decoder ("coder"); the
            whole "model".
        routing: "learned"; or "fixed": all skills have the same weight, or those that
            `set_router_weights` gives them.
        task_rank: Rank of a skill that each task has to itself, beside the shared ones; 0 for none.
        rank_pattern: Other values of `r` for some modules: name or regular expression → value. The
            first that fits counts.
        n_skills_pattern, n_splits_pattern: The same for `n_skills` and `n_splits`.
        routing_pattern: The same for how weights come about: "learned" for each task, "fixed", or
            by "input".

    Raises:
        PeftValueError: A value is not allowed.

    Example:
        >>> PolyConfig(r=8, n_tasks=10, n_skills=4, n_splits=4, target_modules=["q_proj", "v_proj"]).poly_type
        'poly'

    Source: arXiv:2202.13914 (Polytropon), arXiv:2211.03831 (multi-head routing)
    """

    r: int = field(default=8, metadata={"help": "Rank of each skill."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train whole."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Whether the adapter starts without effect."}
    )
    poly_type: Literal["poly", "mope"] = field(
        default="poly", metadata={"help": "Routing by task or by input."}
    )
    n_tasks: int = field(default=1, metadata={"help": "Number of tasks."})
    n_skills: int = field(default=4, metadata={"help": "Number of skills in each layer."})
    n_splits: int = field(default=1, metadata={"help": "Number of heads that mix on their own."})
    task_names: list[str] | None = field(default=None, metadata={"help": "Names of the tasks."})
    routing_level: Literal["sample", "token"] = field(
        default="sample", metadata={"help": "What an input mixes for."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embedding is trained."}
    )

    alpha: float = field(default=1.0, metadata={"help": "The output is scaled by alpha / r."})
    relaxed_bernoulli: bool = field(
        default=True, metadata={"help": "Whether training draws the gates."}
    )
    straight_through: bool = field(default=False, metadata={"help": "Whether gates are 0 or 1."})
    router_dropout: float = field(
        default=0.0, metadata={"help": "Probability in training that a gate is shut."}
    )
    n_shared_skills: int = field(default=0, metadata={"help": "How many skills are always on."})
    eval_top_k: int | None = field(
        default=None,
        metadata={"help": "How many skills of a split keep their weight in evaluation."},
    )
    router_granularity: Literal["linear", "layer", "block", "coder", "model"] = field(
        default="linear", metadata={"help": "What has a router of its own."}
    )
    routing: Literal["learned", "fixed"] = field(
        default="learned", metadata={"help": "Whether the weights of tasks are trained."}
    )
    task_rank: int = field(
        default=0, metadata={"help": "Rank of a skill that each task has to itself."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other ranks for some modules."}
    )
    n_skills_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other numbers of skills for some modules."}
    )
    n_splits_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other numbers of heads for some modules."}
    )
    routing_pattern: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Other routing for some modules."}
    )

    patterns: ClassVar[tuple[str, ...]] = (*_PATTERNS, "routing_pattern")
    absent_values: ClassVar[dict[str, Any]] = {
        "task_names": None,
        "routing_level": "sample",
        "trainable_token_indices": None,
        "alpha": 1.0,
        "relaxed_bernoulli": True,
        "straight_through": False,
        "router_dropout": 0.0,
        "n_shared_skills": 0,
        "eval_top_k": None,
        "router_granularity": "linear",
        "routing": "learned",
        "task_rank": 0,
        "rank_pattern": {},
        "n_skills_pattern": {},
        "n_splits_pattern": {},
        "routing_pattern": {},
    }

    if TYPE_CHECKING:

        def adapts_as(self) -> PolyPeftModel:
            """Tell type checkers the class that `get_peft_model` returns."""
            raise NotImplementedError

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
        if isinstance(names, set):
            yield f"`task_names`={names!r} must be a list: a name's place in it is the task's id."
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
            offence = next(
                name_offences(names),
                "" if len(names) == self.n_tasks else f"there are {len(names)}",
            )
            if offence:
                yield f"`task_names` must be {self.n_tasks} different names, one for each of `n_tasks`; {offence}: got {names!r}."
        yield from self._routing_problems()

    def _routing_problems(self) -> Iterator[str]:
        """Offences against the rules for what is beyond the interface's own fields."""
        yield from number("alpha", self.alpha, positive=True)
        for name in ("relaxed_bernoulli", "straight_through"):
            yield from boolean(name, getattr(self, name))
        yield from probability("router_dropout", self.router_dropout)
        yield from at_least("n_shared_skills", self.n_shared_skills, 0)
        yield from at_least("task_rank", self.task_rank, 0)
        if self.eval_top_k is not None:
            yield from at_least("eval_top_k", self.eval_top_k)
        yield from choice("router_granularity", self.router_granularity, GRANULARITIES)
        yield from choice("routing", self.routing, ("learned", "fixed"))
        for name in _PATTERNS:
            yield from pattern_dict(name, getattr(self, name), at_least)
        yield from pattern_dict(
            "routing_pattern", self.routing_pattern, partial(choice, allowed=_ROUTING)
        )
        if self.routing == "fixed" and self.poly_type == "mope":
            yield "`routing`='fixed' fixes the weights of tasks, which `poly_type`='mope' does not have."
        if self.task_rank and self.routes_by_input:
            yield f"`task_rank`={self.task_rank} gives each task a skill, but routing by input knows no tasks; use 0."
        counts = [
            self.n_skills,
            *(self.n_skills_pattern.values() if isinstance(self.n_skills_pattern, dict) else ()),
        ]
        counts = [count for count in counts if is_int(count)]
        if is_int(self.n_shared_skills) and counts and self.n_shared_skills > min(counts):
            yield f"`n_shared_skills`={self.n_shared_skills} is more than there are skills: `n_skills` is {min(counts)}."
        differing = [
            name
            for name in ("n_skills_pattern", "n_splits_pattern", "routing_pattern")
            if getattr(self, name)
        ]
        if self.router_granularity != "linear" and (differing or self.poly_type == "mope"):
            cause = f"`{differing[0]}`" if differing else "`poly_type`='mope'"
            yield f"`router_granularity`={self.router_granularity!r} has layers share a router, which {cause} makes different."

    def for_copy(self, reference: bool = False) -> Any:
        """Return the config of a copy; the gates of a reference are not drawn."""
        result = super().for_copy(reference)
        result.relaxed_bernoulli &= not reference
        return result

    @property
    def routes_by_task(self) -> bool:
        """Whether any layer mixes skills by task."""
        return self.poly_type == "poly" or any(
            kind != "input" for kind in self.routing_pattern.values()
        )

    @property
    def routes_by_input(self) -> bool:
        """Whether any layer mixes skills by its input."""
        return self.poly_type == "mope" or "input" in self.routing_pattern.values()

    def at(self, path: str) -> PolyConfig:
        """The config as it is for the module at `path`, without patterns."""
        given: dict[str, Any] = {
            name: _targets.pattern_value(getattr(self, pattern), path, getattr(self, name))
            for pattern, name in _PATTERNS.items()
        }
        given |= _ROUTING.get(_targets.pattern_value(self.routing_pattern, path, ""), {})
        if all(getattr(self, name) == value for name, value in given.items()):
            return self
        given |= {name: {} for name in (*_PATTERNS, "routing_pattern")}
        return replace(self, **given)

    def router_group(self, path: str) -> str:
        """The part of a module's path that modules with the same router have in common."""
        parts = path.split(".")
        match self.router_granularity:
            case "linear":
                return path
            case "layer":
                return ".".join(parts[:-1])
            case "block":
                number_at = next(
                    (i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1
                )
                return ".".join(parts[: number_at + 1])
            case "coder":
                return next((part for part in parts if part in ("encoder", "decoder")), "")
            case _:
                return ""


def single_skill(config: PolyConfig, rank: Callable[[int], int]) -> PolyConfig:
    """Return the config of an adapter with one task and one skill for the same modules.

    Args:
        config: A config with any number of tasks and skills.
        rank: Returns the new rank for a rank of `config`.
    """
    fields: dict[str, Any] = {
        name: value
        for name, value in config.absent_values.items()
        if name not in ("trainable_token_indices", "alpha")
    }
    fields["rank_pattern"] = {path: rank(r) for path, r in config.rank_pattern.items()}
    return replace(
        config, **fields, r=rank(config.r), poly_type="poly", n_tasks=1, n_skills=1, n_splits=1
    )
