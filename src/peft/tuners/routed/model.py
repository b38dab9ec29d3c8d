# SPDX-License-Identifier: Apache-2.0
"""`RoutedModel`: a model that routes over experts, and its methods for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, TypeAlias

from torch import Tensor, nn

from ...base.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from ...base.containers import modules_of
from ...base.errors import PeftTypeError, PeftValueError
from ...core import targets as _targets
from ...core.base_layer import geometry
from ...core.fitting import Loss
from ...core.injection import Build
from ...core.layer import BaseTunerLayer
from ...core.method_info import Role
from ...core.model_methods import forwarded, methods_of
from ...core.plan import own_modules
from ...core.routing.task_ids import one_task, some_tasks, task_shares
from ...core.routing.tuner import RoutingTuner
from . import composition, fitting, inventory, report
from .adapter import RoutedAdapter
from .config import RoutedConfig
from .deltas import Experts
from .entrance import Expert
from .layer import Linear, RoutedLayer
from .report import ExpertWatch
from .sources import find_experts, key_of
from .storage import RoutedFormat, with_experts

Task: TypeAlias = int | str


class RoutedModel(RoutingTuner[RoutedConfig]):
    """A model whose layers choose among experts, adapters of any method.

    Source: arXiv:2405.11157 (Arrow), arXiv:2402.05859 (PHATGOOSE)
    """

    prefix: ClassVar[str] = "routed_"
    tuner_layer_cls: ClassVar[type[BaseTunerLayer]] = RoutedLayer
    parameter_roles: ClassVar[Mapping[str, Role]] = {
        "weights": Role(("routed_weights",), lr=5e-2, decays=False),
        "gate": Role(("routed_gate",), lr=5e-3, decays=False),
    }
    checkpoint_format = RoutedFormat()
    supported_modules: ClassVar[str] = "nn.Linear (also quantized) and Conv1D"

    def tuner_layer_class(  # noqa: D102
        self, config: RoutedConfig, module: nn.Module
    ) -> type[BaseTunerLayer] | None:
        size = geometry(module)
        return None if size is None or size.is_conv else Linear

    def complete(self, config: RoutedConfig) -> Experts:
        """Return the experts of a config; fill in their digests, and the targets."""
        if not config.experts:
            raise PeftValueError(
                "RoutedConfig: `experts` is empty; name at least one adapter, `{name: folder or "
                "Hub id}`, or use `get_routed_model`."
            )
        experts = self._present(config) or find_experts(config, self.model)
        paths = list(own_modules(self.model))
        if config.target_modules in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND):
            named = [p for p in experts.paths() if not _targets.named(config.exclude_modules, p)]
            names, config.exclude_modules = _targets.exactly(named, paths)
            config.target_modules = set(names)
            return experts
        layers = config.layers_to_transform, config.layers_pattern
        chosen = _targets.select(paths, config.target_modules, config.exclude_modules, *layers)
        if unadapted := sorted(set(chosen).difference(experts.paths())):
            raise PeftValueError(
                f"No expert adapts {', '.join(f'`{path}`' for path in unadapted[:3])}; leave out "
                "`target_modules` to route every module that one adapts."
            )
        return experts

    def _present(self, config: RoutedConfig) -> Experts | None:
        """Return the experts of an adapter of this model that has the same, if there is one."""

        def keys(config: RoutedConfig) -> list[object]:
            parts = config.experts, config.general_experts
            named = [[(name, key_of(entry)) for name, entry in part.items()] for part in parts]
            return [*named, config.general_subtraction]

        if not all(entry.get("digest") for entry in config.experts.values()):
            return None
        for name, other in self.peft_config.items():
            if isinstance(other, RoutedConfig) and keys(other) == keys(config):
                return RoutedAdapter.of(self, name).experts()
        return None

    def file_contents(
        self, adapter_name: str, config: RoutedConfig, state: dict[str, Tensor]
    ) -> tuple[RoutedConfig, dict[str, Tensor]]:
        """Return config and tensors with the experts, if they are saved with the adapter."""
        return with_experts(
            config, state, adapter_name, RoutedAdapter.of(self, adapter_name).layers
        )

    @classmethod
    def note_loaded(cls, model: nn.Module, adapter_name: str) -> None:
        """Note which experts have no prototype yet."""
        for _, layer in modules_of(model, RoutedLayer):
            if adapter_name in layer.scaling:
                layer.note_loaded(adapter_name)

    def tuner_layer_options(
        self, config: RoutedConfig, path: str, build: Build[RoutedConfig]
    ) -> dict[str, object]:
        """Return the routing, the experts at the layer, and the weights that layers share."""
        assert isinstance(build.found, Experts)
        options: dict[str, object] = {"routing": self.routing, "experts": build.found.at(path)}
        if config.weights_granularity == "model" and build.layers:
            first = next(iter(build.layers.values()))
            options["weights"] = first.routed_weights[build.adapter_name]
        return options

    def merge_options_of(self, adapter_name: str, options: Mapping[str, object]) -> dict[str, int]:
        """Return the number of the expert to merge, none for a blend."""
        config, task = self.peft_config[adapter_name], options.get("task_id")
        if isinstance(task, Mapping):
            raise PeftTypeError(
                f"`task_id`={task!r} must be one expert, by id or name; write a blend with "
                "`save_as_lora`, or route with `routing='fixed'`, and merge that."
            )
        number = None if task is None else one_task(task, config)
        for layer in RoutedAdapter.of(self, adapter_name).layers.values():
            layer.shares(adapter_name, number)
        return {} if number is None else {"task_id": number}

    @classmethod
    def conversion_options(
        cls,
        config: RoutedConfig,
        *,
        task_id: Task | Mapping[Task, float] | None = None,
        **options: object,
    ) -> dict[str, int | dict[int, float] | None]:
        """Return the expert, or the shares of several, by number; None for a blend's weights."""
        super().conversion_options(config, **options)
        if task_id is None:
            return {"task_id": None}
        if isinstance(task_id, Mapping):
            return {"task_id": task_shares(task_id, config, "task_id")}
        return {"task_id": one_task(task_id, config)}

    @classmethod
    def delta_views(cls, config: RoutedConfig) -> dict[str, Mapping[str, object]]:
        """Return the options of each expert, by its name."""
        return {name: {"task_id": i} for i, name in enumerate(config.experts)}

    @classmethod
    def conversion_tasks(
        cls, config: RoutedConfig, tasks: Task | Iterable[Task] | None
    ) -> dict[str, int]:
        """Return numbers of experts by name."""
        chosen = tasks if tasks is None or isinstance(tasks, (str, int)) else list(tasks)
        numbers = range(config.n_tasks) if chosen is None else some_tasks(chosen, config)
        return {config.task_names[i]: i for i in numbers}

    def named_experts(self, adapter_name: str | None = None) -> list[str]:
        """Return the names of an adapter's experts, by the number that `task_ids` may use.

        Args:
            adapter_name: By default the active adapter.
        """
        return list(RoutedAdapter.of(self, adapter_name).config.experts)

    def get_expert_weights(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """Return the factor on each expert's delta, `[experts]` by module path.

        With "fixed" and "learned" routing they are the weights of the blend, else 1 unless set.

        Args:
            adapter_name: By default the active adapter.
        """
        return inventory.expert_weights(RoutedAdapter.of(self, adapter_name))

    def set_expert_weights(
        self,
        weights: Mapping[str, float] | Mapping[str, Mapping[str, float]],
        adapter_name: str | None = None,
    ) -> None:
        """Set the factor on experts' deltas; others keep theirs.

        Args:
            weights: By expert for all layers, or such a dictionary by module path.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError, PeftValueError: An expert or path is unknown, a weight not a finite
                number, or the adapter merged; nothing is changed.
        """
        with RoutedAdapter.to_change(self, adapter_name) as adapter:
            inventory.set_expert_weights(adapter, weights)

    def add_experts(self, experts: Mapping[str, Expert], adapter_name: str | None = None) -> None:
        """Add experts after those that an adapter has, whose weights and gates stay.

        A new expert of a blend has weight 0. Its gate has to be trained, its activation prototype
        collected; an Arrow prototype is computed. Parameters are replaced: make the optimizer
        afterwards.

        Args:
            experts: As for `get_routed_model`.
            adapter_name: By default the active adapter.

        Raises:
            As `get_routed_model`; nothing is changed.
        """
        with RoutedAdapter.to_change(self, adapter_name) as adapter:
            inventory.add_experts(adapter, experts)

    def remove_experts(self, experts: str | Sequence[str], adapter_name: str | None = None) -> None:
        """Take experts out of an adapter. Later ones move up; their weights and gates stay.

        Args:
            experts: Names.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError: They are no names.
            PeftValueError: One is unknown, or none would be left; nothing is changed.
        """
        if not isinstance(experts, Iterable):
            raise PeftTypeError(f"`experts`={experts!r} must be a name or a list of names.")
        names = [experts] if isinstance(experts, str) else list(experts)
        with RoutedAdapter.to_change(self, adapter_name) as adapter:
            inventory.remove_experts(adapter, names)

    def collect_prototypes(
        self, examples: fitting.Examples, with_expert: bool = True, adapter_name: str | None = None
    ) -> None:
        """Set the prototypes of "activation" routing: each layer's mean input over a few examples
        of each expert. Labels are not needed.

        The model runs in evaluation mode without gradients, and is as before afterwards.

        Args:
            examples: Expert → batches, keyword arguments for the model or input tensors.
            with_expert: Run the examples with their own expert; False with the base model.
            adapter_name: By default the active adapter.

        Raises:
            PeftTypeError: The examples are no dictionary of batches.
            PeftValueError: An expert is unknown, other adapters are active or merged, or a mean is
                not finite; no prototype is changed.
            PeftNotSupportedError: The routing is another.
        """
        with RoutedAdapter.to_change(self, adapter_name) as adapter:
            fitting.collect_prototypes(adapter, examples, with_expert)

    def fit_gates(
        self,
        examples: Mapping[str, Loss] | Loss,
        steps: int = 100,
        lr: float = 5e-3,
        adapter_name: str | None = None,
    ) -> dict[str, list[float]]:
        """Train gates or expert weights with Adam on a few examples, all else frozen.

        "phatgoose" trains the gate of each expert on its own examples, one after the other. "input"
        and "learned" train all together. A Trainer or a loop of your own does the same: only gates
        or weights require gradients, and calls in training take `task_ids` for "phatgoose".

        Args:
            examples: For "phatgoose" expert → loss, else a loss: batches, keyword arguments for a
                model whose output has a `loss`; or a function without arguments that returns it.
            steps: Steps for each expert.
            lr: Learning rate.
            adapter_name: By default the active adapter.

        Returns:
            The losses of each expert's steps, or those of all under "".

        Raises:
            PeftTypeError, PeftValueError: The examples are not as described, or a loss is not
                finite; gates and weights are as before.
            PeftNotSupportedError: The routing has nothing to train.

        Source: arXiv:2402.05859, section 3.1
        """
        with RoutedAdapter.to_change(self, adapter_name) as adapter:
            return fitting.fit_gates(adapter, examples, steps, lr)

    def fit_weights(
        self,
        loss: Loss,
        steps: int = 40,
        lr: float = 0.1,
        init: str | None = None,
        *,
        method: composition.FitMethod = "gradient",
        penalty: float = 0.05,
        bound: float = 1.5,
        by_layer: bool = False,
        seed: int = 0,
        adapter_name: str | None = None,
    ) -> composition.WeightFit:
        """Fit the weights of a blend to a few examples of a new task: one for each expert, for all
        layers. Everything else is as before, and the model runs in evaluation mode.

        The loss is `loss + penalty · Σ_e |w_e|` of the exact sum of deltas `Σ_e w_e · ΔW_e`. (The
        paper sums the factors `A` and `B` apart, which mixes the experts' products.)

        Args:
            loss: A function without arguments that returns the loss of the model on the examples;
                or batches, keyword arguments for a model whose output has a `loss`. For a search
                the function may return a number, and need not be differentiable.
            steps: Steps of Adam, each with one batch or one call of the function; or points that a
                search tries after the start, each with all batches. 0 only sets the start.
            lr: Learning rate of Adam.
            init: None: start from the present weights, their mean over layers. "zero": from the
                base model, as the paper. "equal": from the mean of all experts. "best": from the
                expert with the least loss alone.
            method: "gradient", or "search": a (1+1) evolution strategy that needs no gradients.
            penalty: Factor on the sum of the weights' absolute values.
            bound: Largest absolute value of a weight.
            by_layer: Fit weights of each layer for itself, by gradient.
            seed: Of the search's steps.
            adapter_name: By default the active adapter.

        Returns:
            The weights, which are set in the model, with the least loss; with several batches and
            gradients, those after the last step.

        Raises:
            PeftTypeError: `loss` is neither a function nor batches, or returns no number.
            PeftValueError: A value is not allowed, the adapter is merged or not active, or the loss
                does not depend on the weights or is not finite; nothing is changed.
            PeftNotSupportedError: The routing is neither "fixed" nor "learned".

        Example:
            `model.fit_weights(lambda: model(**examples).loss, init="zero")`

        Source: arXiv:2307.13269, section 3
        """
        with RoutedAdapter.to_change(self, adapter_name) as adapter:
            return composition.fit_weights(
                adapter,
                loss,
                steps,
                lr,
                init,
                method=method,
                penalty=penalty,
                bound=bound,
                by_layer=by_layer,
                seed=seed,
            )

    def watch_experts(self, adapter_name: str | None = None) -> AbstractContextManager[ExpertWatch]:
        """Return a context in which calls note the experts that they choose; its `report()` is an
        `ExpertReport`. Calls outside it cost nothing more.

        Args:
            adapter_name: By default the active adapter.

        Example:
            >>> import torch
            >>> from peft import LoraConfig, get_peft_model, get_routed_model
            >>> from peft import get_peft_model_state_dict as tensors
            >>> one = LoraConfig(r=1, target_modules=["0"], init_lora_weights=False)
            >>> tuned = [get_peft_model(nn.Sequential(nn.Linear(4, 4)), one) for _ in "ab"]
            >>> experts = {name: (one, tensors(m)) for name, m in zip("ab", tuned)}
            >>> model = get_routed_model(nn.Sequential(nn.Linear(4, 4)), experts, top_k=1)
            >>> with model.watch_experts() as watch:
            ...     _ = model(torch.randn(2, 3, 4))
            >>> watch.report().layers["0"]["tokens"]
            6
        """
        return report.watch_experts(RoutedAdapter.of(self, adapter_name))


@methods_of(RoutedModel)
class RoutedMethods:
    """Methods that a routed model has in addition to those of every `PeftModel`."""

    named_experts = forwarded(RoutedModel.named_experts)
    get_expert_weights = forwarded(RoutedModel.get_expert_weights)
    set_expert_weights = forwarded(RoutedModel.set_expert_weights)
    add_experts = forwarded(RoutedModel.add_experts)
    remove_experts = forwarded(RoutedModel.remove_experts)
    collect_prototypes = forwarded(RoutedModel.collect_prototypes)
    fit_gates = forwarded(RoutedModel.fit_gates)
    fit_weights = forwarded(RoutedModel.fit_weights)
    watch_experts = forwarded(RoutedModel.watch_experts)
