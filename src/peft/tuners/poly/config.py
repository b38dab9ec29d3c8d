# SPDX-License-Identifier: Apache-2.0
"""`PolyConfig`: configuration of Poly."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

from ...base.plain_values import JsonObject
from ...base.registry import PeftType
from ...base.validation import TokenIndices
from ...config import (
    TargetedConfig,
    at_least,
    boolean,
    choice,
    name_list,
    number,
    pattern_dict,
    probability,
)
from ...core import targets as _targets
from ...core.routing.task_ids import name_offences

GRANULARITIES = ("linear", "layer", "block", "coder", "model")
# Fields with a value for each layer, by the field that holds their patterns.
_PATTERNS = {"rank_pattern": "r", "n_skills_pattern": "n_skills", "n_splits_pattern": "n_splits"}
# Fields that an entry of `routing_pattern` sets.
_ROUTING = {
    "learned": {"poly_type": "poly", "routing": "learned"},
    "fixed": {"poly_type": "poly", "routing": "fixed"},
    "input": {"poly_type": "mope", "routing": "learned"},
}


@dataclass
class PolyConfig(TargetedConfig):
    """Configuration of Poly, `Δ(x) = (alpha / r) · x·A_w·B_w`, where `A_w` and `B_w` are mixtures
    of a layer's skills with the weights `w`.

    Args:
        r: Rank of each skill.
        target_modules: Names (or ends of paths), a regular expression for whole paths,
            "all-linear", or None for the model type's defaults.
        exclude_modules: Names or a regular expression; takes precedence over `target_modules`.
        modules_to_save: Modules to train in full and save with the adapter.
        init_weights: True: the `B` matrices start at zero, so a new adapter changes nothing. False:
            they are random.
        poly_type: "poly": each task has learned weights, and calls take `task_ids`. "mope": a
            learned linear map of the layer's input gives the weights.
        n_tasks: Number of tasks.
        n_skills: Number of skills in each layer.
        n_splits: Number of heads that mix skills separately, each for a block of the features
            (multi-head routing). Must divide both sizes of every adapted layer.
        task_names: Names of the tasks, which `task_ids` may then use.
        routing_level: With "mope": "sample" mixes once a sample, from the mean over its prompt's
            tokens; "token" mixes for each token.
        target_parameters: Parameters to adapt, by the ends of their paths: matrices, and stacks
            `[experts, …]`, where each expert gets the skills of a linear layer, and all share a
            router.
        trainable_token_indices: Tokens whose embedding rows are trained with the adapter, also in
            an output head that shares the weight. A dictionary, name → tokens, names other modules.
        alpha: The delta is scaled by `alpha / r`.
        relaxed_bernoulli: Training samples each gate from a relaxed Bernoulli distribution. False
            uses the sigmoid, as the published multi-head routing models do.
        straight_through: Gates are 0 or 1: the rounded sigmoid or sample. Gradients pass as if they
            were not rounded.
        router_dropout: Probability in training that a sample does without a skill.
        n_shared_skills: The last so many of the `n_skills` are always on, for every task.
        eval_top_k: In evaluation each split keeps only its so many largest weights, and a single
            sample reads only those skills. None keeps all.
        router_granularity: The modules that share a router: each "linear" layer has one; each
            "layer", the module around them (attention, MLP); each "block"; encoder and decoder
            ("coder"); or the whole "model".
        routing: "learned", or "fixed": all skills have the same weight, or the weights set by
            `set_router_weights`.
        task_rank: Rank of the skill that each task has for itself, added to the mixture; 0 for
            none.
        rank_pattern: Other values of `r` for some modules: name or regular expression → value. The
            first match counts.
        n_skills_pattern, n_splits_pattern: Values of `n_skills` and `n_splits` for some modules, as
            in `rank_pattern`.
        routing_pattern: Routing of some modules, as in `rank_pattern`: "learned" for each task,
            "fixed", or by "input".

    Raises:
        PeftValueError: A value is not allowed.

    Example:
        >>> config = PolyConfig(n_tasks=10, n_skills=4, n_splits=4, target_modules=["q_proj"])
        >>> config.r, config.poly_type
        (8, 'poly')

    Source: arXiv:2202.13914 (Polytropon), arXiv:2211.03831 (multi-head routing)
    """

    r: int = 8
    target_modules: list[str] | str | set[str] | None = None
    exclude_modules: list[str] | str | set[str] | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    poly_type: Literal["poly", "mope"] = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1
    task_names: list[str] | None = None
    routing_level: Literal["sample", "token"] = "sample"
    trainable_token_indices: TokenIndices | None = None
    target_parameters: list[str] | None = None

    alpha: float = 1.0
    relaxed_bernoulli: bool = True
    straight_through: bool = False
    router_dropout: float = 0.0
    n_shared_skills: int = 0
    eval_top_k: int | None = None
    router_granularity: Literal["linear", "layer", "block", "coder", "model"] = "linear"
    routing: Literal["learned", "fixed"] = "learned"
    task_rank: int = 0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    n_skills_pattern: dict[str, int] = field(default_factory=dict)
    n_splits_pattern: dict[str, int] = field(default_factory=dict)
    routing_pattern: dict[str, str] = field(default_factory=dict)

    no_effect: ClassVar[frozenset[str]] = TargetedConfig.no_effect | {
        "task_names",
        "router_dropout",
    }
    labels: ClassVar[tuple[str, ...]] = ("task_names",)
    sizes: ClassVar[tuple[str, ...]] = (
        "r", "n_skills", "n_tasks", "rank_pattern", "n_skills_pattern",
    )  # fmt: skip
    patterns: ClassVar[tuple[str, ...]] = (*_PATTERNS, "routing_pattern")
    absent_values: ClassVar[JsonObject] = {
        "task_names": None,
        "routing_level": "sample",
        "trainable_token_indices": None,
        "target_parameters": None,
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
        yield from self._task_name_problems()
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

    def _task_name_problems(self) -> Iterator[str]:
        """Yield a sentence if the task names are not one different name for each task."""
        names = self.task_names
        if isinstance(names, set):
            yield f"`task_names`={names!r} must be a list: a name's place in it is the task's id."
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
            count = "" if len(names) == self.n_tasks else f"there are {len(names)}"
            if problem := next(name_offences(names), count):
                yield (
                    f"`task_names` must be {self.n_tasks} different names, one for each of "
                    f"`n_tasks`; {problem}: got {names!r}."
                )

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if self.routing == "fixed" and self.poly_type == "mope":
            yield (
                "`routing`='fixed' fixes the weights of tasks, which `poly_type`='mope' does not "
                "have."
            )
        if self.task_rank and self.routes_by_input:
            yield (
                f"`task_rank`={self.task_rank} gives each task a skill, but routing by input knows "
                "no tasks; use 0."
            )
        counts = [self.n_skills, *self.n_skills_pattern.values()]
        if self.eval_top_k is not None and self.eval_top_k > max(counts):
            yield (
                f"`eval_top_k`={self.eval_top_k} is more than there are skills: `n_skills` is "
                f"{max(counts)}. None keeps all."
            )
        if self.n_shared_skills > min(counts):
            yield (
                f"`n_shared_skills`={self.n_shared_skills} is more than there are skills: "
                f"`n_skills` is {min(counts)}."
            )
        differing = [
            name
            for name in ("n_skills_pattern", "n_splits_pattern", "routing_pattern")
            if getattr(self, name)
        ]
        if self.router_granularity != "linear" and (differing or self.poly_type == "mope"):
            cause = f"`{differing[0]}`" if differing else "`poly_type`='mope'"
            yield (
                f"`router_granularity`={self.router_granularity!r} has layers share a router, "
                f"which {cause} makes different."
            )

    def for_copy(self, reference: bool = False) -> PolyConfig:
        """Return the config for a copy; a reference model's samples no gates and has no dropout."""
        result = super().for_copy(reference)
        result.relaxed_bernoulli &= not reference
        return result

    @property
    def routes_by_task(self) -> bool:
        """True if a layer mixes skills by task."""
        return self.poly_type == "poly" or any(
            kind != "input" for kind in self.routing_pattern.values()
        )

    @property
    def routes_by_input(self) -> bool:
        """True if a layer mixes skills by its input."""
        return self.poly_type == "mope" or "input" in self.routing_pattern.values()

    def reads_task_ids(self, training: bool) -> bool:
        """Return whether a layer mixes skills by task, in training as in evaluation."""
        return self.routes_by_task

    def at(self, path: str) -> PolyConfig:
        """Return the config for the module at `path`, with its patterns resolved."""
        given: JsonObject = {
            name: _targets.pattern_value(getattr(self, pattern), path, getattr(self, name))
            for pattern, name in _PATTERNS.items()
        }
        given |= _ROUTING.get(_targets.pattern_value(self.routing_pattern, path, ""), {})
        if all(getattr(self, name) == value for name, value in given.items()):
            return self
        given |= {name: {} for name in (*_PATTERNS, "routing_pattern")}
        return replace(self, **given)

    def router_group(self, path: str) -> str:
        """Return the beginning of a path that modules with the same router have in common."""
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


def reset_routing(config: PolyConfig, keep: Collection[str], **changes: Any) -> PolyConfig:
    """Return a config with default values for the fields that this package adds, except those in
    `keep`, and with `changes` of any fields.
    """
    defaults = {name: value for name, value in config.absent_values.items() if name not in keep}
    return replace(config, **{**defaults, **changes})


def single_skill(config: PolyConfig, rank: Callable[[int], int]) -> PolyConfig:
    """Return the config of an adapter with one task and one skill for the same modules; `rank`
    returns the new rank for one of `config`.
    """
    ranks = {path: rank(r) for path, r in config.rank_pattern.items()}
    keep = ("trainable_token_indices", "target_parameters", "alpha")
    sizes = {"n_tasks": 1, "n_skills": 1, "n_splits": 1}
    return reset_routing(
        config, keep, poly_type="poly", r=rank(config.r), rank_pattern=ranks, **sizes
    )
