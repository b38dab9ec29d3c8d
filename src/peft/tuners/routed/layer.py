# SPDX-License-Identifier: Apache-2.0
"""`RoutedLayer`: a layer that chooses among experts; the math is in `choice.py`, `products.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ...base.calls.rows import IN_ORDER
from ...base.containers import AdapterModuleDict
from ...base.errors import PeftNotSupportedError, PeftValueError
from ...base.geometry import Placement
from ...base.plain_values import plain
from ...base.tracing import shapes
from ...base.validation import is_int
from ...core.adapters import AdapterParameterDict
from ...core.method_info import AdapterCost
from ...core.routing.calls import Routing
from ...core.routing.layer import RoutingLayer
from ...ops.exact_merge import Recipe, sum_of_products
from ...ops.fused_linear import Chain
from ...ops.inference_cache import reuse
from ...ops.low_rank import LowRank, approximate
from .choice import PREPARED, Choice, arrow_prototypes, choose, gate_weights, prepared, scores
from .config import BY_INPUT, TRAINS, RoutedConfig
from .deltas import LayerExperts
from .experts import ExpertFactors, ExpertWeights, SharedWeights
from .products import experts_chain

Note: TypeAlias = Callable[["RoutedLayer", Choice, Tensor], None]
"""A function of a layer, its choice and its input."""


class RoutingOptions(NamedTuple):
    """Options of an adapter's routing, as in its config."""

    routing: str
    level: str
    top_k: int | None
    temperature: float

    @classmethod
    def of(cls, config: RoutedConfig) -> RoutingOptions:
        """Return the options of a config."""
        return cls(config.routing, config.routing_level, config.top_k, config.temperature)


