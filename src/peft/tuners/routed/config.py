# SPDX-License-Identifier: Apache-2.0
"""`RoutedConfig`: configuration of a model that routes over experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from ...base.plain_values import JsonObject
from ...base.registry import PeftType
from ...base.validation import LayerIndices, TokenIndices
from ...config import TargetedConfig, at_least, boolean, choice, number
from ...core.routing.task_ids import name_offences

RoutingKind = Literal["task", "fixed", "learned", "arrow", "activation", "phatgoose", "input"]
KINDS: tuple[RoutingKind, ...] = get_args(RoutingKind)
# Kinds that score the input with a vector for each expert.
BY_INPUT = ("arrow", "activation", "phatgoose", "input")
# The container that each kind trains; the others train nothing.
TRAINS = {"learned": "routed_weights", "phatgoose": "routed_gate", "input": "routed_gate"}
# Keys of an expert's source.
SOURCE_KEYS = ("source", "subfolder", "revision", "task", "digest", "rank")


@dataclass
class RoutedConfig(TargetedConfig):
    """Configuration of a model that routes over experts, `Δ(x) = Σ_e w_e(x) · ΔW_e·x`.

    An expert is a saved adapter of any method, or one task of it. The factors of all experts are
    frozen; the weights are chosen for each token or sample.

    Args:
        experts: Name of each expert → folder or Hub id of its adapter, or a dictionary with
            `source`, `subfolder`, `revision` and `task`. An adapter with several tasks gives an
            expert for each, `name.task`, if no `task` is named. `digest` and `rank` are filled in;
            loading refuses an adapter that has changed since.
        routing: How the weights are chosen.
            "task": the call names the expert of each sample by `task_ids`, ids or names.
            "fixed", "learned": the same weights for every input, set or trained.
            "arrow": by each expert's first right singular vector; needs no data.
            "activation": by the mean input of a few examples, see `collect_prototypes`.
            "phatgoose": by a gate for each expert, trained while its call names the expert; before,
            all experts have the same score.
            "input": by a trained linear map of the input.
        routing_level: The input that is scored: "token", each for itself; "sample", the mean over
            the prompt; "sequence", the mean over all tokens, an answer's too.
        top_k: Number of experts that get weight; None for all. Their weights add up to one, except
            with "input": there each keeps its share of the softmax over all experts, without
            which gates would have no gradient at `top_k=1`.
        temperature: Divides the scores before the softmax.
        weights_granularity: With "fixed" and "learned" each "linear" layer has its own expert
            weights, or the whole "model" the same.
        general_experts: Adapters whose mean delta is subtracted from each expert's
            (general-knowledge subtraction), as in `experts`; in the layers that the expert adapts.
        general_subtraction: Subtract the mean of the "deltas", or of the "factors" as Hugging Face
            PEFT does, which needs adapters of one rank.
        deltas_only: Use adapters that also train full modules, biases or token rows, without
            these; by default they are refused.
        save_experts: Write the experts' factors into the saved folder, which is then complete; by
            default it holds their names, places and digests.
        target_modules: Modules to route; by default all that an expert adapts.
        exclude_modules: Modules to leave alone; takes precedence over `target_modules`.
        modules_to_save: Modules to train in full beside the routing.
        trainable_token_indices: Tokens whose embedding rows are trained beside the routing.
        layers_to_transform, layers_pattern: Route layers of these indices only.

    Raises:
        PeftValueError: A value is not allowed.

    Example:
        >>> config = RoutedConfig(experts={"sql": "adapters/sql"}, routing="arrow", top_k=2)
        >>> config.experts["sql"]["source"], config.task_names
        ('adapters/sql', ['sql'])

    Source: arXiv:2405.11157 (Arrow), arXiv:2402.05859 (PHATGOOSE)
    """

    experts: JsonObject = field(default_factory=dict)
    routing: RoutingKind = "arrow"
    routing_level: Literal["token", "sample", "sequence"] = "token"
    top_k: int | None = None
    temperature: float = 1.0
    weights_granularity: Literal["linear", "model"] = "linear"
    general_experts: JsonObject = field(default_factory=dict)
    general_subtraction: Literal["deltas", "factors"] = "deltas"
    deltas_only: bool = False
    save_experts: bool = False
    target_modules: list[str] | str | set[str] | None = None
    exclude_modules: list[str] | str | set[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: TokenIndices | None = None
    layers_to_transform: LayerIndices | None = None
    layers_pattern: list[str] | str | None = None

    no_effect: ClassVar[frozenset[str]] = TargetedConfig.no_effect | {"save_experts"}
    # Fields with sources of adapters.
    _sources: ClassVar[tuple[str, ...]] = ("experts", "general_experts")
    # What messages call the things that `task_ids` name.
    task_noun: ClassVar[str] = "expert"

    def __post_init__(self) -> None:
        self.peft_type = PeftType.ROUTED
        for name in self._sources:
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, {key: as_source(entry) for key, entry in value.items()})
        super().__post_init__()

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        for name in self._sources:
            yield from _source_problems(name, getattr(self, name))
        names = list(self.experts) if isinstance(self.experts, dict) else []
        named = [name for name in names if isinstance(name, str)]
        for offence in name_offences(named):
            yield f"`experts` must have names that are not blank; {offence}."
        yield from choice("routing", self.routing, KINDS)
        yield from choice("routing_level", self.routing_level, ("token", "sample", "sequence"))
        if self.top_k is not None:
            yield from at_least("top_k", self.top_k)
        yield from number("temperature", self.temperature, positive=True)
        yield from choice("weights_granularity", self.weights_granularity, ("linear", "model"))
        yield from choice("general_subtraction", self.general_subtraction, ("deltas", "factors"))
        for name in ("deltas_only", "save_experts"):
            yield from boolean(name, getattr(self, name))

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if self.top_k is not None and self.routing not in BY_INPUT:
            yield (
                f"`top_k`={self.top_k} chooses experts by the input, and `routing`="
                f"{self.routing!r} does not; leave it out."
            )
        if self.temperature != 1 and self.routing not in BY_INPUT:
            yield (
                f"`temperature`={self.temperature} divides scores of the input, and `routing`="
                f"{self.routing!r} has none; leave it out."
            )
        if self.weights_granularity == "model" and self.routing in (*BY_INPUT, "task"):
            yield (
                "`weights_granularity`='model' shares the weights of a blend, and `routing`="
                f"{self.routing!r} is none; leave it out, or use 'fixed' or 'learned'."
            )

    @property
    def n_tasks(self) -> int:
        """Number of experts."""
        return len(self.experts)

    @property
    def task_names(self) -> list[str]:
        """Names of the experts, by id."""
        return list(self.experts)

    @property
    def routes_by_input(self) -> bool:
        """True if the input chooses the experts."""
        return self.routing in BY_INPUT

    def reads_task_ids(self, training: bool) -> bool:
        """Return whether calls name each sample's expert: always with "task", and to train gates
        with "phatgoose".
        """
        return self.routing == "task" or (training and self.routing == "phatgoose")


def as_source(entry: object) -> object:
    """Return an expert's source as a dictionary, if it is a path or an id."""
    if isinstance(entry, dict):
        return dict(entry)
    return (
        {"source": str(entry)} if isinstance(entry, str) or hasattr(entry, "__fspath__") else entry
    )


def _source_problems(name: str, value: object) -> Iterator[str]:
    """Yield a sentence for each source that is neither a path nor a dictionary of known keys."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        yield f"`{name}`={value!r} must be a dictionary, name → folder or Hub id."
        return
    for key, entry in value.items():
        if not isinstance(entry, dict) or "source" not in entry:
            yield (
                f"`{name}[{key!r}]`={entry!r} must be a folder, a Hub id, or a dictionary with "
                "`source`; adapters in memory go to `get_routed_model`."
            )
        elif unknown := sorted(map(str, entry.keys() - set(SOURCE_KEYS))):
            yield f"`{name}[{key!r}]` has {unknown}; its keys are {', '.join(SOURCE_KEYS)}."
        else:
            for word in ("source", "subfolder", "revision", "digest"):
                if not isinstance(entry.get(word), (str, type(None))):
                    yield f"`{name}[{key!r}]` has `{word}`={entry[word]!r}, which must be a string."