class RoutedLayer(RoutingLayer):
    """A layer with routed adapters, `Δ(x) = Σ_e c_e · w_e(x) · ΔW_e·x` over the experts.

    Args:
        base_layer: The layer to adapt.
        routing: The routing of the model, shared by its layers; None for a layer without a model.

    Attributes:
        routed_weights: Expert weights `c`, by adapter name; of each expert of the adapter, also
            those that do not adapt this layer.
        routed_gate: Prototypes or gates `[experts here, in]`, by the name of adapters that route
            by input.
        routed_experts: The experts' frozen factors, by adapter name.
        routed_options: Options of the routing, by adapter name.
        waiting: Numbers of the experts that have no prototype yet, by adapter name.
        watches: Functions that are called with each choice, by adapter name.

    Source: arXiv:2405.11157, section 3.2; arXiv:2402.05859, section 3
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("routed_weights", "routed_gate")
    other_param_names: ClassVar[tuple[str, ...]] = ("routed_options",)
    value_names: ClassVar[tuple[str, ...]] = ("routed_options", "routed_experts", "waiting")

    def __init__(self, base_layer: nn.Module, routing: Routing | None = None) -> None:
        super().__init__(base_layer, routing)
        self.routed_weights: AdapterModuleDict[ExpertWeights | SharedWeights] = AdapterModuleDict()
        self.routed_gate = AdapterParameterDict()
        self.routed_experts: AdapterModuleDict[ExpertFactors] = AdapterModuleDict()
        self.routed_options: dict[str, RoutingOptions] = {}
        self.waiting: dict[str, set[int]] = {}
        self.watches: dict[str, list[Note]] = {}

    def update_layer(
        self,
        adapter_name: str,
        config: RoutedConfig,
        experts: LayerExperts,
        placement: Placement | None = None,
        initialize: bool = True,
        weights: ExpertWeights | None = None,
    ) -> None:
        """Make an adapter's experts, weights and gates.

        Args:
            config: Its config.
            experts: The experts' deltas for this layer.
            placement: Device and dtype, by default the base layer's.
            initialize: Initialize weights and gates; False leaves their memory as it is.
            weights: The weights of another layer, to share.
        """
        place = self._placement(placement)
        home = self._placement(None)._replace(dtype=place.dtype)  # never the meta device
        factors = ExpertFactors(experts, home if place.device.type == "meta" else place)
        self.routed_experts[adapter_name] = factors.train(self.training)
        self.routed_options[adapter_name] = RoutingOptions.of(config)
        self.scaling[adapter_name] = self.base_scaling(adapter_name)
        self.waiting[adapter_name] = set()
        if config.routing in BY_INPUT:
            gate = torch.empty(len(factors), self.in_features, device=place[0], dtype=place[1])
            self.routed_gate[adapter_name] = nn.Parameter(gate, requires_grad=False)
        self.routed_weights[adapter_name] = (
            ExpertWeights(experts.number, place) if weights is None else SharedWeights(weights)
        )
        if initialize:
            self._reset(adapter_name, experts)
        self.set_requires_grad(adapter_name, not config.inference_mode)

    @torch.no_grad()
    def _reset(self, adapter_name: str, experts: LayerExperts) -> None:
        """Initialize weights and gates: the mean of all experts, or equal scores."""
        kind = self.routed_options[adapter_name].routing
        is_blend = kind in ("fixed", "learned")
        self.expert_weights(adapter_name).fill_(1 / experts.number if is_blend else 1.0)
        if kind == "arrow":
            prototypes = arrow_prototypes(list(experts.deltas.values()), experts.general)
            self.routed_gate[adapter_name].copy_(prototypes)
        elif kind in BY_INPUT:
            self.routed_gate[adapter_name].zero_()
            if kind == "activation":
                self.waiting[adapter_name] = set(experts.deltas)

    def note_loaded(self, adapter_name: str) -> None:
        """Note which experts have no activation prototype yet: a file has zeros for these."""
        gates = self.routed_gate.get(adapter_name)
        kind = self.routed_options[adapter_name].routing
        if kind == "activation" and gates is not None and not gates.is_meta:
            is_zero = (gates == 0).all(1)
            numbers = self.factors(adapter_name).numbers
            self.waiting[adapter_name] = set(numbers[is_zero.to(numbers.device)].tolist())

    def factors(self, adapter_name: str) -> ExpertFactors:
        """Return the module with the factors of an adapter's experts."""
        return self._modules["routed_experts"]._modules[adapter_name]

    def expert_weights(self, adapter_name: str) -> Tensor:
        """Return the expert weights of an adapter, `[experts]`, which may be another layer's."""
        return self._modules["routed_weights"]._modules[adapter_name]()

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Unfreeze or freeze the tensors that an adapter's routing trains; others stay frozen."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            if name not in self.scaling:
                continue
            trained = TRAINS.get(self.routed_options[name].routing) if requires_grad else None
            for attribute in self.container_names:
                container = getattr(self, attribute)
                if name in container:
                    container[name].requires_grad_(attribute == trained)

    def adopt_settings(self, adapter_name: str, fresh: nn.Module, fresh_name: str) -> None:
        """Copy the options of routing."""
        assert isinstance(fresh, RoutedLayer)
        self.routed_options[adapter_name] = fresh.routed_options[fresh_name]

    def delta_activations(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return `Σ_e c_e · w_e(x) · ΔW_e·x`."""
        if x.dim() == 1:
            return self.delta_activations(adapter_name, x.unsqueeze(0)).squeeze(0)
        return super().delta_activations(adapter_name, x)

    def delta_chain(self, adapter_name: str, x: Tensor) -> Chain:
        """Return `Σ_e c_e · w_e(x) · ΔW_e·x` as a chain of products."""
        experts = self.factors(adapter_name)
        factors = experts()
        if x.dtype != factors.down.dtype:
            x = self._cast_input_dtype(x, factors.down.dtype)
        choice = self._choice(adapter_name, experts, x)
        if self.watches:
            for watch in tuple(self.watches.get(adapter_name, ())):
                watch(self, choice, x)
        scale = self.scaling[adapter_name]
        if isinstance(scale, Tensor) or scale != 1:
            choice = choice._replace(weights=choice.weights * scale)
        return experts_chain(x, _with_general(choice, experts), factors)

    def _choice(self, adapter_name: str, experts: ExpertFactors, x: Tensor) -> Choice:
        """Return the weights of experts, by their place in this layer, for an input."""
        options = self.routed_options[adapter_name]
        kind, expert_weights = options.routing, self.expert_weights(adapter_name)
        if kind in ("fixed", "learned"):
            return Choice(expert_weights.index_select(0, experts.numbers))
        if kind == "task" or (kind == "phatgoose" and self.training):
            ids, owners = self.routing.tasks(x, self, len(experts.place))
            chosen, weights = experts.place.index_select(0, ids), experts.is_here * expert_weights
            choice = Choice(weights.index_select(0, ids).unsqueeze(1), chosen.unsqueeze(1))
            if owners is not IN_ORDER:
                assert choice.experts is not None
                choice = Choice(owners.expand(choice.weights, x), owners.expand(choice.experts, x))
            return choice if kind == "task" else self._gated(adapter_name, choice, x)
        if self.waiting[adapter_name]:
            raise self._no_prototypes(adapter_name)
        gates = self.routed_gate(adapter_name)
        if kind in PREPARED:
            gates = reuse(self, adapter_name, kind, (gates,), lambda: prepared(kind, gates))

        def decide(pooled: Tensor) -> tuple[Tensor, ...]:
            best = choose(kind, scores(kind, pooled, gates), options.top_k, options.temperature)
            here = expert_weights
            if not experts.has_all:
                here = here.index_select(0, experts.numbers)
            if best.experts is None:
                return (best.weights * here,)
            return best.weights * here[best.experts], best.experts

        if options.level == "token":
            return Choice(*decide(x))
        return Choice(*self.routing.chosen_by_input(x, self, adapter_name, decide))

    def _gated(self, adapter_name: str, choice: Choice, x: Tensor) -> Choice:
        """Return a choice with each sample's own expert weighted by its gate, in training."""
        chosen = choice.experts
        assert chosen is not None
        gates = self.routed_gate(adapter_name).index_select(0, chosen.flatten())
        samples = shapes(gates)[0][0]
        if self.routed_options[adapter_name].level == "token":
            weights = gate_weights(x.reshape(samples, -1, x.shape[-1]), gates)
            scaled = choice.weights.reshape(samples, 1, 1) * weights
            return Choice(scaled.view(*x.shape[:-1], 1), choice.experts)

        def weigh(pooled: Tensor) -> tuple[Tensor, ...]:
            times = shapes(pooled)[0][0] // samples  # a sample may have several texts
            of_samples = gates, choice.weights, chosen
            repeated, *rest = (tensor.repeat_interleave(times, 0) for tensor in of_samples)
            return gate_weights(pooled.unsqueeze(1), repeated).flatten(1), *rest

        weights, shares, experts = self.routing.chosen_by_input(x, self, adapter_name, weigh)
        return Choice(shares * weights, experts)

    def _no_prototypes(self, adapter_name: str) -> PeftValueError:
        names = self.routing.configs[adapter_name].task_names or ()
        missing = [names[i] for i in sorted(self.waiting[adapter_name])]
        return PeftValueError(
            f"Experts {missing} have no prototypes yet, and others that leave this layer alone may "
            "have none; `collect_prototypes` takes them from a few examples of each."
        )

    def shares(self, adapter_name: str, task_id: object) -> dict[int, float]:
        """Return the share of each expert in a blend: `task_id`, an expert's number or a dictionary
        of shares, times its weight; None stands for the weights of a blend.

        Raises:
            PeftNotSupportedError: The input chooses the experts.
        """
        kind, task_id = self.routed_options[adapter_name].routing, plain(task_id)
        weights = self.expert_weights(adapter_name).tolist()
        if task_id is None and kind in ("fixed", "learned"):
            return dict(enumerate(weights))
        if task_id is None:
            chosen = "each call names the expert" if kind == "task" else "the input chooses them"
            raise PeftNotSupportedError(
                f"`routing`={kind!r}: the delta is no fixed matrix, {chosen}. Pass `task_id`, an "
                "expert or a dictionary with the share of each of several."
            )
        given = task_id if isinstance(task_id, Mapping) else {task_id: 1.0}
        is_blend, shares = kind in ("fixed", "learned"), dict[int, float]()
        for number, share in given.items():
            if not is_int(number) or not 0 <= number < len(weights):
                raise PeftValueError(
                    f"`task_id`={number!r} must be the number of one of {len(weights)} experts; "
                    "names are for the model's methods."
                )
            shares[number] = share * (1.0 if is_blend else weights[number])
        return shares

    def resolve_task(self, adapter_name: str, task_id: object) -> int | None:
        """Return the expert of a merge, None for a blend."""
        return task_id if is_int(task_id) else None

    def delta_recipe(
        self, adapter_name: str, task_id: int | Mapping[int, float] | None = None, **options: object
    ) -> Recipe:
        """Return the delta of an expert, or of a blend, as a pair of factors."""
        shares = self.shares(adapter_name, task_id)
        A, B = self.factors(adapter_name).blend(shares)
        pair = A, B * self.scaling[adapter_name]
        return Recipe(sum_of_products, (self.geometry, pair))

    def low_rank_factors(
        self,
        adapter_name: str,
        rank: int | float | None = None,
        task_id: int | Mapping[int, float] | None = None,
        **options: object,
    ) -> LowRank:
        """Return the delta of an expert, or of a blend, as `B·A`; exact at the sum of the ranks."""
        A, B = self.factors(adapter_name).blend(self.shares(adapter_name, task_id))
        return approximate(B.detach() * self.scaling[adapter_name], A.detach(), rank)

    def adapter_cost(self, adapter_name: str, config: RoutedConfig) -> AdapterCost:
        """Return the cost of the chosen experts' factors and of the scores."""
        experts, size = self.factors(adapter_name), self.geometry
        ranks = sorted(experts.ranks, reverse=True)
        chosen = sum(ranks[: config.top_k] if config.routes_by_input else ranks)
        scored = len(experts) * size.in_features if config.routes_by_input else 0
        most = min(size.in_features, size.out_features)
        return AdapterCost(
            scored + chosen * (size.in_features + size.out_features), min(chosen, most)
        )


class Linear(RoutedLayer):
    """A linear layer (`nn.Linear`, `Conv1D`, quantized) with routed adapters.

    Args:
        **options: As for `update_layer`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: RoutedConfig,
        experts: LayerExperts,
        routing: Routing | None = None,
        placement: Placement | None = None,
        initialize: bool = True,
        weights: ExpertWeights | None = None,
    ) -> None:
        super().__init__(base_layer, routing)
        self.update_layer(adapter_name, config, experts, placement, initialize, weights)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)
        if routing is None:
            self.routing.configs[adapter_name] = config
            self.routing.layer = self


def _with_general(choice: Choice, experts: ExpertFactors) -> Choice:
    """Return a choice with the general delta, less as much as all experts together weigh."""
    if not experts.has_general:
        return choice
    weights = torch.cat([choice.weights, -choice.weights.sum(-1, keepdim=True)], dim=-1)
    if choice.experts is None:
        return Choice(weights)
    last = torch.full_like(choice.experts[..., :1], len(experts))
    return Choice(weights, torch.cat([choice.experts, last], dim=-1))
